"""The public decode_attention: contract, checks, dispatch and the registered op."""

from __future__ import annotations

from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from . import torch_impl
from .config import unsupported_reasons


@named_errors
def decode_attention(
    q: Tensor,  # (B, H, K)
    k_cache: Tensor,  # (B, C, H_kv, K)
    v_cache: Tensor,  # (B, C, H_kv, K)
    cache_lens: Tensor,  # (B,) int32
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of the newest position of each sequence to the entries of its cache.

    out[b, h] = sum over s of softmax_s(z[s]) v_cache[b, s, g] with g = h // (H / H_kv),
    z[s] = scale * q[b, h] . k_cache[b, s, g], then softcap * tanh(z / softcap), and s running over
    the last `window` of the first cache_lens[b] entries.

    Args:
        q: (B, H, K) float32, bfloat16 or float16; float64 on the torch path.
        k_cache: (B, C, H_kv, K) in q's dtype; H is a multiple of H_kv. Any strides but the last,
            which is 1: a view of a larger buffer is not copied.
        v_cache: (B, C, H_kv, K) in q's dtype, likewise.
        cache_lens: (B,) int32 entries in use, the newest position included, which is written
            already. Others are never read. 0 gives zeros.
        window: an int >= 1, the newest position included. None: all entries.
        scale: a finite number. None: K ** -0.5.
        softcap: a finite number > 0, or None.
        impl: "auto", "triton" or "torch". The kernels take K from 16 to 128 in steps of 8.

    Returns: (B, H, K) in q's dtype, under autocast in the autocast dtype; it never requires a
        gradient.
    Raises: ValueError for a wrong type, dtype, shape, device or option; IndexError, on CPU in eager
        mode, for a length outside [0, C] (clamped elsewhere); NotImplementedError where
        impl="triton" cannot run, with all reasons.

    >>> cache, lengths = torch.randn(2, 64, 4, 16), torch.tensor([5, 64], dtype=torch.int32)
    >>> decode_attention(torch.randn(2, 8, 16), cache, cache, lengths).shape
    torch.Size([2, 8, 16])

    Numerics: docs/numerics.md. Source: the split over the cache is flash-decoding's
    (Dao et al., 2023).
    """
    _check(q, k_cache, v_cache, cache_lens, window, scale, softcap)
    capacity, width = k_cache.shape[1], q.shape[2]
    if runtime.values_visible(cache_lens):
        _checks.check_id_values("cache_lens", cache_lens, 0, capacity + 1)
    out_dtype = runtime.compute_dtype(q)
    arguments = (
        q.detach(), k_cache.detach(), v_cache.detach(), cache_lens,
        capacity if window is None else min(window, capacity),
        width**-0.5 if scale is None else float(scale), float(softcap or 0.0), out_dtype,
    )  # fmt: skip
    if use_triton(
        "decode_attention", impl, q.device, unsupported_reasons,
        q=q, k_cache=k_cache, v_cache=v_cache, cache_lens=cache_lens,
        window=window, scale=scale, softcap=softcap,
    ):  # fmt: skip
        return _attend(*arguments)
    return torch_impl.decode_attention(*arguments)


@_checks.once_per_signature
def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> None:
    _checks.require_tensor("q", q, ("B", "H", "K"), _checks.FLOATS)
    (batch, heads, width), dtypes = q.shape, runtime.activation_dtypes(q)
    if heads < 1 or width < 1:
        _checks.require(False, "q", "H >= 1 and K >= 1", tuple(q.shape))
    _checks.require_tensor("k_cache", k_cache, (batch, "C", "H_kv", width), dtypes, q.device)
    kv_heads = k_cache.shape[2]
    if kv_heads < 1 or heads % kv_heads:
        _checks.require(False, "k_cache", f"heads that divide the {heads} of q", kv_heads)
    _checks.require_tensor("v_cache", v_cache, k_cache.shape, dtypes, q.device)
    _checks.require_tensor("cache_lens", cache_lens, (batch,), _checks.OFFSET_DTYPES, q.device)
    if window is not None:
        _checks.require_int_at_least("window", window, 1)
    _checks.require_scale(scale)
    _checks.require_softcap(softcap)


_FWD = _library.register(
    "decode_attention_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lens, "
    "SymInt window, float scale, float softcap, ScalarType out_dtype) -> Tensor",
    launcher="decode_attention:launch_fwd",
    meta=lambda q, out_dtype: q.new_empty(q.shape, dtype=out_dtype),
    # Two products over as many entries as a query may see.
    flops=lambda q, window: 4 * q[0] * q[1] * q[2] * window,
)
_attend = _library.direct(_FWD)
