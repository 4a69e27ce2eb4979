"""Peers of swiglu."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case

from .entry import Entry, compiled
from .installed import function_of, on_gpu, why_missing


def _composition(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    residual: bool,
    eps: float,
) -> Tensor:
    weight = None if norm_weight is None else norm_weight.to(x.dtype)
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], weight, eps), gate_up).chunk(2, -1)
    out = F.linear(F.silu(gate) * up, down)
    return x + out if residual else out


_NORM = ("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
_GATE = ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")


def _liger(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    residual: bool,
    eps: float,
) -> Tensor:
    """Call Liger's norm and gate between torch's products, by the functions of its modules."""
    weight = None if norm_weight is None else norm_weight.to(x.dtype)
    normed = function_of(*_NORM).apply(x, weight, eps, 0.0, "llama", False)
    gate, up = (F.linear(normed, each) for each in gate_up.chunk(2))
    out = F.linear(function_of(*_GATE).apply(gate, up), down)
    return x + out if residual else out


def _without_liger(case: Case) -> str | None:
    return why_missing(*_NORM) or why_missing(*_GATE) or on_gpu(case)


_COMPOSITION = Entry("F.rms_norm + F.linear + F.silu", _composition)
PEERS: dict[str, tuple[Entry, ...]] = {
    "swiglu": (
        _COMPOSITION,
        compiled(_COMPOSITION),
        Entry("Liger", _liger, unsupported=_without_liger),
    )
}
