"""The transformer block of byte and patch rate, and the core that is made of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
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

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        x = x + self.attention(rms_norm(x), cu_seqlens=cu_seqlens)
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

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, cu_seqlens)
        return x
