"""Causal self-attention as a module: projections, norm, rotary positions, documents, cache."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import (
    attention,
    decode_attention,
    patch_attention,
    qk_norm_rope,
    qkv_rope,
    runtime,
)

from ..config import check_heads
from .joined import Joined
from .kv_cache import CacheRows, KVCache
from .linear import is_plain, operands
from .norms import EPS, rms_norm
from .packing import Packing, Rows, cleared
from .rotary import rotary_tables
from .typed_call import typed_as


class Attention(Joined):
    """Causal multi-head self-attention with rotary positions.

    Args:
        dim: width of the input and output.
        heads, kv_heads: query heads, and key/value heads (None: as many); query head h uses
            key/value head h // (heads / kv_heads).
        head_dim: width of a head; None is dim / heads.
        window: position t sees t - window + 1 .. t; None is every earlier position.
        qk_norm: RMS-normalise queries and keys per head, each with a learned gain.
        rope_base: of the rotary positions, which count from the start of each document.

    Raises:
        ValueError: for sizes that do not divide, or a window below 1.

    >>> layer = Attention(64, heads=4, kv_heads=2, window=8)
    >>> layer(torch.zeros(2, 5, 64)).shape  # two documents of five bytes
    torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        qk_norm: bool = True,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if window is not None and window < 1:
            raise ValueError(f"window: expected None or at least 1, got {window}")
        self.head_dim = check_heads("attention", dim, heads, kv_heads, head_dim)
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.window, self.rope_base = window, rope_base
        own, shared = heads * self.head_dim, kv_heads * self.head_dim
        self.joined = {"query_key_value": {"query": own, "key": shared, "value": shared}}
        self.query_key_value = nn.Linear(dim, own + 2 * shared, bias=False)
        self.output = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.query_norm = nn.Parameter(torch.ones(self.head_dim)) if qk_norm else None
        self.key_norm = nn.Parameter(torch.ones(self.head_dim)) if qk_norm else None

    def forward(
        self,
        x: Tensor,  # (B, T, D) or (T, D)
        *,
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
        cache: KVCache | CacheRows | None = None,
        rows: Rows | None = None,
        residual: bool = False,
    ) -> Tensor:  # as x
        """Attend within each row of a dense batch, or within each document of a packed one.

        Args:
            x: (B, T, D), or packed (T, D).
            cu_seqlens: document boundaries of a packed x; None is one document. Rows from
                cu_seqlens[-1] on give zeros and are not read.
            cache: from `new_cache`, of one row for each document of a packed x, which it then
                holds instead of what it held; or of B rows beside x (B, 1, D), their next position,
                which sees what the cache holds and joins it.
            rows: what layers over one stream share, of `new_rows` for this call; None makes it.
            residual: attend over the RMS norm of x, and add x to the result: what a block does, by
                fewer passes.

        Raises:
            ValueError: for a wrong shape, a dense x with cu_seqlens, or a cache of other rows.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.dim:
            expected = f"(B, T, {self.dim}) or (T, {self.dim})"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        if cache is not None and not isinstance(cache, KVCache | CacheRows):
            got = type(cache).__name__
            raise ValueError(f"cache: expected None or one from new_cache, got {got}")
        if x.dim() == 3 and cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None with a dense x, got a tensor")
        if x.dim() == 3 and cache is not None:
            return self._step(x, cache, rows, residual)
        if cache is not None and cu_seqlens is None:
            cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
        rows = self.new_rows(x, cu_seqlens) if rows is None else rows
        return self._attend(x, rows, cache, residual)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for this many rows; it takes the dtype of the first keys it is given."""
        # Not the maps' weights: quantised linear maps keep integers there, or nothing.
        own = next(chain(self.parameters(), self.buffers()), None)
        device = None if own is None else own.device
        return KVCache(batch, self.kv_heads, self.head_dim, window=self.window, device=device)

    def new_rows(
        self,
        x: Tensor,  # (B, T, D) or (T, D)
        cu_seqlens: Tensor | Packing | None = None,  # (S+1,) int32
        cache: KVCache | CacheRows | None = None,
    ) -> Rows:
        """Return what all layers of these heads and rotary positions share over x.

        Args:
            x, cu_seqlens: as in `forward`; a `Packing` shares it further.
            cache: beside x (B, 1, D).
        """
        if x.dim() == 3 and cache is not None:
            positions = cache.positions()
            cos, sin = self._tables(cache.longest + 1, x.device)
            return Rows(cos[positions], sin[positions], slots=cache.next_slots())
        if cu_seqlens is None:
            return Rows(*self._tables(x.shape[-2], x.device))
        packing = Packing(cu_seqlens, len(x)) if isinstance(cu_seqlens, Tensor) else cu_seqlens
        return packing.rows(self.head_dim, self.rope_base)

    def _tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return rotary_tables(length, self.head_dim, self.rope_base, device)

    def _attend(
        self, x: Tensor, rows: Rows, cache: KVCache | CacheRows | None, residual: bool
    ) -> Tensor:
        """Attend over x (B, T, D) or (T, D); only the latter has documents and a cache."""
        if rows.unused is not None:
            # Their output and gradients are zero, but zero times NaN in a projection is not.
            x = cleared(x, rows.unused)
        q, k, v, x = self._heads(x, rows, residual)
        if cache is not None and rows.cu_seqlens is not None:
            cache.fill(k, v, rows.cu_seqlens)
        out = self._projected(self._mix(q, k, v, rows.cu_seqlens), x if residual else None)
        # Nor is it on the way back.
        return out if rows.unused is None else cleared(out, rows.unused)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return attention(q, k, v, window=self.window, cu_seqlens=cu_seqlens)

    def _step(
        self, x: Tensor, cache: KVCache | CacheRows, rows: Rows | None, residual: bool
    ) -> Tensor:
        """Attend from x (B, 1, D), the next position of each row."""
        batch = len(cache.positions())
        if x.shape[:2] != (batch, 1):
            expected = f"({batch}, 1, {self.dim}) beside a cache"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        rows = self.new_rows(x, cache=cache) if rows is None else rows
        x = x[:, 0]
        q, k, v, x = self._heads(x, rows, residual)
        keys, values, lens = cache.append(k, v, slots=rows.slots)
        out = decode_attention(q.to(keys.dtype), keys, values, lens)
        return self._projected(out.to(q.dtype), x if residual else None)[:, None]

    def _heads(self, x: Tensor, rows: Rows, normed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries (..., T, H, K), keys and values (..., T, H_kv, K) of x (..., T, D), which
        is normalised first if `normed`; and x, to be added to what comes of them."""
        if normed and is_plain(self.query_key_value):
            read, (weight,) = operands(x, self.query_key_value)
            q, k, v, same = qkv_rope(
                read,
                None,
                weight,
                rows.cos,
                rows.sin,
                heads=self.heads,
                kv_heads=self.kv_heads,
                q_weight=self.query_norm,
                k_weight=self.key_norm,
                residual=True,
                eps=EPS,
            )
            return q, k, v, same if read is x else x
        product = self.query_key_value(rms_norm(x) if normed else x)
        by_head = product.unflatten(-1, (-1, self.head_dim))
        q, k, v = by_head.split([self.heads, self.kv_heads, self.kv_heads], -2)
        q, k = qk_norm_rope(
            q, k, rows.cos, rows.sin, q_weight=self.query_norm, k_weight=self.key_norm
        )
        return q, k, v, x

    def _projected(self, mixed: Tensor, residual: Tensor | None) -> Tensor:
        """Return the output (..., D) of what the heads made, (..., H, K), plus the residual."""
        mixed = mixed.flatten(-2)
        if residual is None:
            return self.output(mixed)
        if not is_plain(self.output):
            return residual + self.output(mixed)
        mixed, (weight,) = operands(mixed, self.output)
        # A sum in 16 bits would lose what an fp32 residual holds.
        if residual.dtype != runtime.compute_dtype(mixed):
            return residual + F.linear(mixed, weight)
        flat = mixed.flatten(0, -2)
        return torch.addmm(residual.flatten(0, -2), flat, weight.t()).view(residual.shape)


class PatchAttention(Attention):
    """Attention of every byte to all bytes of its patch, later ones too: the leak rule applies.

    Arguments as `Attention`; beside x (T, D), cu_seqlens are the boundaries of the patches, and
    rotary positions count from the start of each patch. There is no window and no cache.

    >>> cu_patchlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> PatchAttention(64, heads=4)(torch.zeros(5, 64), cu_seqlens=cu_patchlens).shape
    torch.Size([5, 64])
    """

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens: expected the boundaries of the patches, got None")
        return patch_attention(q, k, v, cu_seqlens)
