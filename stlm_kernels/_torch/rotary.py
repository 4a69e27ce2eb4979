"""Norm and rotation of heads in aten ops: whole tensors, or chunk by chunk for a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .casting import cast

CHUNK_ELEMENTS = 1 << 18
"""Turned at a time on a CPU, 1 MB in fp32: the passes over them stay in a cache."""


def table_rows(table: Tensor, positions: Tensor | None, period: int) -> Tensor:
    """(period, 1, K/2) for each position in turn; NaN for one out of range."""
    if positions is None:
        return table[:period, None]
    places = positions.long()
    inside = (places >= 0) & (places < table.shape[0])
    rows = torch.cat([table, torch.full_like(table[:1], torch.nan)])
    return rows.index_select(0, torch.where(inside, places, table.shape[0]))[:, None]


def by_column(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(period, 1, K) each: a column turns to column * cos + partner * sin."""
    if interleaved:
        cos, sin = (torch.stack(pair, -1).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
        return cos, sin
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def partner(x: Tensor, interleaved: bool) -> Tensor:
    """The other column of each pair."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)


def turned(
    x: Tensor,  # (..., H, K)
    weight: Tensor | None,  # (K,)
    cos: Tensor,  # (..., 1, K) fp32 or fp64
    sin: Tensor,  # (..., 1, K)
    eps: float,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """(..., H, K), by ops that torch differentiates any number of times."""
    x = cast(x, out_dtype, cos.dtype)
    if weight is not None:
        x = F.rms_norm(x, x.shape[-1:], weight.to(cos.dtype), eps)
    return torch.addcmul(x * cos, partner(x, interleaved), sin).to(out_dtype)


def weighted(
    cos: Tensor, sin: Tensor, weight: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Tables with a norm's weight folded in, for `turned_chunk`; they are as small as one head."""
    if weight is None:
        return cos, sin
    wide = weight.to(cos.dtype)
    return cos * wide, sin * partner(wide, interleaved)


def turned_chunk(
    x: Tensor,  # (..., H, K) in the dtype of the tables
    cos: Tensor,  # (..., 1, K), of `weighted` as the next
    sin: Tensor,
    eps: float | None,
    interleaved: bool,
) -> Tensor:
    """Heads after norm (where there is an eps) and rotation."""
    if eps is not None:
        x = x * inverse_rms(x, eps)
    return torch.mul(x, cos).addcmul_(partner(x, interleaved), sin)


def chunk_gradients(
    up: Tensor,  # (..., H, K) in the dtype of the tables
    x: Tensor | None,  # the same; None without a norm
    weight: Tensor | None,  # (K,) the same
    cos: Tensor,  # (..., 1, K), of `by_column` as the next
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of heads before norm and rotation, and of the norm's weight."""
    up = turned_back(up, cos, sin, interleaved)
    if x is None or weight is None:
        return up, None
    scales = inverse_rms(x, eps)
    return norm_gradients(up, x * scales, weight, scales)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return heads before their rotation."""
    # A pair's partner is its own partner's: the rotation turns back by the same swap.
    return partner(x * sin, interleaved).addcmul_(x, cos)


def norm_gradients(
    up: Tensor,  # (..., K), overwritten
    x: Tensor,  # (..., K) over its rms
    weight: Tensor | None,  # (K,); None: ones
    scales: Tensor,  # (..., 1): one over the rms
) -> tuple[Tensor, Tensor]:
    """Gradients of an RMS norm's input and of its weight."""
    along = up * x
    if weight is None:
        slope = along.mean(-1, keepdim=True)
    else:
        slope = (along @ weight)[..., None] / weight.shape[0]
        up = up.mul_(weight)
    return up.addcmul_(x, slope, value=-1).mul_(scales), along.flatten(0, -2).sum(0)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., 1): one over the root mean square of each row or head."""
    return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def chunks(batches: int, period: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Runs of whole batches, or of rows of one, (batch, rows), of so many elements a row."""
    most = max(1, CHUNK_ELEMENTS // elements)
    rows, together = min(period, most), max(1, most // max(1, period))
    for first in range(0, batches, together):
        for start in range(0, period, max(1, rows)):
            yield slice(first, first + together), slice(start, start + rows)
