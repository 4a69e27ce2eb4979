"""The transformer block of byte and patch rate, and the core that is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .cache import CacheRows, KVCache
from .config import ModelConfig
from .norms import rms_norm


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TransformerBlock(nn.Module):
    """Pre-norm attention and SwiGLU on a residual stream, (B, T, D) or packed (T, D)."""

    def __init__(self, attention: Attention, hidden_dim: int) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = SwiGLU(attention.dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | CacheRows | None = None,
    ) -> Tensor:
        """See `Attention.forward`."""
        x = x + self.attention(rms_norm(x), cu_seqlens=cu_seqlens, cache=cache)
        return x + self.feed_forward(rms_norm(x))


class PatchCore(nn.Module):
    """A causal transformer over the patches of each document: (P, core_dim) -> (P, core_dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                Attention(
                    config.core_dim,
                    config.core_heads,
                    kv_heads=config.core_kv_heads,
                    qk_norm=config.qk_norm,
                    rope_base=config.rope_base,
                ),
                config.core_ff,
            )
            for _ in range(config.core_layers)
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        caches: Sequence[KVCache | CacheRows] | None = None,
    ) -> Tensor:
        """The patches of whole documents, or beside caches the next one of each row, (B, 1, D)."""
        return run_blocks(self.blocks, x, cu_seqlens, caches)

    def new_caches(self, batch: int) -> list[KVCache]:
        """Empty caches of the layers, for this many rows."""
        return new_caches(self.blocks, batch)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    cu_seqlens: Tensor | None,
    caches: Sequence[KVCache | CacheRows] | None,
) -> Tensor:
    """One block after another, each with its cache where there are caches."""
    for i, block in enumerate(blocks):
        x = block(x, cu_seqlens, None if caches is None else caches[i])
    return x


def new_caches(blocks: nn.ModuleList, batch: int) -> list[KVCache]:
    """An empty cache for each block."""
    return [cast(TransformerBlock, block).attention.new_cache(batch) for block in blocks]
