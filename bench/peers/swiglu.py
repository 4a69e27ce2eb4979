"""Peers of swiglu."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .entry import Entry, compiled


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


_COMPOSITION = Entry("F.rms_norm + F.linear + F.silu", _composition)
PEERS: dict[str, tuple[Entry, ...]] = {"swiglu": (_COMPOSITION, compiled(_COMPOSITION))}
