"""Shapes, inputs, bytes and FLOPs of attention_pool for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal, patch_boundaries
from .op import attention_pool
from .reference import reference, terms, yardstick

MILLION = 1 << 20

CASES = (
    case("smoke", T=40, P=7, H=2, KV=2, K=16, query="shared", boundaries="ragged"),
    case("smoke", T=40, P=6, H=4, KV=2, K=8, query="own", boundaries="tail"),
    case("edge", T=48, P=14, H=3, KV=3, K=24, query="shared", boundaries="tail", scale=0.5),
    case("edge", T=90, P=1, H=3, KV=1, K=32, query="shared", boundaries="even"),
    case("edge", T=24, P=30, H=6, KV=2, K=40, query="own", boundaries="ragged", scale=-0.7),
    case("edge", T=36, P=3, H=2, KV=1, K=128, query="own", boundaries="even"),
    case("edge", "cancels", T=20, P=20, H=2, KV=1, K=16, query="own", boundaries="even"),
    case("edge", "cancels", T=20, P=20, H=2, KV=1, K=16, query="shared", boundaries="even"),
    case("edge", T=0, P=3, H=2, KV=1, K=16, query="own", boundaries="even"),
    case("edge", T=30, P=5, H=1, KV=1, K=16, query="shared", boundaries="hollow"),
    case("edge", T=17, P=0, H=1, KV=1, K=16, query="shared", boundaries="even"),
    case("long", T=10_003, P=4, H=2, KV=1, K=16, query="shared", boundaries="tail"),
    case("long", T=10_000, P=1, H=1, KV=1, K=16, query="own", boundaries="even"),
    case("aot", T=4096, P=680, H=8, KV=8, K=16, query="shared", boundaries="ragged"),
    case("aot", T=4096, P=680, H=8, KV=2, K=48, query="own", boundaries="ragged"),
    case("aot", T=4096, P=32, H=8, KV=8, K=128, query="shared", boundaries="ragged"),
    case("huge", T=17_000_000, P=2_833_333, H=4, KV=4, K=32, query="own", boundaries="even"),
    *(
        case(
            "bench" if width == 16 else "bench_full",
            T=MILLION,
            P=174_763,
            H=8,
            KV=8,
            K=width,
            query=query,
            boundaries="ragged",
        )
        for width, query in ((16, "shared"), (32, "shared"), (64, "own"))
    ),
    case("bench_full", T=MILLION, P=174_763, H=12, KV=4, K=64, query="shared", boundaries="ragged"),
    case("bench_full", T=MILLION, P=120_646, H=8, KV=8, K=16, query="shared", boundaries="words"),
    case("bench_full", T=MILLION, P=1024, H=8, KV=8, K=32, query="shared", boundaries="ragged"),
    *(
        case("bench_cpu", T=16_384, P=2731, H=8, KV=8, K=16, query=query, boundaries="ragged")
        for query in ("shared", "own")
    ),
    case("bench_cpu", T=8192, P=942, H=8, KV=8, K=16, query="shared", boundaries="words"),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of attention_pool; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    lead = () if case["query"] == "shared" else (case["P"],)
    shapes = {"query": (*lead, case["H"]), "key": (case["T"], case["KV"])}
    inputs: Inputs = {
        name: normal(*shape, case["K"], rng=rng, dtype=dtype, device=device)
        for name, shape in (shapes | {"value": shapes["key"]}).items()
    }
    boundaries = patch_boundaries(case["boundaries"], case["T"], case["P"], rng)
    return inputs | {"cu_patchlens": boundaries.to(device), "scale": case.get("scale")}


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """key and value once, and what each patch has; backward: these, and their gradients."""
    rows = 2 * case["T"] * case["KV"] * case["K"]
    by_patch = case["P"] * case["H"]
    own = by_patch * case["K"] if case["query"] == "own" else 0
    moved = rows + own + by_patch * case["K"]
    if direction != "fwd":
        moved += rows + own
    return dtype.itemsize * moved + 4 * by_patch + 4 * case["P"]


def flops(case: Case, direction: str) -> int:
    """Two products of every byte forward, five backward."""
    return (4 if direction == "fwd" else 10) * case["T"] * case["H"] * case["K"]


SPEC = OpSpec(
    name="attention_pool",
    op=attention_pool,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("query", "key", "value"),
    terms=terms,
    kernels=("attention_pool_fwd", "attention_pool_bwd"),
)
