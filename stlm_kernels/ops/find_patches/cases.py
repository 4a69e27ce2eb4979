"""Shapes, inputs, bytes and FLOPs of find_patches for tests, benchmarks and tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import random_ids, text_bytes
from .op import find_patches
from .reference import reference

MILLION = 1 << 20

CASES = (
    # The first case is the one that is compiled: it needs static shapes, that is `max_patches`.
    case("smoke", T=300, how="space", S=4, max=7, C=120),
    case("smoke", T=200, how="patch_start_mask", S=3, C=30),
    case("edge", T=300, how="space"),
    case("edge", T=200, how="fixed", size=5, S=3, max=3, C=40),
    case("edge", T=200, how="patch_end_mask", S=3, C=60, ids="int64"),
    case("edge", T=97, how="patch_start_mask", max=4, ids="int16"),
    case("edge", T=97, how="patch_end_mask", max=1, S=5),
    case("edge", T=60, how="space", tail=20, S=2, ids="int32"),
    case("edge", T=60, how="fixed", size=100, max=100, C=1),
    case("edge", T=60, how="patch_end_mask", S=90, C=7),
    case("edge", T=1, how="patch_start_mask", C=3),
    case("edge", T=0, how="space", C=3),
    case("edge", T=0, how="space", S=2),
    *(
        case(
            "bench" if text == "english" else "bench_full",
            T=MILLION,
            how="space",
            max=16,
            S=128,
            C=MILLION // 2,
            text=text,
        )
        for text in ("english", "code", "uniform", "equal")
    ),
    case("bench", T=MILLION, how="patch_start_mask", max=16, S=128, C=MILLION // 2, text="english"),
    case("bench_full", T=MILLION, how="patch_end_mask", S=128, C=MILLION // 2, text="english"),
    case("bench_cpu", T=65_536, how="space", max=16, S=8, C=16_384, text="english"),
    case("bench_cpu", T=65_536, how="space", max=16, S=8, text="code"),
    *(
        case("bench_cpu", T=8192, how="space", max=16, S=8, C=8192, text=text)
        for text in ("uniform", "equal")
    ),
    # Small and large calls have other configurations.
    case("aot", T=MILLION, how="space", max=16, S=4, C=1024),
    case("aot", T=MILLION, how="fixed", size=6, S=4, C=1024),
    case("aot", T=MILLION, how="patch_end_mask", S=4, C=1024),
    case("aot", T=4096, how="patch_start_mask", max=16, S=4, C=1024),
    case("aot_full", T=4096, how="space", max=16, S=4, C=1024),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of find_patches; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    total, how = case["T"], case["how"]
    if "text" in case.sizes:
        ids = text_bytes(case["text"], total, rng)
    else:
        vocab = 256 if case.get("ids") is None else 260
        ids = random_ids(total, vocab, getattr(torch, case.get("ids", "uint8")), rng)
    inputs: Inputs = {"byte_ids": ids.to(device)}
    if how in ("patch_start_mask", "patch_end_mask"):
        inputs[how] = (torch.rand(total, generator=rng) < 0.2).to(device)
    else:
        inputs["rule"] = how
    if "S" in case.sizes:
        boundaries = _document_boundaries(case["S"], total - case.get("tail", 0), rng)
        inputs["cu_seqlens"] = boundaries.to(device)
    for name, key in (("patch_size", "size"), ("max_patch_len", "max"), ("max_patches", "C")):
        if key in case.sizes:
            inputs[name] = case[key]
    return inputs


def _document_boundaries(documents: int, end: int, rng: torch.Generator) -> Tensor:
    """(S+1,) int32; among many documents some are empty."""
    inner = torch.randint(0, end + 1, (documents - 1,), generator=rng).sort().values
    return torch.cat([torch.zeros(1), inner, torch.full((1,), end)]).int()


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Each id (or mask) once, two int32 results for each byte, and the offsets."""
    slots = case.get("C", case["T"] // 6)
    return 9 * case["T"] + 4 * slots


def flops(case: Case, direction: str) -> int:
    """Integers only."""
    return 0


SPEC = OpSpec(
    name="find_patches",
    op=find_patches,
    reference=reference,
    yardstick=reference,  # integers: there is no rounding to allow for
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    kernels=(
        "find_patches_blocks",
        "find_patches_carry",
        "find_patches_write",
    ),
)
