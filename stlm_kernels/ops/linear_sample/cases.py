"""Shapes, inputs, bytes and FLOPs of linear_sample.

What is drawn can be compared with a reference where only one id can be drawn: temperature 0, or
top_k 1, which runs everything that a real draw runs. The draws are judged in the op's own tests.
"""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import normal
from .op import linear_sample
from .reference import reference, yardstick

CASES = (
    case("smoke", N=20, D=48, V=256, k=1, p=0.9),
    case("smoke", N=35, D=32, V=258, t=0.0, bias=1, cap=5.0, scale=0.5),
    case("edge", N=33, D=100, V=320, valid=257, t=0.0),
    case("edge", N=12, D=16, V=512, k=1, t=0.7),
    case("edge", N=40, D=8, V=60, t=0.0, ints=1),
    case("edge", N=40, D=8, V=60, k=1, ints=1),
    case("edge", N=17, D=31, V=100, bias=1, k=1, cap=9.0, seed="tensor"),
    case("edge", N=9, D=24, V=1),
    case("edge", N=0, D=16, V=260, t=0.0),
    case("edge", N=36, D=40, V=264, dense=1, scale=2.0, k=1, p=0.5),
    case("huge", N=17_000_000, D=128, V=256, t=0.0),
    case("aot", N=64, D=128, V=256),
    case("aot", N=64, D=512, V=258, bias=1, k=50, p=0.9),
    case("bench", N=64, D=512, V=256, k=1, p=0.9, seed="tensor"),
    *(case("bench_full", N=n, D=512, V=256, k=1, p=0.9, seed="tensor") for n in (1, 4096)),
    case("bench_full", "bench_cpu", N=64, D=512, V=256, t=0.0, seed="tensor"),
    case("bench", "bench_cpu", N=64, D=512, V=50257, t=0.0, seed="tensor"),
    # So cold that one id of the fifty has almost all the mass in every row.
    case("bench_cpu", N=64, D=512, V=256, k=50, p=0.9, t=0.01, seed="tensor"),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments with one likely id in each row; `ints`: small integers, so exact ties."""
    rng = torch.Generator().manual_seed(seed)
    rows, width, vocab = case["N"], case["D"], case["V"]
    valid = case.get("valid", vocab)
    weight = torch.randn(vocab, width, generator=rng)
    likely = torch.randint(0, valid, (rows,), generator=rng)
    # A weight's own signs over its width give a logit of about 0.8 x 8, beside noise of size 1.
    noise = normal(rows, width, rng=rng, dtype=weight.dtype, device=device) / width**0.5
    hidden = noise + 8.0 / width * weight.sign().to(device)[likely.to(device)]
    if "ints" in case.sizes:
        weight, hidden = weight.sign(), hidden.sign()
    shape = (4, rows // 4) if "dense" in case.sizes else (rows,)
    noise_seed = 1234 + seed
    inputs: Inputs = {
        "input": hidden.view(*shape, width).to(device, dtype),
        "linear_weight": weight.to(device, dtype),
        "temperature": case.get("t", 1.0),
        "top_k": case.get("k"),
        "top_p": case.get("p"),
        "seed": torch.tensor(noise_seed, device=device) if "seed" in case.sizes else noise_seed,
        "softcap": case.get("cap"),
        "logit_scale": case.get("scale", 1.0),
        "valid_vocab": case.get("valid"),
    }
    if "bias" in case.sizes:
        inputs["linear_bias"] = torch.randn(vocab, generator=rng).to(device, dtype)
    return inputs


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Hidden states and table once, an id for each row."""
    return dtype.itemsize * (case["N"] + case["V"]) * case["D"] + 8 * case["N"]


def flops(case: Case, direction: str) -> int:
    """One product."""
    return 2 * case["N"] * case["D"] * case["V"]


SPEC = OpSpec(
    name="linear_sample",
    op=linear_sample,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    fp32_args=("linear_bias",),
    kernels=("linear_sample_fwd",),
    mma_kernels=("linear_sample_fwd",),
)
