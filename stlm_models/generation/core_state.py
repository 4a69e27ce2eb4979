"""The core beside rows of texts that grow: the complete patches of each row are its memory."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..layers.transformer import PatchCore
from .block_run import BlockRun, caches_at


class CachedCore(Protocol):
    """The core over the complete patches of each row, which are its memory."""

    def start(self, rows: Tensor, x: Tensor, cu_seqlens: Tensor, is_open: Tensor) -> Tensor:
        """The core over packed documents x (P, D), one for each row, in place of what it had.

        The last patch of a document is forgotten again where it is_open (S,).
        """

    def append(self, rows: Tensor, x: Tensor) -> Tensor:
        """One more complete patch in each row: x (R, D) -> (R, D)."""


def cached_core(core: nn.Module, batch: int) -> CachedCore:
    if type(core) is PatchCore:
        return BlockCore(core, batch)
    return (
        _SteppedCore(core, batch) if hasattr(core, "new_caches") else _RecomputedCore(core, batch)
    )


class _SteppedCore:
    """A core with caches: a patch costs one row of each of its layers."""

    def __init__(self, core: Any, batch: int) -> None:
        self.core, self.caches = core, core.new_caches(batch)

    def start(self, rows: Tensor, x: Tensor, cu_seqlens: Tensor, is_open: Tensor) -> Tensor:
        out = self.core(x, cu_seqlens, caches_at(self.caches, rows))
        for cache in self.caches:
            cache.lens = cache.lens.index_add(0, rows, -is_open.int())
        return out

    def append(self, rows: Tensor, x: Tensor) -> Tensor:
        return self.core(x[:, None], None, caches_at(self.caches, rows))[:, 0]


class BlockCore(_SteppedCore):
    """A `PatchCore`, by the way of plain blocks where that will do."""

    def __init__(self, core: PatchCore, batch: int) -> None:
        super().__init__(core, batch)
        self.run = BlockRun(core.blocks, self.caches, core.feed_forward, core)

    def start(self, rows: Tensor, x: Tensor, cu_seqlens: Tensor, is_open: Tensor) -> Tensor:
        self.run.renew()
        return super().start(rows, x, cu_seqlens, is_open)

    def append(self, rows: Tensor, x: Tensor) -> Tensor:
        return self.run.step(x, rows)


class _RecomputedCore:
    """A core of the user's own: run over all complete patches of a row when one is added."""

    def __init__(self, core: nn.Module, batch: int) -> None:
        self.core = core
        self.inputs: list[Tensor] = [torch.empty(0)] * batch
        """(patches, D) of each row."""

    def start(self, rows: Tensor, x: Tensor, cu_seqlens: Tensor, is_open: Tensor) -> Tensor:
        ends = (cu_seqlens[1:] - is_open.int()).tolist()
        for row, begin, end in zip(rows.tolist(), cu_seqlens.tolist(), ends, strict=False):
            self.inputs[row] = x[begin:end]
        return self.core(x, cu_seqlens)

    def append(self, rows: Tensor, x: Tensor) -> Tensor:
        texts = []
        for row, patch in zip(rows.tolist(), x, strict=True):
            self.inputs[row] = torch.cat((self.inputs[row], patch[None]))
            texts.append(self.inputs[row])
        lengths = torch.tensor([0, *map(len, texts)], device=x.device)
        cu_seqlens = lengths.cumsum(0).int()
        return self.core(torch.cat(texts), cu_seqlens)[cu_seqlens[1:].long() - 1]
