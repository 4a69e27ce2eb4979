"""Lanes: which implementations, devices and dtypes a run covers (`pytest --lane NAME`).

cpu        the torch path on the CPU, everything
interpret  the kernels under triton's interpreter: fp32 and fp16, small shapes
aot        the kernels compiled to cubins for GPUs that are not there
compiled   the kernels' PTX for such a GPU (--arch), executed on the CPU: bf16, fp16 and fp32
gpu        everything on a CUDA device

`--full` widens a lane to the size that is run before an issue closes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.digest import NO_TIME
from helpers.fast_interpreter import interpret_fast
from helpers.lanes import FP32, LANES, WAYS
from helpers.strict_interpreter import refuse_masks_that_are_not_bool
from hypothesis import HealthCheck, settings

LANES_MAY_DIFFER = {
    "stlm_attention_bwd_q": (
        "in fp32 alone: lanes hold the same sum fused in different ways, which differ in the last"
        " bit (findings/triton_sum_differs_between_lanes.sh); without fusion every product of fp32"
        " would take two instructions"
    ),
}
"""Kernels of which the compiled lane accepts faults of the kind "lanes", and why."""
# Values, then what only a GPU shows: minutes there may be cut off.
FIRST_ON_A_GPU = {"test_ops": 0, "test_gpu": 1}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lane", choices=LANES, default="cpu", help="which lane to run")
    parser.addoption("--arch", type=int, default=90, help="GPU of the compiled lane, e.g. 80")
    parser.addoption("--full", action="store_true", help="the long form of the lane")
    parser.addoption("--seeds", type=int, help="draws of what rounding decides (1; --full: 20)")
    parser.addoption("--margins", action="store_true", help="fail near a limit, as --full does")
    parser.addoption("--ends-at", type=int, help="no test begins after it (seconds since 1970)")


def pytest_configure(config: pytest.Config) -> None:
    lane = config.getoption("--lane")
    config.addinivalue_line("markers", "lanes(*names): the lanes a test belongs to (default: cpu)")
    config.addinivalue_line(
        "markers", "exclusive: wants the GPU to itself, for its memory or its time"
    )
    config.addinivalue_line("markers", "one_dtype: float32 shows it; others only with --full")
    # Triton reads this when it decorates a kernel, so it must be set before any is imported.
    if lane == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    from helpers.margins import Margins  # it imports triton

    strict = config.getoption("--full") or config.getoption("--margins")
    config.pluginmanager.register(Margins(strict))
    if lane != "gpu":
        keep_compilers_here()
    if lane == "interpret":
        require_interpreter()
    torch.set_num_threads(1)
    settings.register_profile(
        "stlm",
        max_examples=500 if config.getoption("--full") else 25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("stlm")


def keep_compilers_here() -> None:
    """Caches in the checkout, one for each instruction set: inductor fails on another's entries.

    On a GPU machine they stay where they are, for the benchmarks that follow the tests.
    """
    sets = (torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine())
    folder = Path(__file__).parents[1] / ".cache" / "-".join(sets)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def require_interpreter() -> None:
    """One line instead of a failure for every case."""
    from stlm_kernels._dispatch import has_triton, interpreter_reasons

    if has_triton() and (reasons := interpreter_reasons()):
        raise pytest.UsageError("; ".join(reasons))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`way` runs over what the lane covers, `draw` over seeds."""
    if "draw" in metafunc.fixturenames:
        many = 20 if metafunc.config.getoption("--full") else 1
        metafunc.parametrize("draw", range(metafunc.config.getoption("--seeds") or many))
    if "way" in metafunc.fixturenames:
        ways = WAYS[metafunc.config.getoption("--lane")]
        metafunc.parametrize("way", ways, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lane = config.getoption("--lane")
    every_dtype = lane == "gpu" or config.getoption("--full")
    kept, dropped = [], []
    for item in items:
        mark = item.get_closest_marker("lanes")
        if mark is not None:
            wanted = lane in mark.args
        elif "way" in getattr(item, "fixturenames", ()):
            wanted = bool(WAYS[lane]) and lane != "compiled"
        else:
            wanted = lane == "cpu"
        if lane == "compiled" and wanted and not every_dtype:
            case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
            wanted = case is None or "smoke" in case.tags
        if item.get_closest_marker("one_dtype") and not every_dtype:
            wanted = wanted and item.callspec.params["way"].dtype == FP32  # type: ignore[attr-defined]
        (kept if wanted else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
    if lane == "gpu":
        items.sort(key=lambda item: FIRST_ON_A_GPU.get(item.path.stem, len(FIRST_ON_A_GPU)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    ends_at = item.config.getoption("--ends-at")
    if ends_at is not None and time.time() > ends_at:
        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """A fault on the GPU fails the test that launched it, not a later one."""
    done = yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A process without its GPU ends and pytest-xdist begins another: no later test pays for it."""
    done = yield
    if cuda_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit("this process has lost its GPU", returncode=3)
    return done


def cuda_is_lost() -> bool:
    """An access out of bounds leaves a process with nothing but errors."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.fixture(scope="session", autouse=True)
def lane_is_possible(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--lane") == "gpu" and not torch.cuda.is_available():
        pytest.skip("the gpu lane needs a CUDA device")


@pytest.fixture(autouse=True)
def products_are_torch_s_own() -> Iterator[None]:
    """A command that trains may choose, for all of its process, who multiplies fp32 matrices."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def compiled_kernels_run_here(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each launch of the compiled lane compiles its kernel for a GPU and executes the PTX."""
    if request.config.getoption("--lane") != "compiled":
        yield
        return
    from stlm_kernels import ptx

    arch = request.config.getoption("--arch")
    with ptx.executing(arch=arch, collect=["lanes", "proxy"]) as session:
        yield
    for done in session.executions:
        for fault in done.faults:
            assert is_accepted(fault), fault


def is_accepted(fault: Any) -> bool:
    """Return whether the compiler makes this fault and a reason for it is written down."""
    from helpers.fences import may_lack_fences

    if fault.kind == "lanes":
        return fault.kernel in LANES_MAY_DIFFER
    return may_lack_fences(fault.kernel)


@pytest.fixture(scope="session", autouse=True)
def as_strict_as_newer_triton(request: pytest.FixtureRequest) -> Generator[None]:
    from stlm_kernels._dispatch import has_triton

    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--lane") == "interpret" and has_triton():
            refuse_masks_that_are_not_bool(patch)
            interpret_fast(patch)
        yield


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers alone and among others."""
    torch.manual_seed(0)
