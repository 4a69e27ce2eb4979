"""Shapes, inputs, bytes and FLOPs of patch_attention for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal, patch_boundaries
from .op import patch_attention
from .reference import reference, terms, yardstick

CASES = (
    case("smoke", T=72, P=11, H=2, KV=2, K=16, boundaries="ragged"),
    case("smoke", T=75, P=7, H=2, KV=1, K=32, boundaries="tail", causal=1),
    case("edge", T=80, P=2, H=1, KV=1, K=24, boundaries="ragged", scale=0.5),
    case("edge", T=100, P=1, H=1, KV=1, K=48, boundaries="even"),
    case("edge", T=120, P=1, H=1, KV=1, K=16, boundaries="even", causal=1),
    case("edge", "cancels", T=70, P=70, H=1, KV=1, K=16, boundaries="even"),
    case("edge", T=40, P=90, H=3, KV=1, K=16, boundaries="ragged", causal=1, scale=0.7),
    case("edge", T=36, P=3, H=4, KV=2, K=128, boundaries="even"),
    case("edge", T=0, P=3, H=2, KV=1, K=16, boundaries="even"),
    case("edge", T=30, P=5, H=1, KV=1, K=16, boundaries="hollow"),
    case("edge", T=17, P=0, H=1, KV=1, K=16, boundaries="even", causal=1),
    case("long", T=4003, P=4, H=2, KV=1, K=16, boundaries="tail"),
    case("long", T=1003, P=2, H=2, KV=1, K=16, boundaries="tail", causal=1),
    case("aot", T=4096, P=512, H=8, KV=8, K=16, boundaries="ragged"),
    case("aot", T=4096, P=16, H=8, KV=8, K=16, boundaries="ragged"),
    case("aot", T=4096, P=512, H=16, KV=4, K=48, boundaries="ragged", causal=1),
    case("aot", T=4096, P=512, H=8, KV=2, K=128, boundaries="ragged", causal=1),
    case("huge", T=17_000_000, P=1_416_667, H=4, KV=4, K=32, boundaries="even"),
    *(
        case(
            "bench" if causal == 0 else "bench_full",
            T=98_304,
            P=8192,
            H=8,
            KV=8,
            K=width,
            boundaries="even",
            causal=causal,
        )
        for width in (16, 32)
        for causal in (0, 1)
    ),
    case("bench_full", T=262_144, P=30_161, H=8, KV=8, K=32, boundaries="words"),
    case("bench_full", T=262_144, P=43_691, H=8, KV=8, K=64, boundaries="ragged"),
    case("bench_full", T=262_144, P=16_384, H=8, KV=8, K=32, boundaries="even"),
    case("bench_full", T=65_536, P=8, H=8, KV=2, K=64, boundaries="ragged", causal=1),
    *(
        case("bench_cpu", T=total, P=total // 12, H=8, KV=8, K=16, boundaries=boundaries)
        for total, boundaries in ((12_288, "even"), (4096, "ragged"))  # its peers pad: slow
    ),
    *(
        case("bench_cpu", T=8192, P=942, H=8, KV=8, K=16, boundaries="words", causal=causal)
        for causal in (0, 1)
    ),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of patch_attention; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    inputs: Inputs = {
        name: normal(case["T"], heads, case["K"], rng=rng, dtype=dtype, device=device)
        for name, heads in (("q", case["H"]), ("k", case["KV"]), ("v", case["KV"]))
    }
    boundaries = patch_boundaries(case["boundaries"], case["T"], case["P"], rng)
    return inputs | {
        "cu_patchlens": boundaries.to(device),
        "causal": bool(case.get("causal", 0)),
        "scale": case.get("scale"),
    }


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """q, k, v and the result once; backward: these, the upstream gradient, three gradients."""
    query, key = (case["T"] * case[heads] * case["K"] for heads in ("H", "KV"))
    rows = 2 * query + 2 * key if direction == "fwd" else 4 * query + 4 * key
    return dtype.itemsize * rows + 4 * case["P"]


def flops(case: Case, direction: str) -> int:
    """Two products forward, five backward, over pairs of bytes in patches of equal length."""
    pairs = case["T"] ** 2 // max(1, case["P"]) // (2 if case.get("causal", 0) else 1)
    return (4 if direction == "fwd" else 10) * pairs * case["H"] * case["K"]


LONG = ("patch_attention_fwd", "patch_attention_bwd_q", "patch_attention_bwd_kv")
"""Kernels of 64 rows at a time, the least of a Hopper product; those of short patches take 32."""
SHORT = ("patch_attention_short_fwd", "patch_attention_short_bwd")

SPEC = OpSpec(
    name="patch_attention",
    op=patch_attention,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("q", "k", "v"),
    terms=terms,
    kernels=("row_bounds", *LONG, *SHORT),
    mma_kernels=LONG,
)
