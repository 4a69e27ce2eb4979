"""Shapes, inputs, bytes and FLOPs of byte_pool for tests, benchmarks, tuning and inspection."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import patch_boundaries, random_ids, text_bytes
from .op import byte_pool
from .reference import reference, yardstick

MILLION = 1 << 20

CASES = (
    case("smoke", T=200, P=40, V=256, D=48, mode="mean", boundaries="ragged"),
    case("smoke", T=130, P=24, V=257, D=96, mode="sum", boundaries="ragged", ids="int16"),
    case("edge", T=120, P=24, V=320, D=100, mode="mean", boundaries="tail", ids="int32"),
    case("edge", T=40, P=40, V=512, D=1, mode="mean", boundaries="even", ids="int64"),
    case("edge", T=20, P=6, V=384, D=1024, mode="sum", boundaries="ragged", ids="int16"),
    case("edge", T=300, P=2, V=256, D=24, mode="mean", boundaries="ragged"),
    case("edge", T=270, P=1, V=130, D=16, mode="sum", boundaries="even"),
    case("edge", T=50, P=20, V=256, D=32, mode="mean", boundaries="hollow"),
    case("edge", T=0, P=3, V=256, D=32, mode="mean", boundaries="even"),
    case("edge", T=17, P=0, V=256, D=32, mode="sum", boundaries="even"),
    case("long", T=10_003, P=4, V=256, D=32, mode="mean", boundaries="tail"),
    case("smoke", T=120, P=20, V=256, D=48, mode="mean", boundaries="ragged", L=4),
    case("edge", T=90, P=30, V=257, D=20, mode="sum", boundaries="tail", L=1),
    case("edge", T=60, P=9, V=256, D=16, mode="mean", boundaries="ragged", L=40),
    case("aot", T=4096, P=680, V=256, D=768, mode="mean", boundaries="ragged"),
    case("aot", T=4096, P=680, V=257, D=128, mode="mean", boundaries="ragged", ids="int32"),
    case("aot", T=4096, P=680, V=320, D=128, mode="mean", boundaries="ragged", L=16),
    case("huge", T=MILLION * 6, P=2_900_000, V=256, D=768, mode="mean", boundaries="even"),
    *(
        case(
            "bench" if text in ("english", "uniform") else "bench_full",
            T=MILLION,
            P=174_763,
            V=256,
            D=width,
            mode="mean",
            boundaries="even",
            text=text,
        )
        for width in (768, 128)
        for text in ("english", "code", "uniform", "equal")
    ),
    *(
        case(
            "bench" if (text, width) == ("english", 128) else "bench_full",
            T=MILLION,
            P=120_646,
            V=256,
            D=width,
            mode="mean",
            boundaries="words",
            text=text,
        )
        for width in (768, 128)
        for text in ("english", "code")
    ),
    case(
        "bench_full",
        T=MILLION,
        P=120_646,
        V=257,
        D=128,
        mode="mean",
        boundaries="words",
        text="english",
        ids="int16",
    ),
    *(
        case(
            "bench_full",
            T=MILLION,
            P=patches,
            V=256,
            D=128,
            mode="mean",
            boundaries=boundaries,
            text="english",
        )
        for patches, boundaries in ((1, "even"), (60_324, "hot"))
    ),
    *(
        case("bench_cpu", T=65_536, P=10_923, V=256, D=128, mode=mode, boundaries="even", text=text)
        for mode, text in (
            ("mean", "english"),
            ("sum", "english"),
            ("mean", "code"),
            ("mean", "uniform"),
            ("mean", "equal"),
        )
    ),
    *(
        case("bench_cpu", T=65_536, P=7536, V=256, D=128, mode=mode, boundaries="words", text=text)
        for mode, text in (("mean", "english"), ("sum", "english"), ("mean", "code"))
    ),
    case("bench_cpu", T=8192, P=942, V=320, D=512, mode="mean", boundaries="words", text="english"),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of byte_pool; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    total, width = case["T"], case["D"]
    id_dtype = getattr(torch, case.get("ids", "uint8"))
    if "text" in case.sizes:
        ids = text_bytes(case["text"], total, rng).to(id_dtype)
    else:
        ids = random_ids(total, min(case["V"], 256) if id_dtype == torch.uint8 else case["V"],
                         id_dtype, rng)  # fmt: skip
    inputs: Inputs = {
        "byte_ids": ids.to(device),
        "weight": torch.randn(case["V"], width, generator=rng).to(device, dtype),
        "cu_patchlens": patch_boundaries(case["boundaries"], total, case["P"], rng).to(device),
        "mode": case["mode"],
    }
    if "L" in case.sizes:
        gain = 1 + torch.randn(case["L"], width, generator=rng) / 2
        inputs["position_weight"] = gain.to(device, dtype)
    return inputs


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Each id, boundary and patch row once; backward also writes the fp32-sized table gradient."""
    size = dtype.itemsize
    patch_rows = case["T"] + 4 * case["P"] + size * case["P"] * case["D"]
    table = case["V"] * case["D"]
    return patch_rows + (size if direction == "fwd" else 4) * table


def flops(case: Case, direction: str) -> int:
    """One addition for each byte and column; backward is the count product."""
    if direction == "fwd":
        return case["T"] * case["D"]
    return 2 * case["P"] * case["V"] * case["D"]


SPEC = OpSpec(
    name="byte_pool",
    op=byte_pool,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("weight", "position_weight"),
    row_args=("weight",),
    kernels=(
        "byte_pool_fwd",
        "byte_pool_fwd_product",
        "byte_pool_bwd",
        "byte_pool_bwd_gain_table",
        "byte_pool_bwd_gain_slots",
    ),
    mma_kernels=("byte_pool_fwd_product", "byte_pool_bwd", "byte_pool_bwd_gain_table"),
)
