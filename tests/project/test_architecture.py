"""The rules of CONTRIBUTING that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from helpers.sources import (
    ALL_SOURCES,
    ROOT,
    SOURCES,
    circles_of,
    import_graph,
    imports_of,
    jitted,
    name_of,
)

OP_FILES = ("__init__", "op", "torch_impl", "reference", "cases")
KERNEL_FILES = ("triton_impl", "config")
SECOND_FAMILY = (
    "chunked_op", "chunked_impl", "dlogits_impl", "backward_impl", "short_impl", "blocks",
    "gain_impl", "product_impl",
)  # fmt: skip
WAYS_OF_TORCH = ("banded", "cpu", "documents", "folded", "sight")
"""Registered ops and kernels of an op that large shapes take, where one file would hold two."""
MAX_KERNEL_LINES, MAX_KERNEL_PARAMETERS, MAX_KERNEL_FLAGS = 80, 20, 3
MAX_FILE_LINES = 400


def test_the_import_scan_sees_relative_imports() -> None:
    found = imports_of(ROOT / "stlm_kernels/ops/byte_pool/op.py")
    assert "stlm_kernels._checks" in found
    assert "stlm_kernels.ops.byte_pool.torch_impl" in found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_import_direction(path: Path) -> None:
    name, imports = name_of(path), imports_of(path)
    if name.startswith("stlm_kernels/"):
        assert not any(i.startswith(("stlm_models", "bench", "tests")) for i in imports)
    else:
        private = [i for i in imports if re.match(r"stlm_kernels\.(_(?!_)|ops|registry)", i)]
        assert not private, f"{name} may only import public names of stlm_kernels: {private}"
    stem = path.stem
    forbidden = {
        "torch_impl": ("triton", "triton_impl", "reference", "cases"),
        "triton_impl": ("torch_impl", "reference", "cases"),
        "chunked_impl": ("torch_impl", "reference", "cases"),
        "dlogits_impl": ("torch_impl", "reference", "cases"),
        "backward_impl": ("torch_impl", "reference", "cases"),
        "gain_impl": ("torch_impl", "reference", "cases"),
        "product_impl": ("torch_impl", "reference", "cases"),
        "chunked_op": ("triton", "triton_impl", "chunked_impl", "reference", "cases"),
        "reference": ("triton", "triton_impl", "torch_impl", "config", "_checks"),
        "config": ("triton", "triton_impl", "torch_impl", "reference", "cases"),
        "op": ("triton", "triton_impl", "reference", "cases"),
    }.get(stem, ())
    for target in imports:
        assert target.split(".")[-1] not in forbidden, f"{name} must not import {target}"


ORDER = (
    "stlm_kernels._version stlm_kernels._errors stlm_kernels._launch stlm_kernels.terminal",
    "stlm_kernels._checks",
    "stlm_kernels.runtime",
    "stlm_kernels._triton",
    "stlm_kernels._dispatch",
    "stlm_kernels._torch stlm_kernels._sharding stlm_kernels._flops",
    "stlm_kernels._library",
    "stlm_kernels._linear stlm_kernels.spec",
    "stlm_kernels.ops stlm_kernels.spec_inputs",
    "stlm_kernels stlm_kernels.registry stlm_kernels.testing",
    "stlm_kernels.inspect stlm_kernels.env",
    "stlm_kernels.ptx",
    "stlm_models.config stlm_models.files",
    "stlm_models.presets stlm_models.layers",
    "stlm_models.build",
    "stlm_models.generation",
    "stlm_models.model",
    "stlm_models.data stlm_models.parallel",
    "stlm_models.evaluation stlm_models.checkpoint",
    "stlm_models.training",
    "stlm_models.compression",
    "stlm_models",
    "stlm_models.huggingface stlm_models.train stlm_models.generate stlm_models.evaluate"
    " stlm_models.compress stlm_models.decompress stlm_models.summary",
    "bench.peers",
    "bench.harness",
    "bench.profiling bench.report",
    "bench.resources",
    "bench",
)
"""Folders and single files from what is imported to what imports; of one line, either way."""
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms.split()}


def rank_of(module: str) -> int:
    """Return the rank of the folder or file that holds a module; commands of bench come last."""
    package, _, rest = module.partition(".")
    return RANKS.get(f"{package}.{rest.split('.')[0]}" if rest else package, RANKS["bench"])


def test_imports_go_one_way() -> None:
    for module, used in import_graph(ALL_SOURCES).items():
        for other in used:
            assert rank_of(other) <= rank_of(module), f"{module} must not import {other}"


def test_every_folder_has_its_place() -> None:
    modules = import_graph(SOURCES)
    assert {rank_of(module) for module in modules} <= set(range(RANKS["bench.peers"]))
    assert rank_of("stlm_models.layers.attention") < rank_of("stlm_models.model")


def test_only_checks_of_ops_import_the_checks_for_users() -> None:
    """`stlm_kernels.testing` is for tests, benchmarks and users."""
    graph = import_graph(SOURCES)
    users = {module for module, used in graph.items() if "stlm_kernels.testing" in used}
    assert all(module.startswith("stlm_kernels.ptx.") for module in users), users


def test_no_import_goes_round() -> None:
    assert circles_of(import_graph(ALL_SOURCES)) == []


def test_a_circle_is_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles_of(graph) == [["b", "c"]]
    assert "stlm_kernels.ops.unpool.op" in import_graph(SOURCES)["stlm_kernels.ops.unpool"]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sources_keep_the_bans(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"os\.environ|os\.getenv|getenv\(", text), "no environment variables"
    for banned in ("triton.autotune", "triton.heuristics", "make_block_ptr", "tl.atomic"):
        assert banned not in text, f"{banned} is banned"
    if not path.name.startswith("checkpoint"):
        assert "torch.load(" not in text, "no pickle"
    assert "import pickle" not in text, "no pickle"


@pytest.mark.parametrize("folder", sorted((ROOT / "stlm_kernels/ops").iterdir()), ids=name_of)
def test_every_op_has_the_same_files(folder: Path) -> None:
    if not folder.is_dir() or folder.name == "__pycache__":
        pytest.skip("not an op")
    stems = {path.stem for path in folder.glob("*.py")}
    # The losses of linear_cross_entropy are linear_logprobs'.
    elsewhere = {"torch_impl"} if folder.name == "linear_cross_entropy" else set()
    assert stems >= set(OP_FILES) - elsewhere
    assert "triton_impl" not in stems or "config" in stems
    assert stems <= {*OP_FILES, *KERNEL_FILES, *SECOND_FAMILY, *WAYS_OF_TORCH}
    assert (ROOT / f"tests/kernels/test_{folder.name}.py").exists()


KERNELS = [
    pytest.param(function, id=function.name)
    for path in SOURCES
    for function in jitted(path)
    if function.name.startswith("stlm_")
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_stay_small(kernel: ast.FunctionDef) -> None:
    parameters = kernel.args.args
    constants = [p for p in parameters if p.annotation and "constexpr" in ast.unparse(p.annotation)]
    flags = [p for p in constants if p.arg == "MEAN" or p.arg.startswith(("HAS_", "IS_", "WITH_"))]
    assert (kernel.end_lineno or 0) - kernel.lineno < MAX_KERNEL_LINES
    assert len(parameters) - len(constants) <= MAX_KERNEL_PARAMETERS
    assert len(flags) <= MAX_KERNEL_FLAGS


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


def test_contributing_names_the_same_limits() -> None:
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert (
        f"file {MAX_FILE_LINES} lines, line 100 columns, kernel {MAX_KERNEL_LINES} lines,"
        f" {MAX_KERNEL_PARAMETERS} run-time parameters, {MAX_KERNEL_FLAGS} boolean constexprs"
    ) in text
    assert "line-length = 100" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("python", "there"), [("true", True), ("false", False)])
def test_the_gpu_lane_is_spread_where_xdist_is_there(python: str, there: bool) -> None:
    """Command `true` imports whatever it is asked to, `false` nothing."""
    command = ["make", "-n", "gpu-test", f"GPU_PYTHON={python}", "JOBS=7", "TESTS=a_test.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    runs = [line for line in done.stdout.replace("\\\n", "").splitlines() if " -m pytest" in line]
    expressions = [re.findall(r"-m '?((?:not )?exclusive)", run) for run in runs]
    assert expressions == [["not exclusive"], ["exclusive"]]
    assert all("pytest a_test.py -q --lane gpu" in run for run in runs)
    assert [f" -n {n} " in run for n, run in zip((7, 1), runs, strict=True)] == [there, there]
    assert all(("--timeout" in run) is there for run in runs)


def test_names_of_test_files_are_unique() -> None:
    """Pytest imports a test by its bare name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
