"""Shapes, inputs, bytes and FLOPs of unpool for tests, benchmarks and tuning."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal, patch_boundaries
from .op import unpool
from .reference import reference, yardstick

MILLION = 1 << 20

CASES = (
    case("smoke", T=300, P=50, D=48, S=4, boundaries="ragged", plus="null+residual"),
    case("smoke", T=300, P=50, D=48, S=1, boundaries="ragged", plus="nothing"),
    case("edge", T=90, P=30, D=20, S=5, boundaries="tail", plus="null"),
    case("edge", T=90, P=30, D=100, S=3, boundaries="tail", plus="residual", ids="int64"),
    case("edge", T=130, P=130, D=1, S=2, boundaries="even", plus="null+residual", ids="int16"),
    case("edge", T=50, P=1, D=24, S=1, boundaries="even", plus="null"),
    case("edge", T=20, P=6, D=1024, S=2, boundaries="ragged", plus="null+residual"),
    case("edge", T=40, P=4, D=8, S=1, boundaries="hollow", plus="null+residual"),
    case("edge", T=17, P=0, D=8, S=1, boundaries="even", plus="null+residual"),
    case("edge", T=17, P=0, D=8, S=1, boundaries="even", plus="nothing"),
    case("edge", T=0, P=3, D=8, S=1, boundaries="even", plus="null+residual"),
    case("long", T=10_003, P=4, D=32, S=2, boundaries="tail", plus="null+residual"),
    case("aot", T=4096, P=680, D=768, S=4, boundaries="ragged", plus="null+residual"),
    case("huge", T=3 * MILLION, P=524_288, D=768, S=128, boundaries="even", plus="residual"),
    *(
        case(
            "bench_full" if plus == "nothing" else "bench",
            T=MILLION,
            P=174_763,
            D=width,
            S=128,
            boundaries="even",
            plus=plus,
        )
        for width in (768, 128)
        for plus in ("nothing", "null+residual")
    ),
    case(
        "bench_full", T=MILLION, P=120_646, D=768, S=128, boundaries="words", plus="null+residual"
    ),
    *(
        case("bench_cpu", T=65_536, P=10_923, D=128, S=8, boundaries="ragged", plus=plus)
        for plus in ("nothing", "null+residual")
    ),
    case("bench_cpu", T=8192, P=942, D=256, S=8, boundaries="words", plus="null+residual"),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of unpool; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    total, patches, width = case["T"], case["P"], case["D"]
    boundaries = patch_boundaries(case["boundaries"], total, patches, rng)
    read_ids = _read_ids(boundaries, total, case["S"], rng)
    draw = functools.partial(normal, rng=rng, dtype=dtype, device=device)
    inputs: Inputs = {
        "patch_states": draw(patches, width),
        "read_ids": read_ids.to(device, getattr(torch, case.get("ids", "int32"))),
    }
    if "null" in case["plus"]:
        inputs["null_state"] = draw(width)
    if "residual" in case["plus"]:
        inputs["residual"] = draw(total, width)
    return inputs


def _read_ids(boundaries: Tensor, total: int, documents: int, rng: torch.Generator) -> Tensor:
    """(T,) int32: each byte reads the patch before its own, if that is in the same document."""
    patches = len(boundaries) - 1
    first_patches = torch.randint(0, patches + 1, (documents,), generator=rng)
    before = torch.arange(-1, patches - 1)
    before = torch.where(torch.isin(before + 1, first_patches), -1, before)
    reads = before.repeat_interleave(boundaries.diff())
    return torch.cat([reads, reads.new_full((total - len(reads),), -1)]).int()


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Each row of the result (or of its gradient), the patches and ids once; residual if added."""
    passes = 2 if direction == "fwd" and "residual" in case["plus"] else 1
    elements = (passes * case["T"] + case["P"]) * case["D"]
    return dtype.itemsize * elements + 4 * case["T"]


def flops(case: Case, direction: str) -> int:
    """The residual's addition, or the sum of the gradient's rows."""
    adds = direction != "fwd" or "residual" in case["plus"]
    return case["T"] * case["D"] if adds else 0


def exact(case: Case) -> frozenset[str]:
    """A gather copies values."""
    return frozenset(() if "residual" in case["plus"] else {"out"})


SPEC = OpSpec(
    name="unpool",
    op=unpool,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=("patch_states", "null_state", "residual"),
    exact=exact,
    kernels=("unpool_fwd", "unpool_runs", "segment_sum", "unpool_bwd_null"),
)
