"""Shapes, inputs, bytes and FLOPs of ema_unpool for tests, benchmarks and tuning."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal, patch_boundaries
from .op import ema_unpool
from .reference import reference, yardstick

MILLION = 1 << 20

CASES = (
    case("smoke", T=120, P=40, D=20, S=3, boundaries="ragged", gates="router", plus="residual"),
    case("smoke", T=60, P=50, D=36, S=1, boundaries="ragged", gates="any", plus="nothing"),
    case("edge", T=90, P=60, D=100, S=4, boundaries="tail", gates="edges", plus="residual"),
    case("edge", T=60, P=60, D=1, S=2, boundaries="even", gates="tiny", plus="nothing",
         ids="int16"),
    case("edge", T=50, P=1, D=24, S=1, boundaries="even", gates="any", plus="nothing", ids="int64"),
    case("edge", T=20, P=6, D=1024, S=2, boundaries="ragged", gates="any", plus="residual"),
    case("edge", T=40, P=4, D=8, S=1, boundaries="hollow", gates="edges", plus="residual"),
    case("edge", T=17, P=0, D=8, S=1, boundaries="even", gates="any", plus="residual"),
    case("edge", T=0, P=3, D=8, S=2, boundaries="even", gates="any", plus="residual"),
    case("long", T=1500, P=500, D=96, S=2, boundaries="ragged", gates="tiny", plus="residual"),
    case("aot", T=4096, P=680, D=768, S=4, boundaries="ragged", gates="router", plus="residual"),
    case(
        "huge", T=3 * MILLION, P=524_288, D=768, S=128, boundaries="even", gates="router",
        plus="residual",
    ),
    *(
        case("bench" if (width, plus) == (128, "residual") else "bench_full",
             T=MILLION, P=174_763, D=width, S=128, boundaries="even", gates="router", plus=plus)
        for width in (768, 128)
        for plus in ("nothing", "residual")
    ),
    case("bench_full", T=MILLION, P=120_646, D=768, S=128, boundaries="words", gates="router",
         plus="residual"),
    case("bench_full", T=256, P=42, D=128, S=2, boundaries="even", gates="router", plus="residual"),
    *(
        case("bench_cpu", T=32_768, P=5461, D=128, S=8, boundaries="ragged", gates="router",
             plus=plus)
        for plus in ("nothing", "residual")
    ),
)  # fmt: skip


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of ema_unpool; on the CPU first, so that every device sees the same values."""
    rng = torch.Generator().manual_seed(seed)
    total, patches, width, documents = case["T"], case["P"], case["D"], case["S"]
    lengths = patch_boundaries(case["boundaries"], total, patches, rng).diff()
    ends = torch.randint(0, patches + 1, (documents,), generator=rng).sort().values
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    end = patches if documents == 1 else int(ends[-1])  # slots from there on are unused
    draw = functools.partial(normal, rng=rng, dtype=dtype, device=device)

    gate_dtype = torch.float32 if case["gates"] == "tiny" and dtype.itemsize == 2 else dtype
    inputs: Inputs = {
        "patch_states": draw(patches, width),
        "gate": _gates(case["gates"], patches, rng).to(device, gate_dtype),
        "read_ids": _read_ids(lengths, total, end).to(
            device, getattr(torch, case.get("ids", "int32"))
        ),
    }
    if documents > 1:
        inputs["cu_seqlens"] = cu_seqlens.to(device)
    if "residual" in case["plus"]:
        inputs["residual"] = draw(total, width)
    return inputs


def _gates(kind: str, patches: int, rng: torch.Generator) -> Tensor:
    """(P,) float64.

    "router": those of boundaries, from 1/2 on; "any": between 0 and 1; "edges": half of them
    exactly 0 or 1; "tiny": below 1e-3, but for the first of all.
    """
    uniform = torch.rand(patches, generator=rng, dtype=torch.float64)
    if kind == "router":
        return 0.5 + 0.49 * uniform
    if kind == "edges":
        choice = torch.randint(0, 4, (patches,), generator=rng)
        return torch.where(choice < 2, choice.double(), uniform)
    if kind == "tiny":
        return torch.cat([uniform[:1], 1e-3 * uniform[1:]])
    return 0.01 + 0.98 * uniform


def _read_ids(lengths: Tensor, total: int, end: int) -> Tensor:
    """(T,) int32: each byte reads its own patch, as with "first" pooling, if that is in use."""
    reads = torch.arange(len(lengths)).repeat_interleave(lengths)
    reads = torch.cat([reads, reads.new_full((total - len(reads),), -1)])
    return torch.where(reads < end, reads, -1).int()


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Each row of the result (or of its gradient), the patches (backward: two gradients), ids."""
    passes = 2 if direction == "fwd" and "residual" in case["plus"] else 1
    states = 1 if direction == "fwd" else 2
    elements = (passes * case["T"] + states * case["P"]) * case["D"]
    return dtype.itemsize * elements + 4 * (case["T"] + case["P"])


def flops(case: Case, direction: str) -> int:
    """Three for a state and one for a residual; backward a sum of rows and nine for a state."""
    adds = direction != "fwd" or "residual" in case["plus"]
    states = 3 if direction == "fwd" else 9
    return (states * case["P"] + (case["T"] if adds else 0)) * case["D"]


SPEC = OpSpec(
    name="ema_unpool",
    op=ema_unpool,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    fp32_args=("gate",),
    grad_args=("patch_states", "gate", "residual"),
    kernels=(
        "ema_unpool_links", "ema_unpool_smooth", "unpool_fwd", "unpool_runs", "segment_sum",
        "ema_unpool_bwd",
    ),
)  # fmt: skip
