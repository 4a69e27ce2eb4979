"""Every kernel compiled ahead of time for GPUs that are not here: resources and instructions.

These are the compiler's facts. They say nothing about speed, races or bf16 accuracy.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers.accepted_spills import OTHERS, PINNED, accepted

from stlm_kernels import _launch, env, inspect
from stlm_kernels.inspect import LIMITS, Report, inspect_op, merged, table
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

pytestmark = pytest.mark.lanes("aot")

MMA_OPCODE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SPILLS_ALLOWED = accepted(env.version_of("triton"))

KERNELS = {"sum_splits", *(name for spec in OPS.values() for name in spec.kernels)}
WITH_KERNELS = [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.kernels]


def dtypes(full: bool) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float32, *([torch.float16] if full else [])]


def takes_floats(spec: OpSpec) -> bool:
    """Return whether the dtype changes anything of what is compiled."""
    inputs = spec.make_inputs(spec.tagged("smoke")[0], torch.float32, torch.device("cpu"), 0)
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs.values())


SMALL_SHARED = (86, 120)
"""99 KB a block: RTX 30, A10; RTX 50. The code for sm_89 (RTX 40, L4) is that for sm_86."""


def archs(full: bool) -> list[int]:
    return [80, 90, 100] if full else [90]


def aot_cases(spec: OpSpec, full: bool) -> list[Case]:
    return spec.tagged("aot", *(["aot_full"] if full else []))


def assert_fits(report: Report) -> None:
    where = f"{report.kernel} sm_{report.arch} {report.config}"
    most, _ = SPILLS_ALLOWED.get((report.kernel, report.arch), (0, ""))
    spills = report.spill_instructions
    assert spills <= most, f"{where}: {spills} spills, {most} allowed"
    if most == 0:
        assert report.stack_bytes == 0, f"{where}: {report.stack_bytes} bytes of stack"
    assert_runs(report)


def assert_runs(report: Report) -> None:
    """A launch that asks for more shared memory than a block may have fails."""
    where = f"{report.kernel} sm_{report.arch} {report.case} {report.config}"
    assert report.shared_bytes <= LIMITS[report.arch].shared_per_block, where
    assert report.occupancy > 0, where


def shipped_calls(spec: OpSpec, full: bool) -> list[tuple[torch.dtype, Case]]:
    """Every case and every dtype; each pair of them in the long form alone."""
    first, *others = dtypes(full) if takes_floats(spec) else [torch.float32]
    cases = aot_cases(spec, full)
    return [*product([first], cases), *product(others, cases if full else cases[:1])]


@pytest.mark.parametrize("spec", WITH_KERNELS)
def test_shipped_configs_compile_and_fit(spec: OpSpec, full: bool) -> None:
    opcodes: dict[tuple[str, int, torch.dtype], set[str]] = {}
    for arch, (dtype, case) in product(archs(full), shipped_calls(spec, full)):
        on_matrix_units = bool(spec.mma_kernels) and dtype != torch.float32
        for report in inspect_op(spec, case, arch, dtype, disassemble=on_matrix_units):
            assert_fits(report)
            key = (report.kernel.removeprefix("stlm_"), arch, dtype)
            opcodes.setdefault(key, set()).update(report.mma.split("+"))
    for (name, arch, dtype), found in opcodes.items():
        if name in spec.mma_kernels and dtype != torch.float32:
            assert MMA_OPCODE[arch] in found, f"{name} runs on {found}"
    seen = {name for name, _, _ in opcodes}
    assert set(spec.kernels) <= seen, "the aot cases do not launch every kernel"


@pytest.mark.parametrize("spec", [p for p in WITH_KERNELS if takes_floats(p.values[0])])
def test_autocast_compiles_and_fits(spec: OpSpec, full: bool) -> None:
    """fp32 parameters beside bf16 activations: the way models are trained."""
    cases = aot_cases(spec, full)
    for arch, case in product(archs(full), cases if full else cases[-1:]):
        with torch.autocast("cpu", torch.bfloat16):
            for report in inspect_op(spec, case, arch, torch.float32, disassemble=False):
                assert_fits(report)


def calls_on_small_shared(spec: OpSpec, full: bool) -> Iterator[tuple[Case, torch.dtype, bool]]:
    """Yield (case, dtype, whether under autocast): all that are compiled, and at last each edge."""
    chosen = dtypes(full) if takes_floats(spec) else [torch.float32]
    for case in spec.tagged("aot", "aot_full") if full else spec.tagged("aot")[:1]:
        yield from ((case, dtype, False) for dtype in (chosen if full else chosen[:1]))
        if takes_floats(spec):
            yield case, torch.float32, True
    yield from ((case, chosen[0], False) for case in spec.tagged("edge") if full)


@pytest.mark.parametrize("spec", WITH_KERNELS)
def test_every_case_fits_small_shared_memory(spec: OpSpec, full: bool) -> None:
    for arch in SMALL_SHARED if full else SMALL_SHARED[:1]:
        for case, dtype, autocast in calls_on_small_shared(spec, full):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                reports = inspect_op(spec, case, arch, dtype, disassemble=False)
            for report in reports:
                assert_runs(report)
                if arch != 86:  # for whose registers no tile is sized
                    assert_fits(report)


def test_a_block_that_needs_more_than_a_small_gpu_has_is_caught() -> None:
    spec = OPS["decode_attention"]
    large = {"BLOCK": 128, "num_stages": 3}
    with _launch.overriding({"decode_attention_fwd": large}):
        reports = {
            arch: inspect_op(spec, spec.tagged("aot")[2], arch, disassemble=False)[0]
            for arch in (80, 86)
        }
    assert reports[80].shared_bytes > LIMITS[86].shared_per_block
    assert_runs(reports[80])
    with pytest.raises(AssertionError, match="sm_86"):
        assert_runs(reports[86])


def test_a_tile_too_large_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate can fail, and so can a bound: 16 K accumulators do not fit one warp."""
    large = {"BLOCK_V": 128, "BLOCK_P": 32, "BLOCK_D": 128, "PROGRAMS": 264, "num_warps": 1}
    spec = OPS["byte_pool"]
    with _launch.overriding({"byte_pool_bwd": large}):
        reports = inspect_op(spec, spec.tagged("aot")[0], 90, disassemble=False)
    backward = next(r for r in reports if r.kernel == "stlm_byte_pool_bwd")
    assert backward.spill_instructions > 0
    with pytest.raises(AssertionError, match=r"\d spills, \d+ allowed"):
        assert_fits(backward)
    key, spills = (backward.kernel, 90), backward.spill_instructions
    monkeypatch.setitem(SPILLS_ALLOWED, key, (spills, "as many as there are"))
    assert_fits(backward)
    monkeypatch.setitem(SPILLS_ALLOWED, key, (spills - 1, "one less"))
    with pytest.raises(AssertionError, match=f"{spills} spills, {spills - 1} allowed"):
        assert_fits(backward)


def test_all_but_the_opcodes_comes_without_disassembling() -> None:
    spec = OPS["byte_pool"]
    every, fewer = (
        inspect_op(spec, spec.tagged("aot")[0], 90, disassemble=choice) for choice in (True, False)
    )
    assert {r.mma for r in every} >= {"HGMMA", "-"}
    assert all(r.sass for r in every)
    assert fewer == [replace(r, mma="", mma_count=0, sass="") for r in every]


@pytest.mark.lanes("cpu", "aot")
def test_accepted_spills_are_bounded_for_every_release() -> None:
    """A release that was not tried is held to the pinned one's, and so is what a later has less."""
    for release, bounds in OTHERS.items():
        assert accepted(f"{release}.0") == accepted(f"{release}.7+git1") == PINNED | bounds
    for bounds in (PINNED, *OTHERS.values()):
        for (kernel, arch), (most, why) in bounds.items():
            assert kernel.removeprefix("stlm_") in KERNELS
            assert arch in (*archs(full=True), *SMALL_SHARED)
            assert 0 < most < 1000
            assert why
    assert accepted("3.7.1") == accepted("3.90.0") == PINNED


def test_the_table_names_every_op_of_a_shared_kernel() -> None:
    spec = OPS["byte_pool"]
    reports = inspect_op(spec, spec.tagged("aot")[0], 90)
    one = next(r for r in reports if r.kernel == "stlm_sum_splits")
    (row,) = merged([one, replace(one, ops=("another_op",))])
    assert row.ops == ("another_op", "byte_pool")
    assert "another_op,byte_pool" in table([row])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "stlm_kernels.inspect", "byte_pool", "--arch", "90"]
    done = subprocess.run([*command, "--dump", "ptx"], capture_output=True, text=True, check=True)
    assert "stlm_byte_pool_bwd" in done.stdout
    assert "HGMMA" in done.stdout
    assert ".version" in done.stdout
    with pytest.raises(SystemExit, match="2"):
        inspect.main(["no_such_op"])
    assert "no_such_op" in capsys.readouterr().err
