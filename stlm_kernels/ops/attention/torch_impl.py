"""attention in aten ops: SDPA where it fits, else blocks of queries over the keys that they see.

SDPA takes dense calls, and packed documents by their lengths (`documents`); windows on a CPU are
cut into blocks for it (`banded`). Its backward cannot be differentiated, so one that is itself
recorded, or takes many gradients at once, goes through the plain composition. Other windows,
softcap and dropout, non-finite operands (of which SDPA lets hidden ones through), torch.func, and
documents whose borders cannot be read (compile, shapes alone) go through pieces: a block of rows
meets one range of keys, so that memory stays small and the work of a window grows with T x window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _pieces, _recorded
from ..._pieces import LEAST_ROWS, Piece, Rule
from ..._rounding import rounded
from . import banded as bands
from . import documents

LEAST_BLOCK = 64
"""Rows of a block in a short window: smaller ones waste more on each op than on hidden keys."""


class Options(NamedTuple):
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout_p: float


def attention(
    q: Tensor,  # (B, T, H, K)
    k: Tensor,  # (B, T, H_kv, K)
    v: Tensor,  # (B, T, H_kv, K)
    cu_seqlens: Tensor | None,  # (S+1,) int32, with B = 1
    options: Options,
    out_dtype: torch.dtype,
) -> Tensor:
    """(B, T, H, K) in `out_dtype`."""
    dense = cu_seqlens is None
    readable = cu_seqlens is None or _checks.values_readable(cu_seqlens)
    windowed = options.window is not None and options.window < q.shape[1]
    unread = _checks.needs_composition(q, k, v) or not readable
    plain = unread or options.softcap or options.dropout_p or q.numel() == 0
    stock = not (plain or windowed)
    banded = windowed and q.is_cpu and not (plain or torch.compiler.is_compiling())
    # The library's kernels for 16 bits are on GPUs; on a CPU fp32 is faster and more exact.
    narrow = stock and dense and not q.is_cpu
    compute = out_dtype if narrow else torch.promote_types(out_dtype, torch.float32)
    q, k, v = (rounded(x, out_dtype, compute) for x in (q, k, v))
    with _checks.without_autocast(q):
        if banded and not _hides_poison(options, q, k, v):
            out = _Banded.apply(q, k, v, cu_seqlens, options)
        elif not stock:
            out = _in_pieces(q, k, v, cu_seqlens, options)
        elif torch.compiler.is_compiling():
            out = _sdpa(q, k, v, options)
        elif _hides_poison(options, q, k, v):
            out = _in_pieces(q, k, v, cu_seqlens, options)
        else:
            out = _by_stock(q, k, v, cu_seqlens, options)
    return out.to(out_dtype, copy=True)  # `out` may be a view, which nobody could change in place


# SDPA


def _sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """(B, T, H, K) of the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=options.causal, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _by_stock(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options
) -> Tensor:
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if cu_seqlens is None:
        return _Stock.apply(q, k, v, options) if recorded else _sdpa(q, k, v, options)
    if recorded:
        return _Documents.apply(q, k, v, cu_seqlens, options)
    plan = _plan(q, k, cu_seqlens, options)
    return documents.attend(*_flat(q, k, v), plan, keep=False)[0][None]


def _plan(q: Tensor, k: Tensor, cu_seqlens: Tensor, options: Options) -> documents.Plan:
    sizes = q.shape[1], k.shape[1]
    return documents.plan(cu_seqlens, cu_seqlens, *sizes, options.causal, options.scale)


def _hides_poison(options: Options, *tensors: Tensor) -> bool:
    """Whether SDPA would show rows what they must not see, 0 * NaN is NaN, or take a query of NaN
    for one that sees nothing.
    """
    watched = tensors if options.causal else tensors[:1]
    return _checks.values_visible(*watched) and not _pieces.all_finite(*watched)


class _Stock(torch.autograd.Function):
    """SDPA with its own backward, for as long as nobody differentiates that."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = _sdpa(leaves[0], leaves[1], leaves[2], options)
        ctx.recorded, ctx.leaves, ctx.options = out, leaves, options
        ctx.save_for_backward(q, k, v)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        derived: Sequence[Tensor | None]
        if _recorded.is_needed(*grads) or _hides_poison(ctx.options, *grads):
            derived = _gradients(grads[0], q, k, v, None, ctx.options, None)
        else:
            derived = torch.autograd.grad(ctx.recorded, ctx.leaves, grads, retain_graph=True)
        return *derived, None


class _Documents(torch.autograd.Function):
    """The same for packed documents."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options
    ) -> Tensor:
        ctx.plan, ctx.options = _plan(q, k, cu_seqlens, options), options
        out, ctx.kept = documents.attend(*_flat(q, k, v), ctx.plan, keep=True)
        ctx.save_for_backward(q, k, v, cu_seqlens)
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens = ctx.saved_tensors
        derived: Sequence[Tensor | None]
        if _recorded.is_needed(*grads) or _hides_poison(ctx.options, *grads):
            derived = _gradients(grads[0], q, k, v, cu_seqlens, ctx.options, None)
        else:
            grad = grads[0].flatten(0, 1)
            flat = documents.gradients(grad, *_flat(q, k, v), ctx.plan, ctx.kept)
            derived = [x[None] for x in flat]
        return *derived, None, None


class _Banded(torch.autograd.Function):
    """A window in blocks, whose backward cuts them again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options
    ) -> Tensor:
        assert options.window is not None
        cut = bands.Bands.of(q.shape[0] * q.shape[1], options.window, q.shape[2] // k.shape[2])
        sight = _sight(q, cu_seqlens, options)
        out, ctx.sums = bands.attend(*_flat(q, k, v), sight, cut, options.scale)
        ctx.cut, ctx.options = cut, options
        ctx.save_for_backward(q, k, v, cu_seqlens, out, *sight)
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out, *sight = ctx.saved_tensors
        if _recorded.is_needed(*grads) or _hides_poison(ctx.options, *grads):
            derived = _gradients(grads[0], q, k, v, cu_seqlens, ctx.options, None)
        else:
            flat = bands.gradients(
                grads[0].flatten(0, 1), *_flat(q, k, v), out, ctx.sums,
                bands.Sight(*sight), ctx.cut, ctx.options.scale,
            )  # fmt: skip
            derived = tuple(dx.view(x.shape) for dx, x in zip(flat, (q, k, v), strict=True))
        return *derived, None, None


# Pieces


def _in_pieces(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options
) -> Tensor:
    seed = None
    if options.dropout_p:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    if _checks.needs_composition(q, k, v):
        pieces = _cutter(q, cu_seqlens, options)(True)
        return _attend_plainly(q, k, v, pieces, _rule(options, seed))
    return _InPieces.apply(q, k, v, cu_seqlens, options, seed)


def _rule(options: Options, seed: Tensor | None) -> Rule:
    return Rule(options.scale, options.softcap, options.dropout_p, seed)


def _flat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as one stream of rows, (B T, H, K)."""
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def _cutter(
    q: Tensor, cu_seqlens: Tensor | None, options: Options
) -> Callable[[bool], Iterator[Piece]]:
    """What cuts the rows of a call into pieces, told whether operands are mixed with NaN."""
    start, end = _sight(q, cu_seqlens, options)
    total = q.shape[0] * q.shape[1]
    reach = total if options.window is None else min(options.window, total)
    if total and _checks.values_readable(start):
        reach = max(1, int((end - start).max()))
    return lambda mixed: _cut(start, end, q.shape[2], reach, options.causal, mixed)


def _sight(q: Tensor, cu_seqlens: Tensor | None, options: Options) -> bands.Sight:
    """Which keys each row of the flat batch sees."""
    batch, length = q.shape[:2]
    total, device = batch * length, q.device
    rows = torch.arange(total, device=device)
    if cu_seqlens is None:
        start = rows // max(1, length) * length
        end = start + length
    else:
        borders = _checks.clamped_bounds(cu_seqlens, total).long()
        document = torch.searchsorted(borders, rows, right=True)  # 0 and S + 1 are none
        bounds = torch.cat([borders.new_zeros(1), borders, borders[-1:]])
        inside = (document > 0) & (document < borders.shape[0])
        start, end = bounds[document], bounds[document + 1]
        start, end = torch.where(inside, start, 0), torch.where(inside, end, 0)
    if options.window is not None:
        start = torch.maximum(start, rows - min(options.window, total) + 1).minimum(end)
    if options.causal:
        end = end.minimum(rows + 1)
    return bands.Sight(start, end)


def _cut(
    start: Tensor, end: Tensor, heads: int, reach: int, causal: bool, mixed: bool
) -> Iterator[Piece]:
    """Blocks of rows; row t sees the keys from start[t] to end[t]."""
    total, read = start.shape[0], _checks.values_readable(start)
    widest = max(1, heads * min(total, 2 * reach))
    step = min(max(reach, LEAST_BLOCK), _pieces.PIECE_SCORES // widest)
    step = max(LEAST_ROWS, step)
    for first in range(0, total, step):
        last = min(total, first + step)
        low, high = start[first:last], end[first:last]
        sees = high > low
        if read:
            if not bool(sees.any()):
                continue
            least, most = int(low[sees].min()), int(high.max())
            sighted = bool(sees.all())
        else:
            least, most = max(0, first - reach + 1), last if causal else total
            sighted = False
        keys = torch.arange(least, most, device=start.device)
        hidden = (keys < low[:, None]) | (keys >= high[:, None])
        yield Piece(slice(first, last), slice(least, most), hidden[None], mixed or not sighted)


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    options: Options,
    seed: Tensor | None,
) -> Sequence[Tensor | None]:
    pieces = _cutter(q, cu_seqlens, options)(_pieces.may_be_mixed(grad, q, k, v))
    rule = _rule(options, seed)
    if _recorded.is_needed(grad):
        attend = partial(_attend_plainly, pieces=pieces, rule=rule)
        return _recorded.gradients(attend, (q, k, v), (grad,))
    derived = _pieces.gradients(grad.flatten(0, 1), *_flat(q, k, v), pieces, rule)
    return [dx.view(x.shape) for dx, x in zip(derived, (q, k, v), strict=True)]


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, pieces: Iterator[Piece], rule: Rule) -> Tensor:
    return _pieces.attend_plainly(*_flat(q, k, v), pieces, rule).view(q.shape)


class _InPieces(torch.autograd.Function):
    """Attention whose backward forms the weights again, piece by piece."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        options: Options,
        seed: Tensor | None,
    ) -> Tensor:
        pieces = _cutter(q, cu_seqlens, options)(_pieces.may_be_mixed(q, k, v))
        return _pieces.attend(*_flat(q, k, v), pieces, _rule(options, seed)).view(q.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, cu_seqlens, ctx.options, seed = inputs
        ctx.save_for_backward(q, k, v, cu_seqlens, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, seed = ctx.saved_tensors
        derived = _gradients(grads[0], q, k, v, cu_seqlens, ctx.options, seed)
        return *derived, None, None, None
