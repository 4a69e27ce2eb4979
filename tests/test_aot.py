"""Every kernel compiled ahead of time for GPUs that are not here: resources and instructions.

These are the compiler's facts. They say nothing about speed, races or bf16 accuracy.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch

from stlm_kernels import _launch
from stlm_kernels._spec import Case, OpSpec
from stlm_kernels.inspect import LIMITS, Report, inspect_op, merged, table
from stlm_kernels.registry import OPS

pytestmark = pytest.mark.lanes("aot")

MMA_OPCODE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
READS_TWICE = (
    "half the default's rows have few or none, but read the table twice as often on sm_90, "
    "for which it is sized"
)
SIZED_FOR_90 = "the default tile fills the registers of sm_90; no other was tried on this device"
FP32 = "in fp32 alone, which no matrix unit serves"
SPILLS_ALLOWED: dict[tuple[str, int], tuple[int, str]] = {
    ("stlm_byte_pool_bwd", 100): (11, FP32),
    ("stlm_ema_unpool_fwd", 100): (2, "8 bytes; the default tile is sized for sm_90"),
    ("stlm_attention_fwd", 80): (12, FP32),
    ("stlm_attention_bwd_q", 80): (27, SIZED_FOR_90),
    ("stlm_attention_bwd_q", 100): (4, SIZED_FOR_90),
    ("stlm_attention_bwd_kv", 80): (29, SIZED_FOR_90),
    ("stlm_attention_bwd_kv", 100): (23, SIZED_FOR_90),
    ("stlm_patch_attention_bwd_q", 80): (
        97,
        "at K = 128; tiles of 32 rows have none, but a Hopper product takes 64",
    ),
    ("stlm_patch_attention_bwd_q", 100): (4, FP32),
    ("stlm_patch_attention_bwd_kv", 100): (28, SIZED_FOR_90),
    ("stlm_qk_norm_rope_bwd", 80): (6, "8 bytes, interleaved in fp32; the tile suits sm_90"),
    ("stlm_qk_norm_rope_bwd", 100): (3, "8 bytes, at K = 32; the tile suits sm_90"),
    ("stlm_decode_attention_fwd", 80): (
        2,
        "8 bytes, at K = 48; half the tile has none, but more rounds on every device",
    ),
    ("stlm_linear_logprobs_fwd", 100): (732, READS_TWICE),
    ("stlm_linear_logprobs_bwd_rows", 80): (36, READS_TWICE),
    ("stlm_linear_logprobs_bwd_rows", 90): (10, FP32),
    ("stlm_linear_logprobs_bwd_rows", 100): (167, READS_TWICE),
    ("stlm_linear_logprobs_bwd_weight", 80): (
        2,
        "8 bytes, under autocast; the default tile is sized for sm_90",
    ),
}
"""(kernel, architecture) -> the most spill instructions in any case and dtype of triton 3.6.0 and
the pinned one, and the written reason why they are accepted."""

WITH_KERNELS = [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.kernels]


def dtypes(full: bool) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float32, *([torch.float16] if full else [])]


def takes_floats(spec: OpSpec) -> bool:
    """Whether the dtype changes anything of what is compiled."""
    inputs = spec.make_inputs(spec.tagged("smoke")[0], torch.float32, torch.device("cpu"), 0)
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs.values())


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
    assert report.shared_bytes <= LIMITS[report.arch].shared_per_block, where
    assert report.occupancy > 0, where


@pytest.mark.parametrize("spec", WITH_KERNELS)
def test_shipped_configs_compile_and_fit(spec: OpSpec, full: bool) -> None:
    opcodes: dict[tuple[str, int, torch.dtype], set[str]] = {}
    chosen = dtypes(full) if takes_floats(spec) else [torch.float32]
    for arch, dtype, case in product(archs(full), chosen, aot_cases(spec, full)):
        for report in inspect_op(spec, case, arch, dtype):
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
    for arch, case in product(archs(full), aot_cases(spec, full)):
        with torch.autocast("cpu", torch.bfloat16):
            for report in inspect_op(spec, case, arch, torch.float32):
                assert_fits(report)


@pytest.mark.parametrize("spec", WITH_KERNELS)
def test_default_configs_fit_small_shared_memory(spec: OpSpec) -> None:
    """99 KB a block: RTX 30, 40 and 50, A10, L4."""
    for report in inspect_op(spec, spec.tagged("aot")[0], 89):
        assert_fits(report)


def test_a_tile_too_large_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate can fail, and so can a bound: 16 K accumulators do not fit one warp."""
    large = {"BLOCK_V": 128, "BLOCK_P": 32, "BLOCK_D": 128, "PROGRAMS": 264, "num_warps": 1}
    spec = OPS["byte_pool"]
    with _launch.overriding({"byte_pool_bwd": large}):
        reports = inspect_op(spec, spec.tagged("aot")[0], 90)
    backward = next(r for r in reports if r.kernel == "stlm_byte_pool_bwd")
    assert backward.spill_instructions > 0
    with pytest.raises(AssertionError, match="0 allowed"):
        assert_fits(backward)
    key, spills = (backward.kernel, 90), backward.spill_instructions
    monkeypatch.setitem(SPILLS_ALLOWED, key, (spills, "as many as there are"))
    assert_fits(backward)
    monkeypatch.setitem(SPILLS_ALLOWED, key, (spills - 1, "one less"))
    with pytest.raises(AssertionError, match=f"{spills} spills, {spills - 1} allowed"):
        assert_fits(backward)


def test_the_table_names_every_op_of_a_shared_kernel() -> None:
    spec = OPS["byte_pool"]
    reports = inspect_op(spec, spec.tagged("aot")[0], 90)
    one = next(r for r in reports if r.kernel == "stlm_sum_splits")
    (row,) = merged([one, replace(one, ops=("another_op",))])
    assert row.ops == ("another_op", "byte_pool")
    assert "another_op,byte_pool" in table([row])


def test_the_command() -> None:
    command = [sys.executable, "-m", "stlm_kernels.inspect", "byte_pool", "--arch", "90"]
    done = subprocess.run([*command, "--dump", "ptx"], capture_output=True, text=True, check=True)
    assert "stlm_byte_pool_bwd" in done.stdout
    assert "HGMMA" in done.stdout
    assert ".version" in done.stdout
    unknown = subprocess.run([*command, "no_such_op"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "no_such_op" in unknown.stderr
