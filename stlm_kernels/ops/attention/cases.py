"""Shapes, inputs, bytes and FLOPs of attention for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal, patch_boundaries
from .op import attention, pairs_seen
from .reference import reference, terms, yardstick

CASES = (
    case("smoke", B=2, T=70, H=2, KV=1, K=16),
    case("smoke", T=75, S=4, H=2, KV=2, K=48, W=20, boundaries="tail"),
    case("smoke", B=2, T=20, TK=90, H=2, KV=1, K=16),
    case("smoke", T=50, S=4, TK=130, H=2, KV=1, K=16, W=30, boundaries="tail"),
    case("edge", B=2, T=70, H=2, KV=1, K=16, left=20, right=9),
    case("edge", T=90, S=4, TK=150, H=2, KV=1, K=16, left=-1, right=3, boundaries="tail"),
    case("edge", B=1, T=1, TK=77, H=2, KV=2, K=32),
    case("edge", B=2, T=3, TK=40, H=1, KV=1, K=16, W=5),
    case("edge", B=2, T=0, TK=9, H=2, KV=1, K=16),
    case("edge", B=9, T=13, H=2, KV=1, K=16),
    case("edge", "cancels", T=150, H=1, KV=1, K=16, W=1),
    case("edge", T=200, H=1, KV=1, K=32, W=70, scale=0.5),
    case("edge", T=40, S=60, H=3, KV=1, K=16, boundaries="ragged", scale=0.7),
    case("edge", T=65, H=1, KV=1, K=64, scale=-0.1),
    case("edge", T=36, S=2, H=2, KV=1, K=128, boundaries="even"),
    case("edge", T=0, S=3, H=2, KV=1, K=16, boundaries="even"),
    case("edge", B=0, T=5, H=1, KV=1, K=16),
    case("edge", T=30, S=5, H=1, KV=1, K=16, boundaries="hollow"),
    case("long", T=1501, H=2, KV=1, K=16, W=100, S=4, boundaries="tail"),
    case("long", T=603, S=2, H=2, KV=1, K=16, boundaries="tail"),
    case("aot", B=8, T=512, H=16, KV=4, K=48),
    case("aot", T=4096, S=8, H=8, KV=8, K=64, W=128, boundaries="ragged"),
    case("aot_full", B=8, T=512, H=16, KV=4, K=16),
    case("aot_full", B=8, T=2048, H=16, KV=4, K=32),
    case("aot_full", T=4096, S=8, H=16, KV=4, K=48, boundaries="ragged"),
    case("aot_full", T=4096, S=8, H=8, KV=2, K=128, W=128, boundaries="ragged"),
    case("huge", B=68, T=250_000, H=4, KV=4, K=32, W=64),
    case("bench", B=24, T=512, H=16, KV=4, K=32),
    case("bench_full", B=16, T=512, H=16, KV=4, K=48),
    case("bench_full", B=16, T=2048, H=12, KV=4, K=64),
    case("bench_full", B=32, T=2048, H=6, KV=6, K=128),
    case("bench_full", B=4, T=8192, H=16, KV=4, K=32),
    case("bench_full", B=4, T=8192, H=12, KV=4, K=64),
    case("bench", B=8, T=8192, H=8, KV=8, K=64, W=256),
    *(case("bench_full", B=8, T=8192, H=8, KV=8, K=64, W=window) for window in (128, 512, 1024)),
    *(case("bench_full", B=8, T=8192, H=16, KV=4, K=32, W=window) for window in (128, 256)),
    case("bench", B=8, T=512, TK=4096, H=16, KV=4, K=64),
    case("bench_full", B=32, T=8, TK=4096, H=16, KV=4, K=64),
    case("bench_full", B=8, T=8192, H=8, KV=8, K=64, left=128, right=128),
    case("bench", T=65_536, S=100, H=8, KV=8, K=64, W=512, boundaries="ragged"),
    case("bench_full", T=65_536, S=8, H=8, KV=2, K=64, boundaries="ragged"),
    case("bench_cpu", B=4, T=256, H=8, KV=2, K=32),
    case("bench_cpu", T=1024, S=6, H=8, KV=2, K=32, boundaries="ragged"),
    case("bench_cpu", T=20_480, S=400, H=2, KV=1, K=16, boundaries="ragged"),
    case("bench_cpu", B=1, T=1024, H=8, KV=2, K=32, W=64),
    case("bench_cpu", B=4, T=64, TK=1024, H=8, KV=2, K=32),
    case("bench_cpu", T=512, S=16, TK=4096, H=8, KV=2, K=32, boundaries="ragged"),
    case("bench_cpu", B=1, T=1024, H=8, KV=2, K=32, left=32, right=32),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of attention; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    batch = (case["B"],) if "B" in case.sizes else ()
    sizes = (
        ("q", case["T"], case["H"]),
        ("k", _keys(case), case["KV"]),
        ("v", _keys(case), case["KV"]),
    )
    inputs: Inputs = {
        name: normal(*batch, length, heads, case["K"], rng=rng, dtype=dtype, device=device)
        for name, length, heads in sizes
    }
    if "S" in case.sizes:
        boundaries = patch_boundaries(case["boundaries"], case["T"], case["S"], rng)
        inputs["cu_seqlens"] = boundaries.to(device)
        if "TK" in case.sizes:  # what each document has beside its rows
            more = patch_boundaries(case["boundaries"], case["TK"] - case["T"], case["S"], rng)
            inputs["cu_seqlens_k"] = (boundaries + more).to(device)
    window = case.get("W")
    if "left" in case.sizes:
        inputs["causal"], window = False, (case["left"], case["right"])
    return inputs | {"window": window, "scale": case.get("scale")}


def _keys(case: Case) -> int:
    """Rows of k and v, of a sequence or of all documents."""
    length: int = case.get("TK", case["T"])
    return length


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """q, k, v and the result once; backward: these, the upstream gradient, three gradients."""
    batch = case.get("B", 1) * case["K"]
    query, key = batch * case["T"] * case["H"], batch * _keys(case) * case["KV"]
    return dtype.itemsize * ((2 if direction == "fwd" else 4) * (query + key))


def flops(case: Case, direction: str) -> int:
    """Two products forward, five backward, over what rows see in documents of equal size."""
    documents = max(1, case.get("S", 1))
    length, keys = (x // documents for x in (case["T"], _keys(case)))
    left, right = case.get("W", keys) - 1, 0
    if "left" in case.sizes:
        left, right = (keys if x < 0 else x for x in (case["left"], case["right"]))
    pairs = case.get("B", 1) * documents * pairs_seen(length, keys, left, right)
    return (4 if direction == "fwd" else 10) * pairs * case["H"] * case["K"]


MMA_KERNELS = ("attention_fwd", "attention_bwd_q", "attention_bwd_kv")

SPEC = OpSpec(
    name="attention",
    op=attention,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("q", "k", "v"),
    terms=terms,
    kernels=("row_bounds", *MMA_KERNELS),
    mma_kernels=MMA_KERNELS,
)
