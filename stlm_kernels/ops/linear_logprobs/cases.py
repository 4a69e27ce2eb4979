"""Shapes, inputs, bytes and FLOPs of the row losses, for both ops that stand on them."""

from __future__ import annotations

from typing import Any

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal
from .op import linear_logprobs
from .reference import reference, terms, yardstick

EDGE_CASES = (
    case("smoke", N=50, D=48, V=256),
    case("smoke", N=70, D=32, V=258, ignored=0.3, bias=1, cap=5.0, scale=0.5),
    case("edge", N=33, D=100, V=320, valid=257, ids="int16", ignored=0.2),
    case("edge", N=40, D=16, V=512, ids="int32"),
    case("edge", N=20, D=31, V=100, ids="uint8", bias=1),
    case("edge", "cancels", N=9, D=24, V=1),
    case("edge", N=17, D=8, V=5, cap=2.0),
    case("edge", N=12, D=16, V=300, ignored=1.0, bias=1),
    case("edge", N=0, D=16, V=260),
    case("edge", N=36, D=40, V=264, dense=1, scale=2.0),
    case("edge", "gpu", N=14, D=24, V=515, ids="int32", ignored=0.2, bias=1, cap=5.0, scale=0.5),
    case("edge", N=0, D=16, V=1000),
    case("aot", N=512, D=128, V=256),
    case("aot", N=16, D=32, V=50_257),
    case("aot", N=512, D=512, V=258, ignored=0.1, bias=1),
)

CASES = (
    *EDGE_CASES,
    case("huge", N=17_000_000, D=128, V=256),
    case("bench", N=65_536, D=128, V=256),
    case("bench_full", N=98_304, D=128, V=258),
    case("bench_full", N=65_536, D=512, V=256),
    case("bench_full", N=12_288, D=512, V=50_257),
    case("bench_cpu", N=8192, D=128, V=257),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments with peaked rows: half the hidden states point at their target's weight."""
    rng = torch.Generator().manual_seed(seed)
    rows, width, vocab = case["N"], case["D"], case["V"]
    valid = case.get("valid", vocab)
    weight = torch.randn(vocab, width, generator=rng)
    id_dtype = getattr(torch, case.get("ids", "int64"))
    target = torch.randint(0, valid, (rows,), generator=rng)
    # A weight's own signs over its width give a logit of about 0.8 x 8, beside noise of size 1.
    peak = torch.where(torch.rand(rows, 1, generator=rng) < 0.5, 8.0 / width, 0.0)
    noise = normal(rows, width, rng=rng, dtype=weight.dtype, device=device) / width**0.5
    hidden = noise + peak.to(device) * weight.sign().to(device)[target.to(device)]
    if "ignored" in case.sizes:
        target[torch.rand(rows, generator=rng) < case["ignored"]] = -100
    shape = (4, rows // 4) if "dense" in case.sizes else (rows,)
    inputs: dict[str, Any] = {
        "input": hidden.view(*shape, width).to(device, dtype),
        "linear_weight": weight.to(device, dtype),
        "target": target.to(id_dtype).view(shape).to(device),
        "softcap": case.get("cap"),
        "logit_scale": case.get("scale", 1.0),
        "valid_vocab": case.get("valid"),
    }
    if "bias" in case.sizes:
        inputs["linear_bias"] = torch.randn(vocab, generator=rng).to(device, dtype)
    return inputs


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Hidden states and table once, a target and two results for each row; gradients once."""
    size = dtype.itemsize
    operands = size * (case["N"] * case["D"] + case["V"] * case["D"])
    return (operands if direction == "fwd" else 2 * operands) + 16 * case["N"]


def flops(case: Case, direction: str) -> int:
    """One product forward, two backward."""
    product = 2 * case["N"] * case["D"] * case["V"]
    return product if direction == "fwd" else 2 * product


GRAD_ARGS = ("input", "linear_weight", "linear_bias")
MMA_KERNELS = ("linear_logprobs_fwd", "linear_logprobs_dlogits", "linear_logprobs_bwd_weight")
KERNELS = (*MMA_KERNELS, "linear_logprobs_chunk")

SPEC = OpSpec(
    name="linear_logprobs",
    op=linear_logprobs,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    fp32_args=("linear_bias",),
    grad_args=GRAD_ARGS,
    row_args=("linear_weight",),
    terms=terms,
    kernels=KERNELS,
    mma_kernels=MMA_KERNELS,
)
