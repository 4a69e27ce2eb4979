"""Causal self-attention as a module: projections, norm, rotary positions, documents, cache."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stlm_kernels import attention, decode_attention, patch_attention, qk_norm_rope

from ..config import check_heads
from .kv_cache import CacheRows, KVCache
from .packing import document_starts
from .rotary import rotary_tables
from .typed_call import typed_as


class Attention(nn.Module):
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
        self.query = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.query_norm = nn.Parameter(torch.ones(self.head_dim)) if qk_norm else None
        self.key_norm = nn.Parameter(torch.ones(self.head_dim)) if qk_norm else None

    def forward(
        self,
        x: Tensor,  # (B, T, D) or (T, D)
        *,
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
        cache: KVCache | CacheRows | None = None,
    ) -> Tensor:  # as x
        """Attend within each row of a dense batch, or within each document of a packed one.

        Args:
            x: (B, T, D), or packed (T, D).
            cu_seqlens: document borders of a packed x; None is one document. Rows from
                cu_seqlens[-1] on give zeros and are not read.
            cache: from `new_cache`, of one row for each document of a packed x, which it then
                holds instead of what it held; or of B rows beside x (B, 1, D), their next position,
                which sees what the cache holds and joins it.

        Raises:
            ValueError: for a wrong shape, a dense x with cu_seqlens, or a cache of other rows.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.dim:
            expected = f"(B, T, {self.dim}) or (T, {self.dim})"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        if cache is not None and not isinstance(cache, KVCache | CacheRows):
            got = type(cache).__name__
            raise ValueError(f"cache: expected None or one from new_cache, got {got}")
        if x.dim() == 3:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: expected None with a dense x, got a tensor")
            return self._attend(x, None) if cache is None else self._step(x, cache)
        if cache is not None and cu_seqlens is None:
            cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
        return self._attend(x, cu_seqlens, cache)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for this many rows; it takes the dtype of the first keys it is given."""
        # Not `key.weight`: quantised linear maps keep integers there, or nothing.
        mine = next(chain(self.parameters(), self.buffers()), None)
        device = None if mine is None else mine.device
        return KVCache(batch, self.kv_heads, self.head_dim, window=self.window, device=device)

    def _attend(
        self, x: Tensor, cu_seqlens: Tensor | None, cache: KVCache | CacheRows | None = None
    ) -> Tensor:
        """x (B, T, D) or (T, D), of which only the latter comes with documents and a cache."""
        positions = unused = None
        if cu_seqlens is not None:
            rows = torch.arange(x.shape[0], device=x.device)
            positions = rows - document_starts(cu_seqlens, x.shape[0])
            # Their output and gradients are zero, but zero times NaN in a projection is not.
            unused = (rows >= cu_seqlens[-1])[:, None]
            x = x.masked_fill(unused, 0)
        q, k, v = self._heads(x, x.shape[-2], positions)
        if cache is not None and cu_seqlens is not None:
            cache.fill(k, v, cu_seqlens)
        out = self.output(self._mix(q, k, v, cu_seqlens).flatten(-2))
        return out if unused is None else out.masked_fill(unused, 0)  # nor is it on the way back

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return attention(q, k, v, window=self.window, cu_seqlens=cu_seqlens)

    def _step(self, x: Tensor, cache: KVCache | CacheRows) -> Tensor:
        """x (B, 1, D), the next position of each row."""
        positions = cache.positions()
        if x.shape[:2] != (len(positions), 1):
            expected = f"({len(positions)}, 1, {self.dim}) beside a cache"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        q, k, v = self._heads(x[:, 0], cache.longest + 1, positions)
        keys, values, lens = cache.append(k, v)
        out = decode_attention(q.to(keys.dtype), keys, values, lens)
        return self.output(out.to(q.dtype).flatten(-2))[:, None]

    def _heads(
        self, x: Tensor, length: int, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (..., T, H, K), keys and values (..., T, H_kv, K) of x (..., T, D).

        Positions (T,) lie below length; None is 0..length-1.
        """
        q = self.query(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.key(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.value(x).unflatten(-1, (self.kv_heads, self.head_dim))
        cos, sin = rotary_tables(length, self.head_dim, self.rope_base, x.device)
        q, k = qk_norm_rope(
            q, k, cos, sin, q_weight=self.query_norm, k_weight=self.key_norm, positions=positions
        )
        return q, k, v


class PatchAttention(Attention):
    """Attention of every byte to all bytes of its patch, later ones too: the leak rule applies.

    Arguments as `Attention`; beside x (T, D), cu_seqlens are the borders of the patches, and
    rotary positions count from the start of each patch. There is no window and no cache.
    """

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens: expected the borders of the patches, got None")
        return patch_attention(q, k, v, cu_seqlens)
