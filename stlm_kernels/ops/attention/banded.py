"""Windowed attention on a CPU: blocks of rows over the keys that any of them sees, as batches under
a mask (`cpu`).

A block of L rows sees the keys of its own block, of the m blocks before and of the n behind, where
a row sees m L keys before its own at most, and n L behind it. Blocks whose rows see their whole
window have one mask, which is kept, and nothing of theirs is copied or padded; only those at the
ends of documents have masks of their own. The blocks of all heads go through one call for as long
as masks of theirs would be small; queries that share a key head stand below each other, so that no
key is expanded. What masked rows hold must be finite.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu

LEAST_ROWS, MOST_ROWS = 32, 128
"""Least and most rows of a block: short ones waste fewer products. The forward has the least where
torch's flash attention takes so many rows at a time anyway; else half a window suits products, and
the backward, where fewer blocks then add to the gradient of a key."""
MASK_ENTRIES = 3 << 17
"""Mask entries of the blocks of one call: 1.5 MB, which with its keys stays in a cache."""
LEAST_RUN = 4
"""Blocks in a row that see their whole windows below which a call of their own does not pay."""


class Run(NamedTuple):
    """Blocks of one call."""

    first: int
    last: int  # exclusive
    whole: bool  # each row sees its whole window


class Bands(NamedTuple):
    """Partition of T rows into blocks."""

    total: int
    left: int
    right: int
    group: int  # queries that share a key head
    rows: int  # L of a block

    @classmethod
    def short(cls, total: int, left: int, right: int, group: int) -> Bands:
        return cls(total, left, right, group, LEAST_ROWS)

    def long(self) -> Bands:
        half = -(-(self.left + 1 + self.right) // 2)
        rows = max(LEAST_ROWS, min(MOST_ROWS, 1 << (half - 1).bit_length()))
        return self._replace(rows=rows)

    @property
    def before(self) -> int:
        """m."""
        return -(-self.left // self.rows)

    @property
    def after(self) -> int:
        """n."""
        return -(-self.right // self.rows)

    @property
    def blocks(self) -> int:
        return -(-self.total // self.rows)

    @property
    def seen(self) -> int:
        """Blocks of keys that a block of rows meets."""
        return self.before + 1 + self.after

    def rows_of(self, run: Run) -> slice:
        return slice(run.first * self.rows, min(self.total, run.last * self.rows))

    def runs(self, sight: Sight) -> Iterator[Run]:
        """Divide the blocks into calls."""
        most = max(1, MASK_ENTRIES // (self.group * self.rows * self.seen * self.rows))
        for run in self._runs(sight):
            for first in range(run.first, run.last, most):
                yield run._replace(first=first, last=min(run.last, first + most))

    def _runs(self, sight: Sight) -> Iterator[Run]:
        rows = torch.arange(self.total, device=sight.start.device)
        cut = (sight.start != rows - self.left) | (sight.end != rows + self.right + 1)
        cut = F.pad(cut, (0, self.blocks * self.rows - self.total), value=True)
        whole, counts = (~cut.view(-1, self.rows).any(1)).unique_consecutive(return_counts=True)
        begin = end = 0  # of the blocks that wait for others at the ends of documents
        for is_whole, count in zip(whole.tolist(), counts.tolist(), strict=True):
            if is_whole and count >= LEAST_RUN:
                if end > begin:
                    yield Run(begin, end, False)
                yield Run(end, end + count, True)
                begin = end + count
            end += count
        if end > begin:
            yield Run(begin, end, False)


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
) -> tuple[Tensor, Tensor | None]:
    """(T, H, K), and the log-sum-exps of rows (T, H) where `cpu` gives some."""
    out, sums = q.new_empty(q.shape), None
    for run in bands.runs(sight):
        call = cpu.Call(_mask(sight, bands, q, run), False, scale)
        part, lse = cpu.attend(*_operands(q, k, v, bands, run), call)
        rows = bands.rows_of(run)
        out[rows] = _unfolded_rows(part, bands)[: rows.stop - rows.start]
        if lse is not None:
            sums = q.new_empty(q.shape[:2]) if sums is None else sums
            sums[rows] = _unfolded_rows(lse[..., None], bands)[: rows.stop - rows.start, :, 0]
        if not run.whole:
            out[rows].masked_fill_(_blind(sight, rows), 0)
    return out, sums


def gradients(
    grad: Tensor,  # (T, H, K)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,  # (T, H, K), read where there are sums
    sums: Tensor | None,  # (T, H)
    sight: Sight,
    bands: Bands,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(bands.blocks + bands.seen - 1, bands.rows, *x.shape[1:]) for x in (k, v))
    for run in bands.runs(sight):
        rows = bands.rows_of(run)
        up = grad[rows] if run.whole else grad[rows].masked_fill(_blind(sight, rows), 0)
        up = _rows(up, bands, run._replace(first=0, last=run.last - run.first))
        own = lse = None
        if out is not None and sums is not None:
            own = _rows(out, bands, run)
            lse = _rows(sums[..., None], bands, run)[..., 0].contiguous()
        call = cpu.Call(_mask(sight, bands, q, run), False, scale)
        operands = _operands(q, k, v, bands, run)
        parts = cpu.gradients(up, *operands, own, lse, call)
        dq[rows] = _unfolded_rows(parts[0], bands)[: rows.stop - rows.start]
        for total, part in zip((dk, dv), parts[1:], strict=True):
            by_block = part.transpose(1, 2).unflatten(1, (bands.seen, bands.rows))
            for j in range(bands.seen):
                total[run.first + j : run.last + j] += by_block[:, j]
    dk, dv = (x.flatten(0, 1)[bands.before * bands.rows :][: bands.total] for x in (dk, dv))
    return dq, dk, dv


def _operands(
    q: Tensor, k: Tensor, v: Tensor, bands: Bands, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, H_kv, G L, K), k and v (N, H_kv, (m + 1 + n) L, K) of N blocks."""
    return _rows(q, bands, run), _keys(k, bands, run), _keys(v, bands, run)


def _padded(x: Tensor, low: int, high: int) -> Tensor:
    """Rows low to high of x, zeros where there are none."""
    inside = x[max(0, low) : min(x.shape[0], high)]
    if len(inside) == high - low:
        return inside  # which F.pad would copy
    return F.pad(inside, (0, 0, 0, 0, max(0, -low), max(0, high - x.shape[0])))


def _rows(x: Tensor, bands: Bands, run: Run) -> Tensor:
    x = _padded(x, run.first * bands.rows, run.last * bands.rows)
    x = x.unflatten(1, (-1, bands.group)).unflatten(0, (-1, bands.rows))  # (N, L, H_kv, G, K)
    return x.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfolded_rows(x: Tensor, bands: Bands) -> Tensor:
    """The way back, (N L, H, K)."""
    x = x.unflatten(2, (-1, bands.rows)).permute(0, 3, 1, 2, 4)
    return x.reshape(-1, x.shape[2] * x.shape[3], x.shape[4])


def _keys(x: Tensor, bands: Bands, run: Run) -> Tensor:
    first, last = run.first - bands.before, run.last + bands.after
    x = _padded(x, first * bands.rows, last * bands.rows)
    return x.unfold(0, bands.seen * bands.rows, bands.rows).transpose(2, 3)


def _mask(sight: Sight, bands: Bands, q: Tensor, run: Run) -> Tensor:
    """(N, 1, G L, (m + 1 + n) L): 0 where a row sees a key, -inf elsewhere."""
    if run.whole:
        mask = _whole_mask(bands._replace(total=0), q.dtype)
        return mask.expand(run.last - run.first, -1, -1, -1)
    first, last = run.first * bands.rows, run.last * bands.rows
    rows = torch.arange(first, last, device=q.device)
    start, end = (F.pad(x[first:last], (0, max(0, last - len(x)))) for x in sight)
    # A row that sees nothing sees itself here: without a key it would turn into NaN.
    blind = end <= start
    start, end = torch.where(blind, rows, start), torch.where(blind, rows + 1, end)
    # Counted from the first row of each block, and narrow: the mask takes a tenth of the time.
    low, high = (
        (x.view(-1, bands.rows) - rows[:: bands.rows, None]).int()[..., None] for x in (start, end)
    )
    return _between(low, high, bands, q.dtype)


@functools.lru_cache(maxsize=16)
def _whole_mask(bands: Bands, dtype: torch.dtype) -> Tensor:
    """(1, 1, G L, (m + 1 + n) L), of rows that see their whole window."""
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.arange(bands.rows, dtype=torch.int32, device="cpu")[None, :, None]
        return _between(rows - bands.left, rows + bands.right + 1, bands, dtype)


def _between(low: Tensor, high: Tensor, bands: Bands, dtype: torch.dtype) -> Tensor:
    """Mask of the keys of each row from low to high (N, L, 1), counted from a block's first row."""
    span = -bands.before * bands.rows, (1 + bands.after) * bands.rows
    keys = torch.arange(*span, dtype=torch.int32, device=low.device)
    masked = ((keys < low) | (keys >= high))[:, None].expand(-1, bands.group, -1, -1)
    seen = torch.zeros((), dtype=dtype, device=low.device)
    mask = torch.where(masked, torch.full_like(seen, -torch.inf), seen)
    return mask.flatten(1, 2)[:, None]


def _blind(sight: Sight, rows: slice) -> Tensor:
    """(rows, 1, 1): rows that see nothing."""
    return (sight.end[rows] <= sight.start[rows])[:, None, None]
