"""Shapes, inputs, bytes and FLOPs of decode_attention for tests, benchmarks and tuning."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal
from .op import decode_attention
from .reference import reference, yardstick

CASES = (
    case("smoke", B=3, C=70, H=4, KV=2, K=16, lens="ragged"),
    case("smoke", B=2, C=300, H=2, KV=1, K=24, lens="full", window=130),
    case("edge", B=2, C=40, H=1, KV=1, K=48, lens="ragged", window=1),
    case("edge", B=3, C=33, H=3, KV=3, K=16, lens="ragged", window=40, scale=-0.3, cap=1.5),
    case("edge", B=1, C=131, H=70, KV=1, K=32, lens="full", cap=50.0),
    case("edge", B=2, C=20, H=2, KV=2, K=128, lens="full", scale=0.0),
    case("edge", B=2, C=0, H=2, KV=1, K=16, lens="full"),
    case("edge", B=0, C=9, H=2, KV=1, K=16, lens="full"),
    case("long", B=3, C=5000, H=4, KV=2, K=32, lens="ragged"),
    case("aot", B=2, C=2048, H=16, KV=4, K=32, lens="full"),
    case("aot", B=64, C=256, H=16, KV=4, K=48, lens="full", window=128),
    case("aot", B=2, C=2048, H=8, KV=1, K=128, lens="full", cap=30.0),
    case("huge", B=33, C=131_072, H=16, KV=8, K=64, lens="full", window=2048),
    case("bench_full", B=1, C=512, H=16, KV=4, K=32, lens="full"),
    case("bench", B=1, C=2048, H=16, KV=4, K=64, lens="full"),
    case("bench_full", B=1, C=8192, H=16, KV=4, K=64, lens="full", window=256),
    *(case("bench_full", B=8, C=length, H=16, KV=4, K=64, lens="full") for length in (2048, 8192)),
    case("bench_full", B=64, C=512, H=16, KV=4, K=32, lens="full"),
    case("bench", B=64, C=2048, H=16, KV=4, K=64, lens="full"),
    case("bench_full", B=64, C=8192, H=16, KV=4, K=64, lens="full"),
    case("bench", B=64, C=8192, H=16, KV=4, K=64, lens="ragged"),
    case("bench_cpu", B=1, C=4096, H=16, KV=4, K=64, lens="full"),
    case("bench_cpu", B=8, C=1024, H=16, KV=4, K=32, lens="ragged"),
)


def lengths(case: Case) -> list[int]:
    """Full caches, or every length from 0 to C in equal steps."""
    batch, capacity = case["B"], case["C"]
    if case["lens"] == "full":
        return [capacity] * batch
    return [i * capacity // max(1, batch - 1) for i in range(batch)]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of decode_attention; on the CPU first, so that every device sees the same values.

    Another seed moves the lengths among the sequences.
    """
    rng = torch.Generator().manual_seed(seed)
    cache = (case["B"], case["C"], case["KV"], case["K"])
    inputs: Inputs = {
        name: normal(*shape, rng=rng, dtype=dtype, device=device)
        for name, shape in (
            ("q", (case["B"], case["H"], case["K"])),
            ("k_cache", cache),
            ("v_cache", cache),
        )
    }
    lens = torch.tensor(lengths(case), dtype=torch.int32).roll(seed)
    return inputs | {
        "cache_lens": lens.to(device),
        "window": case.get("window"),
        "scale": case.get("scale"),
        "softcap": case.get("cap"),
    }


def seen(case: Case) -> int:
    """Entries of all caches that any query sees."""
    return sum(min(length, case.get("window", length)) for length in lengths(case))


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Both caches as far as they are seen, q, the result, the lengths."""
    rows = 2 * seen(case) * case["KV"] + 2 * case["B"] * case["H"]
    return dtype.itemsize * rows * case["K"] + 4 * case["B"]


def flops(case: Case, direction: str) -> int:
    """Two products."""
    return 4 * seen(case) * case["H"] * case["K"]


SPEC = OpSpec(
    name="decode_attention",
    op=decode_attention,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    kernels=("decode_attention_fwd", "decode_attention_combine"),
)
