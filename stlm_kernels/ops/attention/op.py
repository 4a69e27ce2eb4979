"""The public attention: contract, checks, dispatch, autograd and the registered op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library
from ..._dispatch import Impl, use_triton
from . import torch_impl
from .launch import declined_reasons, unsupported_reasons


def attention(
    q: Tensor,  # (B, T, H, K) or (T, H, K)
    k: Tensor,  # (B, T, H_kv, K) or (T, H_kv, K)
    v: Tensor,  # as k
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,  # (S+1,) int32
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Softmax self-attention: causal, windowed, over packed documents, with grouped key heads.

    out[t, h] = sum over s of softmax_s(scale * q[t, h] . k[s, g]) v[s, g] with g = h // (H / H_kv)
    and s running over what t sees: the rows of its sequence or document, causal those up to t,
    within a window those from t - window + 1 to t. With a softcap c the scores are
    c * tanh(scores / c); dropout then zeroes weights and divides the others by 1 - dropout_p.

    From `flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True, window_size=(w - 1, 0))`:
    `attention(q, k, v, cu_seqlens=cu, window=w)`; a window counts the row itself, and nobody needs
    the longest length. From `F.scaled_dot_product_attention(q, k, v, is_causal=True,
    enable_gqa=True)` with (B, H, T, K): `attention(*(x.transpose(1, 2) for x in (q, k,
    v))).transpose(1, 2)`, or leave out the transposes that the model made for SDPA.

    Args:
        q: (B, T, H, K), or packed (T, H, K); float32, bfloat16 or float16; float64 on the torch
            path.
        k: as q with H_kv heads, of which H is a multiple, in q's dtype; never expanded.
        v: as k.
        causal: a row sees no later row.
        window: how many rows a row sees, itself among them; at least 1, with causal only. None: all
            of its sequence or document.
        cu_seqlens: (S+1,) int32 document borders in rows of a packed q, from 0, non-decreasing, at
            most T. Rows from the last border on belong to no document: they are never read, even
            when they hold NaN; their output and gradients are zero. None: one document.
        scale: of the products; a finite number. None: K ** -0.5.
        softcap: a positive bound of the scores, or None.
        dropout_p: probability in [0, 1] that a weight is dropped. The seed is drawn from torch's
            generator of the device; forward and backward drop the same.
        impl: "auto", "triton" or "torch". The kernels are causal, take K = 16, 32, 48, 64 and 128,
            and know neither softcap nor dropout. "auto" leaves those calls to the torch path, and
            dense attention of 1024 rows or more with K >= 96 to SDPA (except under
            torch.use_deterministic_algorithms); nothing warns, `explain` says so.

    Returns:
        As q, in q's dtype, under autocast in the autocast dtype (float32 is then rounded when
        loaded).

    Raises:
        ValueError: a wrong type, dtype, shape, device, scalar or combination; on CPU in eager mode
            also offsets that do not start at 0, decrease, or end beyond T.
        NotImplementedError: impl="triton" cannot run this call; the message lists why.

    Numerics:
        Scores, softmax and sums in float32 (float64 for float64), each result rounded once; the
        same inputs give the same bits (with dropout: and the same seed). A NaN or an infinity
        reaches only rows that see it, forward and backward; what sees it may be NaN as a whole.
        Two exceptions keep neither promise beyond documents: SDPA on a GPU, where it serves dense
        calls, and dense calls of the torch path under compile. The kernels work in proportion to
        T times window and can be differentiated once, the torch path any number of times. With
        documents the torch path reads cu_seqlens (on a GPU: one synchronisation), except under
        compile, torch.func and for shapes alone, where without a window its work grows with T
        squared.

    Source: FlashAttention-2 (arXiv 2307.08691) for the online softmax and its backward; the
    two-kernel backward without atomics, and masks only at the edges, in this project's own form.
    """
    rows = ("B", "T") if isinstance(q, Tensor) and q.dim() == 4 else ("T",)
    _checks.require_tensor("q", q, (*rows, "H", "K"), _checks.FLOATS)
    (heads, width), dtypes = q.shape[-2:], _checks.activation_dtypes(q)
    _checks.require(heads >= 1 and width >= 1, "q", "H >= 1 and K >= 1", tuple(q.shape))
    _checks.require_tensor("k", k, (*q.shape[:-2], "H_kv", width), dtypes, q.device)
    kv_heads = k.shape[-2]
    divides = kv_heads >= 1 and heads % kv_heads == 0
    _checks.require(divides, "k", f"heads that divide the {heads} of q", kv_heads)
    _checks.require_tensor("v", v, tuple(k.shape), dtypes, q.device)
    _check_options(causal, window, scale, softcap, dropout_p)
    if cu_seqlens is not None:
        _checks.require(q.dim() == 3, "cu_seqlens", "None with a dense q", "a Tensor")
        _checks.require_offsets("cu_seqlens", cu_seqlens, q.device)
        if _checks.values_visible(cu_seqlens):
            _checks.check_offset_values("cu_seqlens", cu_seqlens, q.shape[0])
    kernels = use_triton(
        "attention", impl, q.device, unsupported_reasons, declined_reasons,
        q=q, k=k, v=v, causal=causal, window=window, cu_seqlens=cu_seqlens, scale=scale,
        softcap=softcap, dropout_p=dropout_p,
    )  # fmt: skip
    q, k, v = _library.distinct(q, k, v)
    out_dtype = _checks.output_dtype(q)
    q, factor = _checks.positive_scale(q, scale)
    packed = q.dim() == 3
    if packed:
        q, k, v = q[None], k[None], v[None]
    if kernels:
        out = _Attention.apply(q, k, v, cu_seqlens, window, factor, out_dtype)[0]
    else:
        options = torch_impl.Options(causal, window, factor, softcap, float(dropout_p))
        out = torch_impl.attention(q, k, v, cu_seqlens, options, out_dtype)
    return out[0] if packed else out


def _check_options(causal: Any, window: Any, scale: Any, softcap: Any, dropout_p: Any) -> None:
    _checks.require(isinstance(causal, bool), "causal", "a bool", repr(causal))
    if window is not None:
        _checks.require_int_at_least("window", window, 1)
        _checks.require(causal, "window", "None with causal=False", window)
    _checks.require_scale(scale)
    _checks.require_softcap(softcap)
    chance = _checks.is_number(dropout_p) and 0 <= dropout_p <= 1
    _checks.require_number(chance, "dropout_p", "a number in [0, 1]", dropout_p)


class _Attention(torch.autograd.Function):
    """Autograd over the registered ops; the scores are formed again in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        window: int | None,
        scale: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _FWD(q, k, v, cu_seqlens, window, scale, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, _, ctx.window, ctx.scale, _ = inputs
        out, lse, bounds = output
        ctx.mark_non_differentiable(lse, bounds)
        ctx.save_for_backward(q, k, v, out, lse, bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = _library.run_backward(
            _BWD, "attention", grads[0], *ctx.saved_tensors, ctx.window, ctx.scale
        )
        return dq, dk, dv, None, None, None, None


def _fwd_meta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    total, heads = q.shape[0] * q.shape[1], q.shape[2]
    lse = q.new_empty((heads, total), dtype=torch.float32)
    bounds = q.new_empty((2, 0 if cu_seqlens is None else total), dtype=torch.int32)
    return q.new_empty(q.shape, dtype=out_dtype), lse, bounds


def _bwd_meta(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _pairs(shape: Any, window: int | None) -> int:
    """Scores of all heads, as of one document a sequence: shapes say no more."""
    batch, length, heads, _ = shape
    reach = length if window is None else min(window, length)
    return batch * heads * (length * reach - reach * (reach - 1) // 2)


def _fwd_flops(q: Any, k: Any, v: Any, cu_seqlens: Any, window: Any, *_: Any, **__: Any) -> int:
    return 4 * _pairs(q, window) * q[3]


def _bwd_flops(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, bounds: Any, window: Any, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    return 10 * _pairs(q, window) * q[3]


_FWD = _library.register(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, SymInt? window, "
    "float scale, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    launcher="attention:launch_fwd",
    meta=_fwd_meta,
    flops=_fwd_flops,
)
_BWD = _library.register(
    "attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor bounds, SymInt? window, float scale) -> (Tensor, Tensor, Tensor)",
    launcher="attention:launch_bwd",
    meta=_bwd_meta,
    flops=_bwd_flops,
)
