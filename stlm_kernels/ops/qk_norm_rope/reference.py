"""qk_norm_rope for judging the others: an fp64 reference in complex numbers, and plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q: Tensor,  # (..., T, H, K) fp64
    k: Tensor,  # (..., T, H_kv, K) fp64
    cos: Tensor,  # (n_positions, K/2) fp64
    sin: Tensor,  # (n_positions, K/2) fp64
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each pair a + ib times cos + i sin, one position after the other."""
    length, half = q.shape[-3], q.shape[-1] // 2
    own = torch.arange(length) if positions is None else positions
    where = own.expand(q.shape[:-2]).flatten().tolist()
    first = torch.arange(half) * (2 if interleaved else 1)
    second = first + (1 if interleaved else half)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        rows = []
        for row, position in zip(x.reshape(-1, *x.shape[-2:]), where, strict=True):
            if weight is not None:
                row = row / (row.square().mean(-1, keepdim=True) + eps).sqrt() * weight
            pairs = torch.complex(row[:, first], row[:, second])
            pairs = pairs * torch.complex(cos[position], sin[position])
            out = torch.zeros_like(row).index_copy(1, first, pairs.real)
            rows.append(out.index_copy(1, second, pairs.imag))
        return torch.stack(rows).view(x.shape) if rows else x * 1

    return turned(q, q_weight), turned(k, k_weight)


def yardstick(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Careful composition of plain torch ops: float32 inside, rotation by a swapped copy."""
    wide = torch.promote_types(q.dtype, torch.float32)
    where = torch.arange(q.shape[-3], device=q.device) if positions is None else positions.long()
    repeat = (lambda x: x.repeat_interleave(2, -1)) if interleaved else lambda x: x.repeat(1, 2)
    c, s = (repeat(x.to(wide))[where][..., None, :] for x in (cos, sin))

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x.to(wide)
        if weight is not None:
            y = F.rms_norm(y, y.shape[-1:], weight.to(wide), eps)
        if interleaved:
            a, b = y[..., 0::2], y[..., 1::2]
            swapped = torch.stack([-b, a], -1).flatten(-2)
        else:
            a, b = y.chunk(2, -1)
            swapped = torch.cat([-b, a], -1)
        return (y * c + swapped * s).to(x.dtype)

    return turned(q, q_weight), turned(k, k_weight)
