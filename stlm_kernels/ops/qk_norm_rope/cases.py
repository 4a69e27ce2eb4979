"""Shapes, inputs, bytes and FLOPs of qk_norm_rope for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal
from .op import qk_norm_rope
from .reference import reference, yardstick

CASES = (
    case("smoke", B=2, T=15, H=4, KV=2, K=32, norm="qk"),
    case("smoke", T=23, H=2, KV=1, K=16, norm="qk", positions="packed", pairs="interleaved"),
    case("edge", B=3, T=9, H=3, KV=1, K=48, norm="q", positions="packed"),
    case("edge", B=2, T=11, H=1, KV=1, K=24, norm="k", positions="dense", pairs="interleaved"),
    case("edge", T=30, H=2, KV=2, K=2, norm="none"),
    case("edge", T=13, H=2, KV=1, K=128, norm="qk", eps=0.5),
    case("edge", T=0, H=2, KV=1, K=16, norm="qk"),
    case("edge", B=0, T=5, H=2, KV=1, K=16, norm="q"),
    case("aot", "bench_cpu", B=4, T=512, H=16, KV=4, K=32, norm="qk"),
    case("aot", T=4096, H=12, KV=4, K=64, norm="qk", positions="packed", pairs="interleaved"),
    case("aot", B=4, T=512, H=8, KV=8, K=128, norm="none"),
    case("huge", T=4_200_000, H=8, KV=1, K=64, norm="qk", positions="packed"),
    case("bench", B=24, T=512, H=16, KV=4, K=32, norm="qk"),
    case("bench_full", B=24, T=512, H=16, KV=4, K=32, norm="none", pairs="interleaved"),
    case("bench_full", B=16, T=512, H=16, KV=4, K=48, norm="qk"),
    case("bench_full", B=16, T=2048, H=12, KV=4, K=64, norm="qk"),
    case("bench", T=65_536, H=12, KV=4, K=64, norm="qk", positions="packed"),
    case("bench_cpu", T=2048, H=8, KV=2, K=64, norm="qk", positions="packed"),
)

DOCUMENT = 1000
"""Positions of a packed batch begin anew after so many."""


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of qk_norm_rope; weights and tables in fp32 beside 16-bit heads."""
    rng = torch.Generator().manual_seed(seed)
    length, width = case["T"], case["K"]
    lead = (case["B"], length) if "B" in case.sizes else (length,)
    inputs: Inputs = {
        name: normal(*lead, heads, width, rng=rng, dtype=dtype, device=device)
        for name, heads in (("q", case["H"]), ("k", case["KV"]))
    }
    add_positions(inputs, case, rng, torch.promote_types(dtype, torch.float32), device)
    return inputs | {"eps": case.get("eps", 1e-6), "interleaved": "pairs" in case.sizes}


def add_positions(
    inputs: Inputs, case: Case, rng: torch.Generator, dtype: torch.dtype, device: torch.device
) -> None:
    """Add what norm and rotation of heads take: tables, weights and positions of a case."""
    length, width = case["T"], case["K"]
    places = torch.arange(min(length, DOCUMENT) + 3, dtype=torch.float64)
    if "positions" not in case.sizes:
        places = torch.arange(length, dtype=torch.float64)
    angles = places[:, None] * 10_000.0 ** -(torch.arange(0, width, 2) / width)
    inputs |= {"cos": angles.cos().to(device, dtype), "sin": angles.sin().to(device, dtype)}
    for name in ("q", "k"):
        if name in case["norm"]:
            weight = 1 + 0.5 * torch.randn(width, generator=rng, dtype=torch.float64)
            inputs[f"{name}_weight"] = weight.to(device, dtype)
    if "positions" in case.sizes:
        where = torch.arange(length)
        if case["positions"] == "dense":  # each row begins elsewhere
            where = where + 2 * torch.arange(case["B"])[:, None]
        inputs["positions"] = (where % len(places)).to(device, torch.int32)


def elements(case: Case) -> int:
    return case.get("B", 1) * case["T"] * (case["H"] + case["KV"]) * case["K"]


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """q and k in and out; backward: these, the upstream gradients and the gradients. Tables."""
    passes = 2 if direction == "fwd" else 3
    return passes * dtype.itemsize * elements(case) + 4 * case["T"] * case["K"]


def flops(case: Case, direction: str) -> int:
    """Squares, scaling and rotation of each element; about twice that backward."""
    return (7 if direction == "fwd" else 14) * elements(case)


SPEC = OpSpec(
    name="qk_norm_rope",
    op=qk_norm_rope,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("q", "k", "q_weight", "k_weight"),
    fp32_args=("cos", "sin", "q_weight", "k_weight"),
    kernels=("qk_norm_rope_fwd", "qk_norm_rope_bwd"),
)
