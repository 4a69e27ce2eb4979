"""Profiling: the command for one kernel, what its figures mean, and what is said without a GPU."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import profile
from bench.harness.jobs import Task
from bench.profiling import ncu, proton
from stlm_kernels import _launch, inspect
from stlm_kernels.registry import OPS

SPEC = OPS["byte_pool"]
BACKWARD = profile.Pass(SPEC, SPEC.tagged("smoke")[0], "bwd")
KERNEL = "stlm_byte_pool_bwd"
QUIET = {
    ncu.TIME: 100_000.0,
    ncu.WAVES: 4.0,
    ncu.OCCUPANCY: 42.0,
    **dict.fromkeys([*ncu.MEMORY.values(), *ncu.COMPUTE.values(), *ncu.EXP.values()], 10.0),
    **dict.fromkeys(ncu.STALLS.values(), 0.5),
    ncu.STALLS["long_scoreboard"]: 7.25,
}


def csv_of(values: dict[str, Any], kernel: str = KERNEL, unit: str = "ns") -> str:
    """Output of ncu: its own messages, then a line for each metric of the launch."""
    head = '"ID","Process ID","Kernel Name","Block Size","Metric Name","Metric Unit","Metric Value"'
    rows = [
        f'"0","7","{kernel}","(128, 1, 1)","{name}","{unit if name == ncu.TIME else "%"}","{value}"'
        for name, value in values.items()
    ]
    return "\n".join(["==PROF== Connected to process 7", head, *rows, ""])


def digest_of(changes: dict[str, Any], floor: float | None = None) -> ncu.Digest:
    return ncu.digest(*ncu.read_csv(csv_of(QUIET | changes).splitlines()), floor)


@pytest.mark.parametrize(
    ("changes", "bound", "unit"),
    [
        ({ncu.MEMORY["DRAM"]: 91.0, ncu.EXP["MUFU"]: 70.0}, "memory", "DRAM"),
        ({ncu.MEMORY["L2"]: 80.0}, "memory", "L2"),
        ({ncu.COMPUTE["tensor pipe"]: 85.0, ncu.MEMORY["DRAM"]: 70.0}, "compute", "tensor pipe"),
        ({ncu.COMPUTE["issue slots"]: 61.0}, "compute", "issue slots"),
        ({ncu.EXP["MUFU"]: 88.0, ncu.COMPUTE["tensor pipe"]: 62.0}, "exp", "MUFU"),
        ({ncu.WAVES: 0.3, ncu.MEMORY["DRAM"]: 20.0}, "launch", "DRAM"),
        ({ncu.TIME: 2_000.0, ncu.MEMORY["DRAM"]: 20.0}, "launch", "DRAM"),
        ({ncu.MEMORY["DRAM"]: 59.0}, "latency", "DRAM"),
    ],
)
def test_what_limits_a_kernel(changes: dict[str, float], bound: str, unit: str) -> None:
    found = digest_of(changes)
    assert (found.bound, found.unit[0]) == (bound, unit)
    assert found.stalls[0] == ("long_scoreboard", 7.25)


def test_a_digest_as_text() -> None:
    text = "\n".join(ncu.lines(digest_of({ncu.MEMORY["DRAM"]: 91.0}, floor=80e-6)))
    expected = ("memory-bound, 100.00 us", "DRAM at 91%", "1.25 times", "42%", "scoreboard 7.25")
    for part in expected:
        assert part in text
    assert "floor" not in "\n".join(ncu.lines(digest_of({})))
    assert "0.30 waves" in "\n".join(ncu.lines(digest_of({ncu.WAVES: 0.3})))


def test_what_a_device_does_not_count_is_left_out() -> None:
    """Thousands may be separated."""
    found = digest_of({ncu.EXP["MUFU"]: "n/a", ncu.TIME: "1,000,000"})
    assert ncu.EXP["MUFU"] not in found.values
    assert found.seconds == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==PROF== nothing\n", "got 0"),
        (csv_of(QUIET) + csv_of(QUIET, "stlm_sum_splits").partition("\n")[2], "one launch"),
        (csv_of(QUIET, unit="usecond"), "expected nanoseconds"),
        (csv_of({ncu.WAVES: 1.0}), f"expected {ncu.TIME}"),
    ],
)
def test_another_csv_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ncu.read_csv(text.splitlines())


def test_the_command_measures_exactly_one_kernel() -> None:
    commands = profile.ncu_commands(BACKWARD, Path("out"))
    assert commands.keys() == {KERNEL, "stlm_sum_splits"}
    words = shlex.split(commands[KERNEL])
    after = dict(itertools.pairwise(words))
    assert after["--kernel-name"] == f"regex:^{KERNEL}$"
    assert (after["--launch-count"], after["--nvtx-include"]) == ("1", f"{ncu.RANGE}/")
    assert after["--metrics"].split(",") == list(ncu.METRICS)
    assert words[-6:] == ["byte_pool", "--case", BACKWARD.case.name, "--pass", "bwd", "--once"]


@pytest.mark.parametrize("name", [name for name, spec in OPS.items() if spec.kernels])
def test_every_op_has_kernels_in_each_pass(name: str) -> None:
    spec = OPS[name]
    passes = ("fwd", "bwd") if spec.grad_args else ("fwd",)
    case = spec.tagged("bench", "bench_full")[0]
    kernels = {
        kernel
        for direction in passes
        for kernel in profile.launched(profile.Pass(spec, case, direction))
    }
    assert kernels
    assert all(kernel.startswith("stlm_") for kernel in kernels)


def test_the_range_holds_one_run_in_this_thread() -> None:
    log: list[Any] = []

    @contextlib.contextmanager
    def in_range(name: str) -> Iterator[None]:
        log.append(name)
        yield
        log.append("end")

    task = Task([1], lambda x: log.append("prepare"), lambda x: log.append("run"))
    profile.run_in_range(task, in_range)
    assert log == ["prepare", "run", "prepare", ncu.RANGE, "run", "end"]


def test_counters_without_a_gpu() -> None:
    """Executed kernels take the place of times: checks, counters, bounds beside the floor."""
    spec = OPS["segment_pool"]
    shown = profile.counted(profile.Pass(spec, spec.tagged("smoke")[0], "bwd"), 90)
    assert "rates of NVIDIA H200 SXM, DRAM floor 0.0" in shown
    assert "stlm_segment_pool_bwd" in shown
    assert "stlm_segment_sum" not in shown, "that is the forward pass"
    assert "FAULT" not in shown
    assert "a bound, not a time" in shown


def test_the_command_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    compiled = inspect.Report(
        KERNEL, ("byte_pool",), "any", 90, "num_warps=4", 96, 0, 0, 1024, "HGMMA", 4, 4, "", ""
    )
    monkeypatch.setattr(profile, "inspect_op", lambda *_: [compiled])
    monkeypatch.setattr(profile, "counted", lambda *_: "a bound, not a time")
    rates = ["--copy-gb-s", "4000", "--matmul-tflop-s", "800", "--out", str(tmp_path)]
    case = ["byte_pool", "--pass", "bwd", "--case", BACKWARD.case.name]
    assert profile.main([*case, *rates]) == 0
    shown = capsys.readouterr().out
    for part in (
        f"regex:^{KERNEL}$",
        "HGMMA",
        f"{BACKWARD.bytes:,} bytes",
        "Executed on the CPU instead",
        "a bound, not a time",
    ):
        assert part in shown
    profile.main([*case, "--out", str(tmp_path)])
    assert "give --copy-gb-s" in capsys.readouterr().out
    (tmp_path / "one.csv").write_text(csv_of(QUIET | {ncu.EXP["MUFU"]: 90.0}))
    profile.main([*case, *rates, "--digest", str(tmp_path / "one.csv")])
    shown = capsys.readouterr().out
    seconds = max(BACKWARD.bytes / 4e12, BACKWARD.flops / 800e12)
    assert "exp-bound" in shown
    assert f"{100e-6 / seconds:.2f} times the floor" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "expected one that has kernels"),
        (["linear_kl_div"], "expected one that has kernels"),
        (["byte_pool", "--case", "T1"], BACKWARD.case.name),
        (["find_patches", "--pass", "bwd"], "no backward pass"),
        (["byte_pool", "--digest", "missing.csv"], "missing.csv"),
        (["byte_pool", "--copy-gb-s", "4000"], "expected both above 0, or none"),
        (["byte_pool", "--copy-gb-s", "0", "--matmul-tflop-s", "1"], "expected both above 0"),
        (["byte_pool", "--once"], "needs a CUDA device"),
    ],
)
def test_what_cannot_be_profiled(arguments: list[str], message: str, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("some of it can")
    with pytest.raises(SystemExit, match="2"):
        profile.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("device", "known"), [(75, 80), (80, 80), (87, 86), (90, 90), (103, 100)])
def test_a_device_between_those_known(device: int, known: int) -> None:
    assert profile.known_arch(device) == known


# Proton


def node(name: str, metrics: dict[str, float], *children: Any) -> dict[str, Any]:
    return {"frame": {"name": name}, "metrics": metrics, "children": list(children)}


def test_what_proton_wrote() -> None:
    launches = {"time (ns)": 20_000.0, "count": 10, "bytes": 4e7, "flops": 1e9}
    other = {"time (ns)": 5_000.0, "count": 10, "bytes": 1e6}
    tree = [
        node("ROOT", {}, node("scope", {"bytes": 1}, node(KERNEL, launches), node("at::copy", {})),
             node("stlm_sum_splits", other)),
        {"CUDA": {"0": {}}},
    ]  # fmt: skip
    first, second = proton.proton_lines(tree)
    assert first.split() == [KERNEL, "2.00", "us", "a", "launch", "2000", "GB/s", "50.00",
                             "TFLOP/s"]  # fmt: skip
    assert "TFLOP" not in second


def test_without_cupti_proton_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proton_of_triton = pytest.importorskip("triton.profiler")

    def start(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(proton_of_triton, "start", start)
    task = Task([1], lambda x: x, lambda x: x)
    text = proton.under_proton(task, tmp_path / "run", {}, {})
    assert text == "Proton is not usable here: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"


@pytest.mark.lanes("aot")
def test_kernels_tell_triton_their_bytes_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch metadata is asked for while a launch hook is set, and not otherwise."""
    import triton

    asked: list[dict[str, Any]] = []

    def ask(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        monkeypatch.setattr(type(compiled), "_init_handles", lambda self: None)
        compiled.function = None
        bound = [*args, *(options[n] for n in kernel.arg_names[len(args) :] if n in options)]
        metadata = compiled.launch_metadata((programs,), 0, *bound)
        asked.append({} if metadata is None else metadata.get())

    def run(hook: Any) -> list[dict[str, Any]]:
        asked.clear()
        weight = torch.zeros(256, 64)
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
        with inspect.target(90), _launch.recording(ask):
            ids, boundaries = torch.zeros(20, dtype=torch.uint8), torch.tensor([0, 8, 20]).int()
            SPEC.op(ids, weight, boundaries, impl="triton")
        return list(asked)

    assert "bytes" not in run(lambda metadata: None)[0]
    with proton.launch_metadata({"stlm_byte_pool_fwd": 1234}):
        (found,) = run(lambda metadata: None)
        assert run(None) == [{}]
    # ids, table, boundaries and the pooled rows
    assert found["bytes"] == 20 + 4 * 256 * 64 + 4 * 3 + 4 * 2 * 64
    assert (found["name"], found["flops"]) == ("stlm_byte_pool_fwd", 1234)
    (after,) = run(lambda metadata: None)
    assert "bytes" not in after


@pytest.mark.parametrize(("name", "one"), [("byte_pool", True), ("attention", False)])
def test_flops_belong_to_the_kernel_that_does_them_all(name: str, one: bool) -> None:
    spec = OPS[name]
    what = profile.Pass(spec, spec.tagged("smoke")[0], "bwd")
    flops = profile.flops_by_kernel(what)
    assert flops == ({KERNEL: what.flops} if one else {})


@pytest.mark.lanes("gpu")
def test_proton_sees_the_kernels_of_a_pass(tmp_path: Path) -> None:
    from bench.harness.timing import Gpu

    task = profile.judged_task(BACKWARD, Gpu())
    text = proton.under_proton(task, tmp_path / "run", {"bytes": 1, "flops": 1}, {KERNEL: 10})
    assert KERNEL in text or "not usable" in text


@pytest.mark.lanes("gpu")
def test_the_backward_pass_stays_in_the_range() -> None:
    """Ranges are of a thread, and autograd has threads of its own."""
    seen: list[int] = []

    def run(x: torch.Tensor) -> None:
        x.register_hook(lambda grad: seen.append(threading.get_ident()))
        x.sum().backward()

    task = Task([0], lambda _: torch.ones(4, device="cuda", requires_grad=True), run)
    profile.run_in_range(task, torch.cuda.nvtx.range)
    assert set(seen) == {threading.get_ident()}
