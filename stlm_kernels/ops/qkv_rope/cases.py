"""Shapes, inputs, bytes and FLOPs of qkv_rope for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal
from ..qk_norm_rope.cases import add_positions
from .op import qkv_rope
from .reference import reference, yardstick

CASES = (
    case("smoke", B=2, T=15, D=64, H=4, KV=2, K=32, norm="qk", gain="own"),
    case("smoke", T=70, D=96, H=2, KV=1, K=32, norm="qk", positions="packed"),
    case("edge", B=3, T=9, D=72, H=3, KV=1, K=48, norm="q", positions="packed", gain="own"),
    case("edge", B=2, T=11, D=64, H=1, KV=1, K=34, norm="k", positions="dense", residual="own"),
    case("edge", T=130, D=80, H=1, KV=1, K=64, norm="none"),
    case("edge", T=13, D=300, H=2, KV=1, K=128, norm="qk", eps=0.5),
    case("edge", T=0, D=64, H=2, KV=1, K=32, norm="qk", gain="own"),
    case("edge", B=0, T=5, D=64, H=2, KV=1, K=32, norm="q"),
    case("aot", T=4096, D=256, H=4, KV=4, K=64, norm="qk", positions="packed"),
    case("aot", T=4096, D=128, H=4, KV=2, K=32, norm="qk", gain="own"),
    case("aot_full", T=4096, D=512, H=8, KV=2, K=64, norm="qk", positions="packed"),
    case("aot_full", T=4096, D=768, H=12, KV=4, K=64, norm="none"),
    case("aot_full", T=4096, D=1024, H=8, KV=8, K=128, norm="qk"),
    case("bench", T=65_536, D=256, H=4, KV=4, K=64, norm="qk", positions="packed"),
    case("bench", T=65_536, D=128, H=4, KV=4, K=32, norm="qk", positions="packed"),
    case("bench_full", T=65_536, D=512, H=8, KV=8, K=64, norm="qk", positions="packed"),
    case("huge", T=4_200_000, D=128, H=8, KV=1, K=64, norm="qk", positions="packed"),
    case("bench_cpu", B=4, T=512, D=256, H=4, KV=4, K=64, norm="qk"),
    case("bench_cpu", T=2048, D=512, H=8, KV=2, K=64, norm="qk", positions="packed"),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of qkv_rope; norm weights and tables in fp32 beside a 16-bit x."""
    rng = torch.Generator().manual_seed(seed)
    width, dim, heads = case["K"], case["D"], case["H"] + 2 * case["KV"]
    lead = (case["B"], case["T"]) if "B" in case.sizes else (case["T"],)
    fine = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(heads * width, dim, generator=rng, dtype=torch.float64) * dim**-0.5
    inputs: Inputs = {
        "x": normal(*lead, dim, rng=rng, dtype=dtype, device=device),
        "norm_weight": None,
        "weight": weight.to(device, dtype),
    }
    if "gain" in case.sizes:
        gain = 1 + 0.5 * torch.randn(dim, generator=rng, dtype=torch.float64)
        inputs["norm_weight"] = gain.to(device, fine)
    add_positions(inputs, case, rng, fine, device)
    inputs |= {"heads": case["H"], "kv_heads": case["KV"], "eps": case.get("eps", 1e-6)}
    return inputs | ({"residual": True} if "residual" in case.sizes else {})


def rows(case: Case) -> int:
    return case.get("B", 1) * case["T"]


def columns(case: Case) -> int:
    return (case["H"] + 2 * case["KV"]) * case["K"]


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """x in, q, k and v out; backward: x and their gradients in, x's out. Weight and tables."""
    passes = 1 if direction == "fwd" else 2
    activations = rows(case) * (passes * case["D"] + columns(case))
    return dtype.itemsize * (activations + passes * columns(case) * case["D"])


def flops(case: Case, direction: str) -> int:
    """The product; backward its two gradients."""
    return (2 if direction == "fwd" else 4) * rows(case) * columns(case) * case["D"]


SPEC = OpSpec(
    name="qkv_rope",
    op=qkv_rope,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("x", "norm_weight", "weight", "q_weight", "k_weight"),
    fp32_args=("cos", "sin", "norm_weight", "q_weight", "k_weight"),
    kernels=("qkv_rope_fwd", "qkv_rope_bwd", "qkv_rope_bwd_norm"),
    mma_kernels=("qkv_rope_fwd",),
)
