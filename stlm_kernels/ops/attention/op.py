"""The public attention: contract, checks, dispatch, autograd and the registered op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..._torch.attention_blocks import positive_scale
from . import torch_impl
from .config import Window, declined_reasons, sides, unsupported_reasons


@named_errors
def attention(
    q: Tensor,  # (B, T, H, K) or (T, H, K)
    k: Tensor,  # (B, T_kv, H_kv, K) or (T_kv, H_kv, K)
    v: Tensor,  # as k
    *,
    causal: bool = True,
    window: Window = None,
    cu_seqlens: Tensor | None = None,  # (S+1,) int32
    cu_seqlens_k: Tensor | None = None,  # (S+1,) int32
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Softmax self-attention: causal, windowed, over packed documents, with grouped key heads.

    out[t, h] = sum over s of softmax_s(scale * q[t, h] . k[s, g]) v[s, g] with g = h // (H / H_kv),
    s over the keys of t's sequence or document that `causal` and `window` leave; a softcap c makes
    scores c * tanh(scores / c). Where T_kv > T, the queries are the last positions.

    Args:
        q: (B, T, H, K), or packed (T, H, K); float32, bfloat16, float16; float64 on the torch path.
        k, v: (B, T_kv, H_kv, K), or packed (T_kv, H_kv, K), in q's dtype; H is a multiple of H_kv.
        causal: whether a position sees no later one.
        window: how many keys a position sees, its own included, >= 1 and causal only; or
            (left, right): how many before and after its own, >= 0, -1 or None for all. None: all.
        cu_seqlens: (S+1,) int32 document boundaries of a packed q: from 0, non-decreasing, at most
            T. Rows from the last on are never read and give zeros. None: one document.
        cu_seqlens_k: (S+1,) int32, those of k; keys >= queries in each. None: those of q.
        scale: a finite number. None: K ** -0.5.
        softcap: a finite number > 0, or None.
        dropout_p: probability in [0, 1] of dropping a weight, by torch's generator.
        impl: "auto", "triton" or "torch". Kernels: causal or window, K = 16, 32, 48, 64, 128, no
            softcap, no dropout; "auto" leaves dense K >= 96, T >= 1024 to SDPA (`explain`).

    Returns: a tensor shaped as q in q's dtype, under autocast in the autocast dtype.
    Raises: ValueError for a wrong type, dtype, shape, device or option, on CPU in eager mode also
        for bad boundaries; NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> q, kv = torch.randn(2, 9, 8, 32), torch.randn(2, 9, 2, 32)
    >>> attention(q, kv, kv, window=4).shape
    torch.Size([2, 9, 8, 32])

    Numerics: docs/numerics.md. Source: FlashAttention-2 (arXiv 2307.08691).
    """
    _check(q, k, v, causal, window, cu_seqlens, cu_seqlens_k, scale, softcap, dropout_p)
    if cu_seqlens is not None and runtime.values_visible(cu_seqlens):
        _check_boundaries(q.shape[0], k.shape[0], cu_seqlens, cu_seqlens_k)
    kernels = use_triton(
        "attention", impl, q.device, unsupported_reasons, declined_reasons,
        q=q, k=k, v=v, causal=causal, window=window, cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k, scale=scale, softcap=softcap, dropout_p=dropout_p,
    )  # fmt: skip
    q, k, v = _library.distinct(q, k, v)
    out_dtype = runtime.compute_dtype(q)
    q, factor = positive_scale(q, scale)
    reach = sides(causal, window)
    if kernels:
        return _Attention.apply(q, k, v, cu_seqlens, cu_seqlens_k, *reach, factor, out_dtype)[0]
    packed = q.dim() == 3
    if packed:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    options = torch_impl.Options(*reach, factor, softcap, float(dropout_p))
    out = torch_impl.attention(q, k, v, cu_seqlens, cu_seqlens_k, options, out_dtype)
    return out.squeeze(0) if packed else out


@_checks.once_per_signature
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: Window,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
) -> None:
    rows = ("B", "T") if isinstance(q, Tensor) and q.dim() == 4 else ("T",)
    _checks.require_tensor("q", q, (*rows, "H", "K"), _checks.FLOATS)
    (heads, width), dtypes = q.shape[-2:], runtime.activation_dtypes(q)
    if heads < 1 or width < 1:
        _checks.require(False, "q", "H >= 1 and K >= 1", tuple(q.shape))
    _checks.require_tensor("k", k, (*q.shape[:-3], "T_kv", "H_kv", width), dtypes, q.device)
    kv_heads = k.shape[-2]
    if kv_heads < 1 or heads % kv_heads:
        _checks.require(False, "k", f"heads that divide the {heads} of q", kv_heads)
    _checks.require_tensor("v", v, k.shape, dtypes, q.device)
    _check_options(causal, window, scale, softcap, dropout_p)
    _check_documents(q, k, cu_seqlens, cu_seqlens_k)


def _check_options(causal: Any, window: Any, scale: Any, softcap: Any, dropout_p: Any) -> None:
    if not isinstance(causal, bool):
        _checks.require(False, "causal", "a bool", repr(causal))
    _check_window(causal, window)
    _checks.require_scale(scale)
    _checks.require_softcap(softcap)
    chance = _checks.is_number(dropout_p) and 0 <= dropout_p <= 1
    _checks.require_number(chance, "dropout_p", "a number in [0, 1]", dropout_p)


def _check_window(causal: bool, window: Any) -> None:
    if isinstance(window, tuple | list):
        _checks.require(len(window) == 2, "window", "(left, right)", window)
        for side in window:
            if side is not None and not (_checks.is_number(side) and side == -1):
                _checks.require_int_at_least("window", side, 0)
    elif window is not None:
        _checks.require_int_at_least("window", window, 1)
        _checks.require(causal, "window", "None or (left, right) with causal=False", window)


def _check_documents(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    rows, keys = q.shape[-3], k.shape[-3]
    if cu_seqlens is None:
        _checks.require(cu_seqlens_k is None, "cu_seqlens_k", "None without cu_seqlens", "a Tensor")
        if keys < rows:  # the text of a symbolic size would build that size into a graph
            _checks.require(False, "k", f"at least the {rows} positions of q", keys)
        return
    _checks.require(q.dim() == 3, "cu_seqlens", "None with a dense q", "a Tensor")
    _checks.require_offsets("cu_seqlens", cu_seqlens, q.device)
    if cu_seqlens_k is not None:
        shape = cu_seqlens.shape
        _checks.require_tensor("cu_seqlens_k", cu_seqlens_k, shape, (torch.int32,), q.device)
    elif keys != rows:
        _checks.require(False, "k", f"the {rows} positions of q without cu_seqlens_k", keys)


def _check_boundaries(
    rows: int, keys: int, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None
) -> None:
    _checks.check_offset_values("cu_seqlens", cu_seqlens, rows)
    if cu_seqlens_k is not None and runtime.values_visible(cu_seqlens_k):
        _checks.check_offset_values("cu_seqlens_k", cu_seqlens_k, keys)
        _check_lengths(cu_seqlens, cu_seqlens_k)


def _check_lengths(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> None:
    lengths, key_lengths = cu_seqlens.diff(), cu_seqlens_k.diff()
    short = (key_lengths < lengths).nonzero().flatten().tolist()
    if short:
        at = short[0]
        expected = f"at least the {int(lengths[at])} positions of document {at}"
        _checks.require(False, "cu_seqlens_k", expected, f"{int(key_lengths[at])} keys")


def _fwd_meta(
    q: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[-2]
    total = math.prod(q.shape[:-2])
    lse = q.new_empty((heads, total), dtype=torch.float32)
    shape = (2, 0) if cu_seqlens is None else (4 if cu_seqlens_k is None else 2, total)
    bounds = q.new_empty(shape, dtype=torch.int32)
    return q.new_empty(q.shape, dtype=out_dtype), lse, bounds


def pairs_seen(rows: int, keys: int, left: int, right: int) -> int:
    """Scores of one head in a sequence whose rows are the last of its keys."""
    return rows + _clipped(keys, left) - _clipped(keys - rows, left) + _clipped(rows, right)


def _clipped(count: int, most: int) -> int:
    """The sum of min(i, most) over i < count."""
    below = min(count, most)
    return below * (below - 1) // 2 + (count - below) * most


def _pairs(q: Any, k: Any, left: int | None, right: int | None) -> int:
    """Scores of all heads, as of one document a sequence: shapes say no more."""
    *batch, rows, heads, _ = q
    keys = k[-3]
    left, right = (keys if side is None else side for side in (left, right))
    return math.prod(batch) * heads * pairs_seen(rows, keys, left, right)


_FWD = _library.register(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
    "SymInt? left, SymInt? right, float scale, ScalarType out_dtype) "
    "-> (Tensor out, Tensor lse, Tensor bounds)",
    launcher="attention:launch_fwd",
    meta=_fwd_meta,
    flops=lambda q, k, left, right: 4 * _pairs(q, k, left, right) * q[-1],
)
_BWD = _library.register(
    "attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor bounds, Tensor? cu_seqlens, Tensor? cu_seqlens_k, SymInt? left, SymInt? right, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    launcher="attention:launch_bwd",
    meta=lambda q, k, v: _library.empty_like(q, k, v),
    flops=lambda q, k, left, right: 10 * _pairs(q, k, left, right) * q[-1],
)
_Attention = _library.differentiable(
    _FWD,
    of=("q", "k", "v"),
    keep=_library.names_of(_BWD)[1:],
    gradients=lambda needs, *given: _BWD(*given),
)
