"""Cases of linear_cross_entropy: those of the row losses, with reductions and options."""

from __future__ import annotations

import torch

from ...spec import Case, Inputs, OpSpec, case
from ..linear_logprobs import cases as rows
from .op import linear_cross_entropy
from .reference import reference, terms, yardstick

CASES = (
    case("smoke", N=50, D=48, V=256, reduction="mean"),
    case("smoke", N=70, D=32, V=258, reduction="sum", ignored=0.3, bias=1, smoothing=0.1),
    case("smoke", N=40, D=32, V=260, reduction="none", ignored=0.2, z=1e-3, cap=5.0, scale=0.5),
    case("smoke", N=45, D=32, V=258, reduction="mean", weights=1, smoothing=0.1, lse=1),
    case("edge", N=33, D=100, V=320, reduction="mean", valid=257, ids="int16", smoothing=1.0),
    case("edge", N=20, D=31, V=100, reduction="mean", ids="uint8", bias=1, z=0.1),
    case("edge", "cancels", N=9, D=24, V=1, reduction="sum"),
    case("edge", N=12, D=16, V=300, reduction="mean", ignored=1.0, bias=1),
    case("edge", N=12, D=16, V=300, reduction="sum", ignored=1.0),
    case("edge", N=0, D=16, V=260, reduction="none"),
    case("edge", N=36, D=40, V=264, reduction="none", dense=1, smoothing=0.2),
    case("edge", "gpu", N=20, D=31, V=1000, reduction="mean", ignored=0.2, bias=1, smoothing=0.1),
    case("edge", N=12, D=16, V=520, reduction="sum", valid=515, cap=5.0, scale=0.5, ids="int16"),
    case("edge", N=12, D=16, V=515, reduction="none", dense=1, smoothing=0.2, z=0.1),
    case("edge", N=12, D=16, V=600, reduction="mean", ignored=1.0),
    case("edge", N=0, D=16, V=600, reduction="sum"),
    case("edge", N=30, D=20, V=100, reduction="mean", weights=1, ignored=0.3, z=1e-2),
    case("edge", N=30, D=20, V=320, reduction="sum", weights=1, valid=257, smoothing=0.3, bias=1),
    case("edge", N=28, D=20, V=60, reduction="none", dense=1, weights=1, smoothing=1.0, cap=5.0),
    case("edge", N=20, D=20, V=70, reduction="sum", lse=1, ignored=0.3),
    case("edge", "gpu", N=20, D=31, V=1000, reduction="mean", ignored=0.2, weights=1, z=0.1, lse=1),
    case("edge", N=12, D=16, V=520, reduction="sum", valid=515, weights=1, smoothing=0.2, cap=5.0),
    case("edge", N=12, D=16, V=515, reduction="none", dense=1, weights=1, smoothing=0.2, lse=1),
    case("edge", N=12, D=16, V=600, reduction="mean", ignored=1.0, weights=1, lse=1),
    case("edge", N=0, D=16, V=600, reduction="mean", weights=1, smoothing=0.1, lse=1),
    case("edge", N=0, D=16, V=60, reduction="none", weights=1, smoothing=0.1, lse=1),
    case("aot", N=512, D=128, V=256, reduction="mean"),
    case("aot", N=16, D=32, V=50_257, reduction="mean", bias=1),
    case("aot", N=512, D=128, V=258, reduction="mean", weights=1, smoothing=0.1),
    case("aot", N=16, D=32, V=50_257, reduction="mean", weights=1, smoothing=0.1),
    case("bench", N=65_536, D=128, V=256, reduction="mean"),
    case("bench_full", N=98_304, D=128, V=258, reduction="mean"),
    case("bench_full", N=98_304, D=128, V=257, reduction="mean", weights=1, smoothing=0.1, lse=1),
    case("bench_full", N=65_536, D=512, V=256, reduction="mean"),
    case("bench_full", N=65_536, D=768, V=50_257, reduction="mean"),
    case("bench", N=12_288, D=512, V=50_257, reduction="mean"),
    case("bench_full", N=12_288, D=512, V=50_257, reduction="none"),
    case("bench_cpu", N=8192, D=128, V=257, reduction="mean"),
    case("bench_cpu", N=4096, D=512, V=256, reduction="mean"),
    case("bench_cpu", N=8192, D=128, V=257, reduction="mean", weights=1, smoothing=0.1, lse=1),
    case("bench_cpu", N=512, D=256, V=8192, reduction="mean"),
    case("bench_cpu", N=384, D=64, V=50_257, reduction="mean"),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """The row losses' inputs with this op's own options; class weights from 0 to 2."""
    own: Inputs = {
        "reduction": case["reduction"],
        "label_smoothing": case.get("smoothing", 0.0),
        "z_loss": case.get("z", 0.0),
        "return_lse": bool(case.get("lse", 0)),
    }
    if "weights" in case.sizes:
        rng = torch.Generator().manual_seed(seed + 1)
        own["weight"] = (2 * torch.rand(case["V"], generator=rng)).to(device, dtype)
    return rows.make_inputs(case, dtype, device, seed) | own


SPEC = OpSpec(
    name="linear_cross_entropy",
    op=linear_cross_entropy,
    reference=reference,
    yardstick=yardstick,
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=rows.bytes_moved,
    flops=rows.flops,
    fp32_args=("linear_bias", "weight"),
    grad_args=rows.GRAD_ARGS,
    row_args=("linear_weight",),
    terms=terms,
    kernels=(*rows.KERNELS, "linear_logprobs_mean", "linear_logprobs_bwd"),
    mma_kernels=(*rows.MMA_KERNELS, "linear_logprobs_bwd"),
)
