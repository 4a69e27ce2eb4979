"""Shapes, inputs, bytes and FLOPs of swiglu for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal
from .op import swiglu
from .reference import reference, yardstick

CASES = (
    case("smoke", T=37, D=32, F=40, norm="weight"),
    case("smoke", T=23, D=48, F=33, norm="none", residual="none"),
    case("edge", T=5, D=20, F=7, norm="weight", residual="none", eps=0.5),
    case("edge", T=70, D=64, F=72, norm="none"),
    case("edge", T=1, D=16, F=1, norm="weight"),
    case("edge", T=9, D=130, F=20, norm="none"),
    case("edge", T=0, D=16, F=24, norm="weight"),
    case("aot", T=4096, D=256, F=768, norm="none"),
    case("aot", T=4096, D=128, F=340, norm="weight"),
    case("aot_full", T=4096, D=64, F=256, norm="none", residual="none"),
    case("huge", T=17_000_000, D=128, F=32, norm="none"),
    case("bench", T=65_536, D=256, F=768, norm="none"),
    case("bench", T=65_536, D=128, F=340, norm="weight"),
    case("bench_full", T=65_536, D=64, F=256, norm="none"),
    case("bench_cpu", T=2048, D=256, F=768, norm="none"),
    case("bench_cpu", T=2048, D=128, F=340, norm="weight"),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of swiglu, weights of a scale that keeps that of their input."""
    rng = torch.Generator().manual_seed(seed)
    width, hidden = case["D"], case["F"]

    def weight(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
        return (values * columns**-0.5).to(device, dtype)

    norm = None
    if case["norm"] == "weight":
        fine = torch.promote_types(dtype, torch.float32)
        norm = 1 + 0.5 * torch.randn(width, generator=rng, dtype=torch.float64)
        norm = norm.to(device, fine)
    return {
        "x": normal(case["T"], width, rng=rng, dtype=dtype, device=device),
        "norm_weight": norm,
        "gate_up": weight(2 * hidden, width),
        "down": weight(width, hidden),
        "residual": "residual" not in case.sizes,
        "eps": case.get("eps", 1e-6),
    }


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Rows in and out; backward: rows, upstream gradient and gradient. Weights once each way."""
    rows = (2 if direction == "fwd" else 3) * case["T"] * case["D"]
    weights = (1 if direction == "fwd" else 2) * 3 * case["D"] * case["F"]
    return dtype.itemsize * (rows + weights)


def flops(case: Case, direction: str) -> int:
    """Three products of rows and weights, twice as many backward."""
    return (6 if direction == "fwd" else 12) * case["T"] * case["D"] * case["F"]


SPEC = OpSpec(
    name="swiglu",
    op=swiglu,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("x", "norm_weight", "gate_up", "down"),
    fp32_args=("norm_weight",),
    kernels=("swiglu_pack", "swiglu_fwd", "swiglu_bwd_x", "swiglu_bwd_weights"),
    mma_kernels=("swiglu_fwd", "swiglu_bwd_x", "swiglu_bwd_weights"),
)
