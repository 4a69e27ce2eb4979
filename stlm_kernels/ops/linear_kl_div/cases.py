"""Shapes, inputs, bytes and FLOPs of linear_kl_div."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ..linear_logprobs import cases as rows
from .op import linear_kl_div
from .reference import reference, terms, yardstick

CASES = (
    case("smoke", N=50, D=48, V=256, reduction="mean"),
    case("smoke", N=40, D=32, V=60, reduction="none", masked=0.3, bias=1, temperature=2.0),
    case("edge", N=33, D=20, V=72, reduction="sum", valid=65, masked=0.2, cap=5.0, scale=0.5),
    case("edge", "cancels", N=9, D=24, V=1, reduction="sum"),
    case("edge", N=12, D=16, V=30, reduction="mean", masked=1.0, bias=1),
    case("edge", N=12, D=16, V=30, reduction="sum", masked=1.0),
    case("edge", N=0, D=16, V=26, reduction="none"),
    case("edge", N=36, D=40, V=64, reduction="mean", dense=1, temperature=0.5, ruled_out=0.4),
    case("edge", N=20, D=16, V=521, reduction="mean", masked=0.2, bias=1, temperature=2.0),
    case("edge", N=14, D=16, V=531, reduction="none", valid=530, cap=5.0, scale=0.5, ruled_out=0.4),
    case("bench", N=65_536, D=128, V=256, reduction="mean"),
    case("bench_cpu", N=4096, D=128, V=257, reduction="mean"),
    case("bench_cpu", N=512, D=256, V=8192, reduction="mean", temperature=2.0),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """The row losses' inputs; a teacher that is surer than the student, and often disagrees."""
    inputs = rows.make_inputs(case, dtype, device, seed)
    target = inputs.pop("target")
    rng = torch.Generator().manual_seed(seed + 1)
    valid = case.get("valid", case["V"])
    teacher = 2 * torch.randn(*target.shape, valid, generator=rng)
    teacher.scatter_add_(-1, target.cpu().long()[..., None], torch.full_like(teacher, 4.0))
    if "ruled_out" in case.sizes:
        teacher[torch.rand(teacher.shape, generator=rng) < case["ruled_out"]] = -torch.inf
    inputs["teacher_logits"] = teacher.to(device, dtype)
    if "masked" in case.sizes:
        kept = torch.rand(target.shape, generator=rng) >= case["masked"]
        inputs["mask"] = kept.to(device)
    return inputs | {
        "reduction": case["reduction"],
        "temperature": case.get("temperature", 1.0),
    }


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """The row losses' bytes, and the teacher once in each direction."""
    teacher = dtype.itemsize * case["N"] * case["V"]
    return rows.bytes_moved(case, dtype, direction) + teacher


SPEC = OpSpec(
    name="linear_kl_div",
    op=linear_kl_div,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=rows.flops,
    fp32_args=("linear_bias", "teacher_logits"),
    grad_args=rows.GRAD_ARGS,
    row_args=("linear_weight",),
    terms=terms,
)
