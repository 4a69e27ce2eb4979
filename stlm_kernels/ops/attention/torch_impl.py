"""attention in aten ops: SDPA where it fits, else blocks of queries over the keys that they see.

SDPA takes dense calls, and packed documents by their lengths (`documents`); windows on a CPU are
cut into blocks for it (`banded`). Its backward cannot be differentiated, so one that is itself
differentiated, or takes many gradients at once, goes through the plain composition. Other windows,
softcap and dropout, non-finite operands (of which SDPA lets masked ones through), torch.func, and
documents whose boundaries cannot be read (compile, shapes alone) go through blocks: a block of rows
meets one range of keys, so that memory stays small and the work of a window grows with T x window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import attention_blocks, autograd, segments
from ..._torch.attention_blocks import LEAST_ROWS, Block, Rule
from ..._torch.casting import cast
from ..._torch.function import Function
from . import banded as bands
from . import cpu, documents

LEAST_BLOCK = 64
"""Rows of a block in a short window: smaller ones waste more on each op than on masked keys."""


class Options(NamedTuple):
    left: int | None  # keys that a row sees before its own; None: all
    right: int | None  # and behind it
    scale: float
    softcap: float | None
    dropout_p: float

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def windowed(self) -> bool:
        return self.left is not None or not (self.causal or self.right is None)

    def within(self, keys: int) -> Options:
        """Drop sides that reach to the ends of every sequence."""
        left = None if self.left is None or self.left >= keys - 1 else self.left
        right = None if self.right is None or self.right >= keys - 1 > 0 else self.right
        return self._replace(left=left, right=right)


class Boundaries(NamedTuple):
    """Boundaries of packed documents."""

    rows: Tensor | None  # (S+1,) int32; None: one document in each sequence
    keys: Tensor | None  # (S+1,) int32; None: those of the rows


def attention(
    q: Tensor,  # (B, T, H, K)
    k: Tensor,  # (B, T_kv, H_kv, K)
    v: Tensor,  # (B, T_kv, H_kv, K)
    cu_seqlens: Tensor | None,  # (S+1,) int32, with B = 1
    cu_seqlens_k: Tensor | None,  # (S+1,) int32
    options: Options,
    out_dtype: torch.dtype,
) -> Tensor:
    """(B, T, H, K) in `out_dtype`."""
    boundaries, options = Boundaries(cu_seqlens, cu_seqlens_k), options.within(k.shape[1])
    dense, windowed = cu_seqlens is None, options.windowed
    readable = cu_seqlens is None or runtime.values_readable(cu_seqlens)
    own_keys = cu_seqlens_k is None and q.shape[1] == k.shape[1]
    bounded = options.left is not None and options.right is not None and own_keys
    unread = runtime.needs_composition(q, k, v) or not readable
    plain = unread or options.softcap or options.dropout_p or q.numel() == 0
    by_sdpa = not (plain or windowed or (dense and _forms_too_much(q, k, options)))
    banded = windowed and bounded and not plain and runtime.values_visible(q, k, v)
    # The library's kernels for 16 bits are on GPUs; on a CPU fp32 is faster and more exact.
    narrow = by_sdpa and dense and not q.is_cpu
    compute = out_dtype if narrow else torch.promote_types(out_dtype, torch.float32)
    q, k, v = (cast(x, out_dtype, compute) for x in (q, k, v))
    with runtime.without_autocast(q):
        if banded and not _shows_masked_nan(options, q, k, v):
            out = _Banded.apply(q, k, v, cu_seqlens, options)
        elif not by_sdpa:
            out = _in_blocks(q, k, v, boundaries, options)
        elif torch.compiler.is_compiling():
            out = _sdpa(q, k, v, options)
        elif _shows_masked_nan(options, q, k, v):
            out = _in_blocks(q, k, v, boundaries, options)
        else:
            out = _by_sdpa(q, k, v, boundaries, options)
    return out.to(out_dtype, copy=True)  # `out` may be a view, which cannot be changed in place


# SDPA


def _sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """(B, T, H, K) of the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    mask = documents.lower_right(rows, keys, q) if options.causal and rows != keys else None
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=options.causal and mask is None, scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


def _forms_too_much(q: Tensor, k: Tensor, options: Options) -> bool:
    """Return whether SDPA would need a large mask, since its causal rows are the first ones."""
    rows, keys = q.shape[1], k.shape[1]
    return options.causal and rows != keys and rows * keys > documents.MASK_ENTRIES


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, options: Options) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if boundaries.rows is None:
        return _SDPA.apply(q, k, v, options) if needs_grad else _sdpa(q, k, v, options)
    other = boundaries.rows if boundaries.keys is None else boundaries.keys
    sizes = q.shape[1], k.shape[1]
    plan = documents.plan(boundaries.rows, other, *sizes, options.causal, options.scale)
    if plan.mask_entries > documents.MASK_ENTRIES:
        return _in_blocks(q, k, v, boundaries, options)
    if needs_grad:
        return _Documents.apply(q, k, v, *boundaries, options, plan)
    return documents.attend(*_flat(q, k, v), plan, keep=False)[0][None]


def _shows_masked_nan(options: Options, *tensors: Tensor) -> bool:
    """Return whether SDPA would show rows what they must not see, 0 * NaN is NaN, or take a query
    of NaN for one that sees nothing.
    """
    watched = tensors if options.causal or options.windowed else tensors[:1]
    return runtime.values_visible(*watched) and not attention_blocks.all_finite(*watched)


class _SDPA(torch.autograd.Function):
    """SDPA with its own backward, until that is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = _sdpa(leaves[0], leaves[1], leaves[2], options)
        ctx.out, ctx.leaves, ctx.options = out, leaves, options
        ctx.save_for_backward(q, k, v)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        derived: Sequence[Tensor | None]
        if autograd.is_needed(*grads) or _shows_masked_nan(ctx.options, *grads):
            derived = _gradients(grads[0], q, k, v, Boundaries(None, None), ctx.options, None)
        else:
            derived = torch.autograd.grad(ctx.out, ctx.leaves, grads, retain_graph=True)
        return *derived, None


class _Documents(torch.autograd.Function):
    """SDPA of packed documents, with a backward of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None,
        options: Options,
        plan: documents.Plan,
    ) -> Tensor:
        ctx.plan, ctx.options = plan, options
        out, ctx.kept = documents.attend(*_flat(q, k, v), plan, keep=True)
        ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k)
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *boundaries = ctx.saved_tensors
        derived: Sequence[Tensor | None]
        if autograd.is_needed(*grads) or _shows_masked_nan(ctx.options, *grads):
            derived = _gradients(grads[0], q, k, v, Boundaries(*boundaries), ctx.options, None)
        else:
            grad = grads[0].flatten(0, 1)
            flat = documents.gradients(grad, *_flat(q, k, v), ctx.plan, ctx.kept)
            derived = [x[None] for x in flat]
        return *derived, None, None, None, None


class _Banded(torch.autograd.Function):
    """A window in blocks, whose backward cuts them again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options
    ) -> Tensor:
        assert options.left is not None
        assert options.right is not None
        total, group = q.shape[0] * q.shape[1], q.shape[2] // k.shape[2]
        cut = bands.Bands.short(total, options.left, options.right, group)
        if cpu.takes_products(q):
            cut = cut.long()
        sight = _sight(q, k, Boundaries(cu_seqlens, None), options)
        out, sums = bands.attend(*_flat(q, k, v), sight, cut, options.scale)
        ctx.cut, ctx.options = cut.long(), options
        ctx.save_for_backward(q, k, v, cu_seqlens, out, sums, *sight)
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out, sums, *sight = ctx.saved_tensors
        if autograd.is_needed(*grads) or _shows_masked_nan(ctx.options, *grads):
            boundaries = Boundaries(cu_seqlens, None)
            derived = _gradients(grads[0], q, k, v, boundaries, ctx.options, None)
        else:
            flat = bands.gradients(
                grads[0].flatten(0, 1), *_flat(q, k, v), out, sums,
                bands.Sight(*sight), ctx.cut, ctx.options.scale,
            )  # fmt: skip
            derived = tuple(dx.view(x.shape) for dx, x in zip(flat, (q, k, v), strict=True))
        return *derived, None, None


# Blocks


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, options: Options) -> Tensor:
    seed = None
    if options.dropout_p:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    if runtime.needs_composition(q, k, v):
        blocks = _cutter(q, k, boundaries, options)(True)
        return _attend_plainly(q, k, v, blocks, _rule(options, seed))
    return _InBlocks.apply(q, k, v, *boundaries, options, seed)


def _rule(options: Options, seed: Tensor | None) -> Rule:
    return Rule(options.scale, options.softcap, options.dropout_p, seed)


def _flat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as one stream of rows, (B T, H, K)."""
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def _cutter(
    q: Tensor, k: Tensor, boundaries: Boundaries, options: Options
) -> Callable[[bool], Iterator[Block]]:
    """Function that yields the blocks of a call, told whether operands are mixed with NaN."""
    sight = _sight(q, k, boundaries, options)
    keys = k.shape[0] * k.shape[1]
    sides = options.left, options.right
    reach = min(keys, 1 + sum(keys if side is None else side for side in sides))
    if len(sight.start) and runtime.values_readable(sight.start):
        reach = max(1, int((sight.end - sight.start).max()))
    span = partial(_span, shape=q.shape, keys=k.shape[1], boundaries=boundaries, sides=sides)
    return lambda mixed: _cut(sight, q.shape[2], reach, span, mixed)


def _span(
    first: int,
    last: int,
    shape: Sequence[int],
    keys: int,
    boundaries: Boundaries,
    sides: tuple[int | None, int | None],
) -> tuple[int, int]:
    """No row from first to last sees a key outside these, whatever the boundaries hold."""
    batch, rows = shape[:2]
    if boundaries.keys is not None:
        return 0, keys
    here, there = first // rows, (last - 1) // rows  # sequences
    left, right = (batch * keys if side is None else side for side in sides)
    low = first + (here + 1) * (keys - rows) - left
    high = last + (there + 1) * (keys - rows) + right
    return max(here * keys, low), min((there + 1) * keys, high)


def _sight(q: Tensor, k: Tensor, boundaries: Boundaries, options: Options) -> bands.Sight:
    """Range of the keys that each row of the flat batch sees."""
    (batch, length), keys = q.shape[:2], k.shape[1]
    rows = torch.arange(batch * length, device=q.device)
    if boundaries.rows is None:
        start = rows // max(1, length) * keys
        end, offset = start + keys, (rows // max(1, length) + 1) * (keys - length)
    else:
        start, end, offset = _documents_of(rows, boundaries, length, keys)
    place, first, last = rows + offset, start, end
    if options.left is not None:
        start = torch.maximum(first, place - options.left).minimum(last)
    if options.right is not None:
        end = torch.minimum(last, place + options.right + 1).maximum(first)
    return bands.Sight(start, end)


def _documents_of(
    rows: Tensor, boundaries: Boundaries, length: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """First key of each row's document, the end of its keys, and the rows' distance from them; no
    key for rows of none."""
    assert boundaries.rows is not None
    other = boundaries.rows if boundaries.keys is None else boundaries.keys
    own = segments.clamped_bounds(boundaries.rows, length).long()
    other = segments.clamped_bounds(other, keys).long()
    document, inside = segments.find_segment(own, rows)
    own, other = (torch.cat([x[:1], x, x[-1:]]) for x in (own, other))
    start, end = (torch.where(inside, other[i], 0) for i in (document, document + 1))
    return start, end, other[document + 1] - own[document + 1]


def _cut(
    sight: bands.Sight,
    heads: int,
    reach: int,
    span: Callable[[int, int], tuple[int, int]],
    mixed: bool,
) -> Iterator[Block]:
    """Blocks of rows; row t sees the keys from start[t] to end[t]."""
    start, end = sight
    total, read = start.shape[0], runtime.values_readable(start)
    step = min(max(reach, LEAST_BLOCK), attention_blocks.BLOCK_SCORES // max(1, 2 * heads * reach))
    step = max(LEAST_ROWS, step)
    for first in range(0, total, step):
        last = min(total, first + step)
        low, high = start[first:last], end[first:last]
        sees = high > low
        if read:
            if not bool(sees.any()):
                continue
            least, most = int(low[sees].min()), int(high[sees].max())
            sighted = bool(sees.all())
        else:
            least, most = span(first, last)
            sighted = False
        keys = torch.arange(least, most, device=start.device)
        masked = (keys < low[:, None]) | (keys >= high[:, None])
        yield Block(slice(first, last), slice(least, most), masked[None], mixed or not sighted)


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    options: Options,
    seed: Tensor | None,
) -> Sequence[Tensor | None]:
    blocks = _cutter(q, k, boundaries, options)(attention_blocks.may_be_mixed(grad, q, k, v))
    rule = _rule(options, seed)
    with runtime.without_autocast(q):
        if autograd.is_needed(grad):
            attend = partial(_attend_plainly, blocks=blocks, rule=rule)
            return autograd.gradients(attend, (q, k, v), (grad,))
        derived = attention_blocks.gradients(grad.flatten(0, 1), *_flat(q, k, v), blocks, rule)
    return [dx.view(x.shape) for dx, x in zip(derived, (q, k, v), strict=True)]


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, blocks: Iterator[Block], rule: Rule) -> Tensor:
    return attention_blocks.attend_plainly(*_flat(q, k, v), blocks, rule).view(q.shape)


class _InBlocks(Function):
    """Attention whose backward forms the weights again, block by block."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
        options: Options,
        seed: Tensor | None,
    ) -> Tensor:
        boundaries = Boundaries(cu_seqlens, cu_seqlens_k)
        blocks = _cutter(q, k, boundaries, options)(attention_blocks.may_be_mixed(q, k, v))
        return attention_blocks.attend(*_flat(q, k, v), blocks, _rule(options, seed)).view(q.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, cu_seqlens, cu_seqlens_k, ctx.options, seed = inputs
        ctx.save_for_backward(q, k, v, seed, cu_seqlens, cu_seqlens_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, seed, *boundaries = ctx.saved_tensors
        derived = _gradients(grads[0], q, k, v, Boundaries(*boundaries), ctx.options, seed)
        return *derived, None, None, None, None
