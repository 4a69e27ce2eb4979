"""attention in aten ops: SDPA where it fits, else blocks of queries over the keys that they see.

SDPA takes dense calls, and packed documents by their lengths (`documents`); windows on a CPU are
cut into blocks for it (`banded`). Its backward cannot be differentiated, so one that is itself
differentiated, or takes many gradients at once, goes through the plain composition. Other windows,
softcap and dropout, non-finite operands (of which SDPA lets masked ones through), torch.func, and
documents whose boundaries cannot be read (compile, shapes alone) go through blocks: a block of rows
meets one range of keys, so that memory stays small and the work of a window grows with T x window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import attention_blocks, autograd
from ..._torch.attention_blocks import Block, Rule
from ..._torch.casting import cast
from ..._torch.function import Function
from . import banded as bands
from . import cpu, documents
from .sight import Boundaries, Options, cutter, sight_of


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
    given = q, k, v
    q, k, v = (cast(x, out_dtype, compute) for x in given)
    with runtime.without_autocast(q):
        if banded and not _shows_masked_nan(options, q, k, v):
            out = _Banded.apply(q, k, v, cu_seqlens, options, out_dtype, *given)
        elif not by_sdpa:
            out = _in_blocks(q, k, v, boundaries, options)
        elif torch.compiler.is_compiling():
            out = _sdpa(q, k, v, options)
        elif _shows_masked_nan(options, q, k, v):
            out = _in_blocks(q, k, v, boundaries, options)
        else:
            out = _by_sdpa(q, k, v, boundaries, options, out_dtype, given)
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


def _by_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    options: Options,
    narrow: torch.dtype,
    given: Sequence[Tensor],
) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if boundaries.rows is None:
        return _SDPA.apply(q, k, v, options) if needs_grad else _sdpa(q, k, v, options)
    other = boundaries.rows if boundaries.keys is None else boundaries.keys
    sizes = q.shape[1], k.shape[1]
    plan = documents.plan(boundaries.rows, other, *sizes, options.causal, options.scale)
    if plan.mask_entries > documents.MASK_ENTRIES:
        return _in_blocks(q, k, v, boundaries, options)
    if needs_grad:
        return _Documents.apply(q, k, v, *boundaries, options, plan, narrow, *given)
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
    """SDPA of packed documents, with a backward of its own. What was given is kept, which other ops
    keep too, and cast again."""

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
        narrow: torch.dtype,
        *given: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.options, ctx.narrow = plan, options, narrow
        out, ctx.kept = documents.attend(*_flat(q, k, v), plan, keep=True)
        is_read = any(kept.lse is not None for kept in ctx.kept)
        ctx.save_for_backward(*given, out if is_read else None, cu_seqlens, cu_seqlens_k)
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, out, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
        q, k, v = _wide_again(given, ctx.narrow, grads[0])
        derived: Sequence[Tensor | None]
        if autograd.is_needed(*grads) or _shows_masked_nan(ctx.options, *grads):
            boundaries = Boundaries(cu_seqlens, cu_seqlens_k)
            derived = _gradients(grads[0], q, k, v, boundaries, ctx.options, None)
        else:
            grad = grads[0].flatten(0, 1)
            flat = documents.gradients(grad, *_flat(q, k, v), out, ctx.plan, ctx.kept)
            derived = [x[None] for x in flat]
        return *derived, *[None] * 8


def _wide_again(given: Sequence[Tensor], narrow: torch.dtype, grad: Tensor) -> list[Tensor]:
    """Operands as the forward had them, in a graph that leads to what was given."""
    with torch.enable_grad():
        return [cast(x, narrow, grad.dtype) for x in given]


class _Banded(torch.autograd.Function):
    """A window in blocks, whose backward cuts them again. What was given is kept, as above."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        options: Options,
        narrow: torch.dtype,
        *given: Tensor,
    ) -> Tensor:
        assert options.left is not None
        assert options.right is not None
        total, group = q.shape[0] * q.shape[1], q.shape[2] // k.shape[2]
        cut = bands.Bands.short(total, options.left, options.right, group)
        if cpu.takes_products(q):
            cut = cut.long()
        sight = sight_of(q, k, Boundaries(cu_seqlens, None), options)
        out, sums = bands.attend(*_flat(q, k, v), sight, cut, options.scale)
        ctx.cut, ctx.options, ctx.narrow = cut.long(), options, narrow
        is_read = sums is not None
        ctx.save_for_backward(*given, cu_seqlens, out if is_read else None, sums, *sight)
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, cu_seqlens, out, sums, start, end = ctx.saved_tensors
        q, k, v = _wide_again(given, ctx.narrow, grads[0])
        if autograd.is_needed(*grads) or _shows_masked_nan(ctx.options, *grads):
            boundaries = Boundaries(cu_seqlens, None)
            derived = _gradients(grads[0], q, k, v, boundaries, ctx.options, None)
        else:
            flat = bands.gradients(
                grads[0].flatten(0, 1), *_flat(q, k, v), out, sums,
                bands.Sight(start, end), ctx.cut, ctx.options.scale,
            )  # fmt: skip
            derived = tuple(dx.view(x.shape) for dx, x in zip(flat, (q, k, v), strict=True))
        return *derived, *[None] * 6


# Blocks


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, options: Options) -> Tensor:
    seed = None
    if options.dropout_p:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    if runtime.needs_composition(q, k, v):
        blocks = cutter(q, k, boundaries, options)(True)
        return _attend_plainly(q, k, v, blocks, _rule(options, seed))
    return _InBlocks.apply(q, k, v, *boundaries, options, seed)


def _rule(options: Options, seed: Tensor | None) -> Rule:
    return Rule(options.scale, options.softcap, options.dropout_p, seed)


def _flat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as one stream of rows, (B T, H, K)."""
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    options: Options,
    seed: Tensor | None,
) -> Sequence[Tensor | None]:
    blocks = cutter(q, k, boundaries, options)(attention_blocks.may_be_mixed(grad, q, k, v))
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
        blocks = cutter(q, k, boundaries, options)(attention_blocks.may_be_mixed(q, k, v))
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
