"""The transformer block of byte and patch rate, and the core that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stlm_kernels import runtime, swiglu

from ..config import ModelConfig
from .attention import Attention
from .joined import Joined
from .kv_cache import CacheRows, KVCache
from .linear import is_plain, operands
from .norms import EPS, rms_norm
from .packing import Packing, Rows, cleared
from .typed_call import typed_as


class SwiGLU(Joined):
    """x + down(silu(gate(n)) * up(n)), where n is the RMS norm of x.

    >>> SwiGLU(64, 160)(torch.zeros(5, 64)).shape
    torch.Size([5, 64])
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.joined = {"gate_up": {"gate": hidden_dim, "up": hidden_dim}}
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain(self.gate_up) and is_plain(self.down)):
            gate, up = self.gate_up(rms_norm(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        # Under autocast a stream that came in fp32 stays in fp32.
        same = runtime.compute_dtype(x) == x.dtype
        read, (gate_up, down) = operands(x.flatten(0, -2), self.gate_up, self.down)
        out = swiglu(read, None, gate_up, down, residual=same, eps=EPS)
        if x.dim() > 2:
            # Not `view`: FSDP2 warns of a block whose result is one.
            out = torch.ops.aten._unsafe_view(out, x.shape)
        return out if same else x + out

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class TransformerBlock(nn.Module):
    """Pre-norm attention and SwiGLU on a residual stream, (B, T, D) or packed (T, D).

    Args:
        attention: of the stream's width.
        hidden_dim: of the SwiGLU; None: each call brings the one that several blocks share.

    >>> block = TransformerBlock(Attention(64, heads=4), 160)
    >>> block(torch.zeros(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    checkpointing = False
    """Keep nothing but the input for the backward pass, which runs the block again."""

    def __init__(self, attention: Attention, hidden_dim: int | None) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = None if hidden_dim is None else SwiGLU(attention.dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | CacheRows | None = None,
        feed_forward: SwiGLU | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """See `Attention.forward`."""
        x = self.attention(x, cu_seqlens=cu_seqlens, cache=cache, rows=rows, residual=True)
        own = feed_forward if self.feed_forward is None else self.feed_forward
        assert own is not None
        return own(x)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class PatchCore(nn.Module):
    """A causal transformer over the patches of each document: (P, core_dim) -> (P, core_dim).

    >>> core = PatchCore(ModelConfig(core_dim=64, core_layers=2))
    >>> core(torch.zeros(5, 64), torch.tensor([0, 2, 5], dtype=torch.int32)).shape
    torch.Size([5, 64])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks, self.feed_forward = build_blocks(
            lambda: Attention(
                config.core_dim,
                config.core_heads,
                kv_heads=config.core_kv_heads,
                qk_norm=config.qk_norm,
                rope_base=config.rope_base,
            ),
            config.core_ff,
            config.core_layers,
            share_ff=config.share_ff,
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None = None,
        caches: Sequence[KVCache | CacheRows] | None = None,
    ) -> Tensor:
        """The patches of whole documents, or beside caches the next one of each row, (B, 1, D)."""
        return run_blocks(self.blocks, x, cu_seqlens, caches, self.feed_forward)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def new_caches(self, batch: int) -> list[KVCache]:
        """Empty caches of the layers, for this many rows."""
        return new_caches(self.blocks, batch)


def build_blocks(
    attention: Callable[[], Attention], hidden_dim: int, layers: int, *, share_ff: bool
) -> tuple[nn.ModuleList, SwiGLU | None]:
    """Return that many blocks, and the SwiGLU of all of them, where they share one.

    It belongs to none of the blocks: so it is stored once, and FSDP2 can hold it in the group above
    theirs, where it is whole while each of them runs.
    """
    shared = share_ff and layers > 0
    blocks = nn.ModuleList(
        TransformerBlock(attention(), None if shared else hidden_dim) for _ in range(layers)
    )
    if not shared:
        return blocks, None
    return blocks, SwiGLU(cast(TransformerBlock, blocks[0]).attention.dim, hidden_dim)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    cu_seqlens: Tensor | Packing | None,
    caches: Sequence[KVCache | CacheRows] | None,
    feed_forward: SwiGLU | None = None,
) -> Tensor:
    """Run one block after another, each with its cache where there are caches.

    All blocks have heads of one width. A `Packing` shares its documents with other blocks.
    """
    if not len(blocks):
        return x
    first = cast(TransformerBlock, blocks[0]).attention
    rows = first.new_rows(x, cu_seqlens, None if caches is None else caches[0])
    unused = rows.unused
    if unused is not None:
        # No layer makes anything of zeros, so once is enough; and so it is on the way back.
        x, rows = cleared(x, unused), replace(rows, unused=None)
    for i, block in enumerate(blocks):
        cache = None if caches is None else caches[i]
        arguments = [x, rows.cu_seqlens, cache, feed_forward, rows]
        if block.checkpointing and caches is None and torch.is_grad_enabled():
            # No block draws random numbers.
            x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(*arguments)
    return x if unused is None else cleared(x, unused)


def new_caches(blocks: nn.ModuleList, batch: int) -> list[KVCache]:
    """An empty cache for each block."""
    return [cast(TransformerBlock, block).attention.new_cache(batch) for block in blocks]
