"""Self-attention from stock PyTorch ops: causal, windowed, over packed documents.

No (T, T) mask is ever built: full attention runs document by document, windowed attention in blocks
of one window that see themselves and the block before.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import CacheRows, KVCache
from .config import check_heads
from .norms import HeadNorm

NO_DOCUMENT = -1
BEFORE_ALL = -2


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
        self.query_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()

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
        if cu_seqlens is None:
            if cache is None:
                return self._attend(x[None], None)[0]
            cu_seqlens = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device)
        used = int(cu_seqlens[-1])
        out = self._attend(x[None, :used], cu_seqlens, cache)[0]
        return F.pad(out, (0, 0, 0, x.shape[0] - used))

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for this many rows."""
        weight = self.key.weight
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        return KVCache(
            batch,
            self.kv_heads,
            self.head_dim,
            window=self.window,
            dtype=torch.get_autocast_dtype(device) if autocast else weight.dtype,
            device=weight.device,
        )

    def _attend(
        self, x: Tensor, cu_seqlens: Tensor | None, cache: KVCache | CacheRows | None = None
    ) -> Tensor:
        """x (B, T, D), where only B = 1 comes with documents and a cache."""
        positions = None
        if cu_seqlens is not None:
            rows = torch.arange(x.shape[1], device=x.device)
            positions = rows - document_starts(cu_seqlens, x.shape[1])
        q, k, v = self._heads(x, x.shape[1], positions)
        if cache is not None and cu_seqlens is not None:
            cache.fill(k[0], v[0], cu_seqlens)
        if x.numel() == 0:
            return torch.zeros_like(x)
        if self.window is not None and self.window < x.shape[1]:
            out = _windowed(q, k, v, self.window, cu_seqlens)
        else:
            out = _full(q, k, v, cu_seqlens)
        return self.output(out.flatten(-2))

    def _step(self, x: Tensor, cache: KVCache | CacheRows) -> Tensor:
        """x (B, 1, D), the next position of each row."""
        positions = cache.positions()
        if x.shape[:2] != (len(positions), 1):
            expected = f"({len(positions)}, 1, {self.dim}) beside a cache"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        q, k, v = self._heads(x, cache.longest + 1, positions[:, None])
        out = _decode_attention(q[:, 0], *cache.append(k[:, 0], v[:, 0]))
        return self.output(out.flatten(-2))[:, None]

    def _heads(
        self, x: Tensor, length: int, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, H_kv, K) of x (B, T, D).

        Positions (T,) or (B, T) lie below length; None is 0..length-1.
        """
        q = self.query(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.key(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.value(x).unflatten(-1, (self.kv_heads, self.head_dim))
        rotation = _rotation(q, self.rope_base, length, positions)
        q, k = _rotate(self.query_norm(q), *rotation), _rotate(self.key_norm(k), *rotation)
        return q, k, v


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """For each of `length` rows the first row of its document, (length,) int64."""
    rows = torch.arange(length, device=cu_seqlens.device)
    return cu_seqlens.long()[_document_ids(cu_seqlens, rows)]


def _document_ids(cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    # right=True steps over empty documents: a row belongs to the last one that starts at or before.
    return torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1


def _rotation(
    q: Tensor, base: float, length: int, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cos and sin, like q, at positions (...) below length or 0..length-1: (..., 1, K/2) each."""
    # Powers of two keep the number of tables small while texts grow byte by byte.
    size = 1 << (length - 1).bit_length()
    cos, sin = _rotary_tables(size, q.shape[-1], base, q.dtype, q.device)
    rows = slice(length) if positions is None else positions
    return cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of x (B, T, H, K)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


@functools.lru_cache(maxsize=16)
def _rotary_tables(
    length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, head_dim / 2)."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _full(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """q (B, T, H, K), k and v (B, T, H_kv, K) -> (B, T, H, K)."""
    if cu_seqlens is None:
        return _causal(q, k, v)
    # One call a document needs neither a mask nor padding to the longest one.
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    pieces = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(*piece) for piece in pieces], dim=1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def _decode_attention(
    q: Tensor,  # (B, H, K)
    k_cache: Tensor,  # (B, C, H_kv, K)
    v_cache: Tensor,  # (B, C, H_kv, K)
    cache_lens: Tensor,  # (B,) int32
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:  # (B, H, K)
    """One query of each row over the first cache_lens entries of its cache, or the last `window`
    of these; zeros where there are none.
    """
    slots = torch.arange(k_cache.shape[1], device=q.device)
    lens = cache_lens[:, None]
    held = slots < lens
    if window is not None:
        held &= slots >= lens - window
    k, v = k_cache.transpose(1, 2).to(q.dtype), v_cache.transpose(1, 2).to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=held[:, None, None], scale=scale, enable_gqa=grouped
    )
    return out[:, :, 0].masked_fill(lens[..., None] == 0, 0)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, cu_seqlens: Tensor | None) -> Tensor:
    """As `_full`, in blocks of `window` rows over themselves and the block before."""
    length, heads, head_dim = q.shape[1:]
    blocks = -(-length // window)
    tail = (0, 0, 0, 0, 0, blocks * window - length)
    q, k, v = (F.pad(x, tail).unflatten(1, (blocks, window)).transpose(2, 3) for x in (q, k, v))
    k, v = (_with_previous(x).repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    scores = (q * head_dim**-0.5) @ k.transpose(-1, -2)  # (B, blocks, H, window, 2 window)
    # In place: the product does not keep its result for the backward pass.
    scores += _window_mask(length, window, cu_seqlens, scores)
    out = scores.softmax(-1) @ v
    return out.transpose(2, 3).flatten(1, 2)[:, :length]


def _with_previous(x: Tensor) -> Tensor:
    """(B, blocks, H, W, K) -> (B, blocks, H, 2 W, K): the block before, zeros at first, and own."""
    before = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat((before, x), dim=3)


def _window_mask(length: int, window: int, cu_seqlens: Tensor | None, scores: Tensor) -> Tensor:
    """0 where a row may look, -inf elsewhere: (blocks, 1, window, 2 window), like scores."""
    blocks, device = -(-length // window), scores.device
    rows = torch.arange(length, device=device)
    documents = torch.zeros_like(rows) if cu_seqlens is None else _document_ids(cu_seqlens, rows)
    # Padding rows see each other, so that no row of scores is empty and turns into NaN.
    documents = F.pad(documents, (0, blocks * window - length), value=NO_DOCUMENT)
    keys = F.pad(documents, (window, 0), value=BEFORE_ALL).unfold(0, 2 * window, window)
    same = documents.view(blocks, window, 1) == keys[:, None]
    offsets = torch.arange(2 * window, device=device) - torch.arange(window, device=device)[:, None]
    allowed = same & (offsets > 0) & (offsets <= window)
    return scores.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)[:, None]
