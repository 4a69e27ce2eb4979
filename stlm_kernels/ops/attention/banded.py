"""Windowed attention on a CPU: blocks of rows over the keys that any of them sees, by torch's own
flash attention for CPUs under a mask.

A block of L rows sees the keys of its own block, of the m blocks before and of the n behind, where
a row sees m L keys before its own at most, and n L behind it. The
blocks of all heads go through one call for as long as their mask is small; queries that share a key
head stand below each other, so that no key is expanded. What masked rows hold must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_ROWS, MOST_ROWS = 32, 256
"""Least and most rows of a block: half a window wastes a third of the products, but short ones
are slow."""
MASK_ENTRIES = 3 << 17
"""Mask entries of the blocks of one call: 1.5 MB, which with its keys stays in a cache."""


class Bands(NamedTuple):
    """Partition of T rows into blocks."""

    total: int
    rows: int  # L of a block
    before: int  # m
    after: int  # n
    blocks: int  # in all
    at_once: int  # in one call

    @classmethod
    def of(cls, total: int, left: int, right: int, group: int) -> Bands:
        """`group` queries share a key head."""
        half = -(-(left + 1 + right) // 2)
        rows = max(LEAST_ROWS, min(MOST_ROWS, 1 << (half - 1).bit_length()))
        before, after = -(-left // rows), -(-right // rows)
        entries = group * rows * (before + 1 + after) * rows
        return cls(total, rows, before, after, -(-total // rows), max(1, MASK_ENTRIES // entries))

    @property
    def seen(self) -> int:
        """Blocks of keys that a block of rows meets."""
        return self.before + 1 + self.after

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and last block of each call."""
        for first in range(0, self.blocks, self.at_once):
            yield first, min(self.blocks, first + self.at_once)


class Sight(NamedTuple):
    """The keys from start[t] to end[t] are seen by row t, within a window; none where equal."""

    start: Tensor  # (T,) int64
    end: Tensor  # (T,) int64


def attend(
    q: Tensor,  # (T, H, K) fp32 or fp64
    k: Tensor,  # (T, H_kv, K)
    v: Tensor,  # (T, H_kv, K)
    sight: Sight,
    bands: Bands,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """(T, H, K), and the log-sum-exps of each call."""
    out, sums = torch.empty_like(q, memory_format=torch.contiguous_format), []
    for first, last in bands.spans():
        operands = _operands(q, k, v, bands, first, last)
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *operands, 0.0, False, attn_mask=_mask(sight, bands, q, k, first, last), scale=scale
        )
        rows = slice(first * bands.rows, min(bands.total, last * bands.rows))
        out[rows] = _unfolded_rows(part, bands)[: rows.stop - rows.start]
        sums.append(lse)
    return out.masked_fill_(_blind(sight), 0), sums


def gradients(
    grad: Tensor,  # (T, H, K)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # (T, H, K)
    sums: list[Tensor],
    sight: Sight,
    bands: Bands,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    blind, group = _blind(sight), q.shape[1] // k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(bands.blocks + bands.seen - 1, bands.rows, *x.shape[1:]) for x in (k, v))
    for (first, last), lse in zip(bands.spans(), sums, strict=True):
        rows = slice(first * bands.rows, min(bands.total, last * bands.rows))
        up = _rows(grad[rows].masked_fill(blind[rows], 0), bands, 0, last - first, group)
        was = _rows(out, bands, first, last, group)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            up, *_operands(q, k, v, bands, first, last), was, lse, 0.0, False,
            attn_mask=_mask(sight, bands, q, k, first, last), scale=scale,
        )  # fmt: skip
        dq[rows] = _unfolded_rows(parts[0], bands)[: rows.stop - rows.start]
        for total, part in zip((dk, dv), parts[1:], strict=True):
            by_block = part.transpose(1, 2).unflatten(1, (bands.seen, bands.rows))
            for j in range(bands.seen):
                total[first + j : last + j] += by_block[:, j]
    dk, dv = (x.flatten(0, 1)[bands.before * bands.rows :][: bands.total] for x in (dk, dv))
    return dq, dk.contiguous(), dv.contiguous()


def _operands(
    q: Tensor, k: Tensor, v: Tensor, bands: Bands, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, H_kv, G L, K), k and v (N, H_kv, (m + 1 + n) L, K) of N blocks."""
    keys = (_keys(x, bands, first, last) for x in (k, v))
    return (_rows(q, bands, first, last, q.shape[1] // k.shape[1]), *keys)  # type: ignore[return-value]


def _padded(x: Tensor, low: int, high: int) -> Tensor:
    """Rows low to high of x, zeros where there are none."""
    inside = x[max(0, low) : min(x.shape[0], high)]
    return F.pad(inside, (0, 0, 0, 0, max(0, -low), max(0, high - x.shape[0])))


def _rows(x: Tensor, bands: Bands, first: int, last: int, group: int) -> Tensor:
    x = _padded(x, first * bands.rows, last * bands.rows)
    x = x.unflatten(1, (-1, group)).unflatten(0, (-1, bands.rows))  # (n, L, H_kv, G, K)
    return x.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfolded_rows(x: Tensor, bands: Bands) -> Tensor:
    """The way back, (n L, H, K)."""
    x = x.unflatten(2, (-1, bands.rows)).permute(0, 3, 1, 2, 4)
    return x.reshape(-1, x.shape[2] * x.shape[3], x.shape[4])


def _keys(x: Tensor, bands: Bands, first: int, last: int) -> Tensor:
    x = _padded(x, (first - bands.before) * bands.rows, (last + bands.after) * bands.rows)
    return x.unfold(0, bands.seen * bands.rows, bands.rows).transpose(2, 3)


def _mask(sight: Sight, bands: Bands, q: Tensor, k: Tensor, first: int, last: int) -> Tensor:
    """(N, 1, G L, (m + 1 + n) L): 0 where a row sees a key, -inf elsewhere."""
    rows = torch.arange(first * bands.rows, last * bands.rows, device=q.device)
    start, end = (
        F.pad(x[first * bands.rows : last * bands.rows], (0, max(0, last * bands.rows - len(x))))
        for x in sight
    )
    # A row that sees nothing sees itself here: without a key it would turn into NaN.
    blind = end <= start
    start, end = torch.where(blind, rows, start), torch.where(blind, rows + 1, end)
    # Counted from the first row of each block, and narrow: the mask takes a tenth of the time.
    low, high = (
        (x.view(-1, bands.rows) - rows[:: bands.rows, None]).int()[:, None, :, None]
        for x in (start, end)
    )
    span = -bands.before * bands.rows, (1 + bands.after) * bands.rows
    keys = torch.arange(*span, dtype=torch.int32, device=q.device)
    masked = ((keys < low) | (keys >= high)).expand(-1, q.shape[1] // k.shape[1], -1, -1)
    mask = torch.where(masked, q.new_tensor(-torch.inf), q.new_tensor(0))
    return mask.flatten(1, 2)[:, None]


def _blind(sight: Sight) -> Tensor:
    """(T, 1, 1): rows that see nothing."""
    return (sight.end <= sight.start)[:, None, None]
