"""Shapes, inputs, bytes and FLOPs of segment_pool for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal, patch_boundaries
from .op import MODES, segment_pool
from .reference import reference, yardstick

MILLION = 1 << 20

CASES = (
    *(case("smoke", T=300, P=50, D=48, mode=mode, boundaries="ragged") for mode in MODES),
    *(case("edge", T=90, P=30, D=20, mode=mode, boundaries="tail") for mode in MODES),
    *(case("edge", T=0, P=3, D=8, mode=mode, boundaries="even") for mode in MODES),
    *(case("edge", T=30, P=5, D=8, mode=mode, boundaries="hollow") for mode in MODES),
    *(
        case("edge", T=17, P=0, D=8, mode=mode, boundaries="even")
        for mode in ("sum", "max", "last")
    ),
    *(case("edge", T=700, P=2, D=20, mode=mode, boundaries="ragged") for mode in ("max", "min")),
    *(case("edge", T=700, P=1, D=100, mode=mode, boundaries="even") for mode in ("mean", "max")),
    case("edge", T=130, P=130, D=1, mode="mean", boundaries="even"),
    *(case("edge", T=20, P=6, D=1024, mode=mode, boundaries="ragged") for mode in ("mean", "max")),
    *(case("long", T=10_003, P=4, D=32, mode=mode, boundaries="tail") for mode in ("mean", "max")),
    *(
        case("aot", T=4096, P=680, D=768, mode=mode, boundaries="ragged")
        for mode in ("mean", "max", "min")
    ),
    case("huge", T=3 * MILLION, P=524_288, D=768, mode="mean", boundaries="even"),
    *(
        case(
            "bench" if mode == "mean" else "bench_full",
            T=MILLION,
            P=174_763,
            D=width,
            mode=mode,
            boundaries="even",
        )
        for width in (768, 128)
        for mode in ("mean", "max")
    ),
    *(
        case("bench_full", T=MILLION, P=120_646, D=768, mode=mode, boundaries="words")
        for mode in ("mean", "max")
    ),
    *(
        case("bench_cpu", T=65_536, P=10_923, D=128, mode=mode, boundaries="ragged")
        for mode in MODES
    ),
    *(
        case("bench_cpu", T=8192, P=942, D=256, mode=mode, boundaries="words")
        for mode in ("mean", "max")
    ),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of segment_pool; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    x = normal(case["T"], case["D"], rng=rng, dtype=dtype, device=device)
    boundaries = patch_boundaries(case["boundaries"], case["T"], case["P"], rng)
    return {
        "x": x,
        "cu_patchlens": boundaries.to(device),
        "mode": case["mode"],
    }


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Each row of x (or of its gradient) and of the result once, and the boundaries."""
    return dtype.itemsize * (case["T"] + case["P"]) * case["D"] + 4 * case["P"]


def flops(case: Case, direction: str) -> int:
    """One addition or comparison for each element of x."""
    return case["T"] * case["D"] if case["mode"] in ("mean", "sum", "max", "min") else 0


def exact(case: Case) -> frozenset[str]:
    """Selections copy values."""
    return frozenset({"out"} if case["mode"] in ("max", "min", "first", "last") else ())


SPEC = OpSpec(
    name="segment_pool",
    op=segment_pool,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("x",),
    exact=exact,
    kernels=("segment_sum", "segment_pool_pick", "segment_pool_bwd"),
)
