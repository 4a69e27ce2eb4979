"""qk_norm_rope in aten ops, which torch differentiates any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._rounding import rounded


def qk_norm_rope(
    q: Tensor,  # (N, H, K)
    k: Tensor,  # (N, H_kv, K)
    cos: Tensor,  # (n_positions, K/2)
    sin: Tensor,  # (n_positions, K/2)
    q_weight: Tensor | None,  # (K,)
    k_weight: Tensor | None,  # (K,)
    positions: Tensor | None,  # (period,)
    period: int,
    eps: float,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both in `out_dtype`; row n stands at positions[n % period], without positions at that."""
    wide = torch.promote_types(out_dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        cos, sin = (_rows_of(x.to(wide), positions, period) for x in (cos, sin))
        heads = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            x = rounded(x, out_dtype, wide).unflatten(0, (-1, max(1, period)))
            if weight is not None:
                x = F.rms_norm(x, x.shape[-1:], weight.to(wide), eps)
            heads.append(_turned(x, cos, sin, interleaved).flatten(0, 1).to(out_dtype))
    return heads[0], heads[1]


def _rows_of(table: Tensor, positions: Tensor | None, period: int) -> Tensor:
    """(period, 1, K/2) for each position in turn; NaN for one out of range."""
    if positions is None:
        return table[:period, None]
    places = positions.long()
    inside = (places >= 0) & (places < table.shape[0])
    rows = torch.cat([table, torch.full_like(table[:1], torch.nan)])
    return rows.index_select(0, torch.where(inside, places, table.shape[0]))[:, None]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x * cos + partner * (-sin, sin), whose few passes over x are all contiguous."""
    if interleaved:
        cos, sin = (torch.stack(pair, -1).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        partner = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, partner, sin)
