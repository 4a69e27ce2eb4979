"""swiglu for judging the others: an fp64 reference, row by row, and plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    x: Tensor,  # (T, D) fp64
    norm_weight: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """One row after the other, by the formula."""
    hidden = down.shape[1]
    rows = []
    for row in x:
        normed = row / (row.square().mean() + eps).sqrt()
        if norm_weight is not None:
            normed = normed * norm_weight
        gate, up = gate_up[:hidden] @ normed, gate_up[hidden:] @ normed
        out = down @ (gate / (1 + (-gate).exp()) * up)
        rows.append(out + row if residual else out)
    return torch.stack(rows) if rows else x * 1


def yardstick(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Composition of plain torch ops: fp32 within each, its result in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = None if norm_weight is None else norm_weight.to(wide)
    normed = F.rms_norm(x.to(wide), x.shape[-1:], weight, eps).to(x.dtype)
    gate, up = F.linear(normed, gate_up.to(x.dtype)).chunk(2, -1)
    out = F.linear(F.silu(gate) * up, down.to(x.dtype))
    return x + out if residual else out
