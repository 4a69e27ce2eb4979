"""Stages of a byte-level model that generation runs one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from stlm_kernels import Patches

from ..config import ModelConfig
from ..layers.embedding import TiedEmbedding
from ..layers.kv_cache import CacheRows, KVCache
from ..layers.matches import MatchEmbedding
from ..layers.memory import TextMemory
from ..layers.modes import HasModes
from ..layers.ngrams import NgramPooling
from ..layers.packing import Packing
from ..layers.parallel_head import ParallelHead
from ..layers.patching import BytePatcher
from ..layers.pooling import BytePooling, ByteUnpooling, EmaUnpooling
from ..layers.transformer import SwiGLU


class ByteModel(HasModes, Protocol):
    """Parts and stages of an `STLM`, which documents them."""

    config: ModelConfig
    embedding: TiedEmbedding
    ngrams: NgramPooling | None
    ngrams_to_bytes: nn.Linear | None
    matches: MatchEmbedding | None
    memory: TextMemory | None
    patcher: BytePatcher
    encoder: nn.ModuleList
    encoder_feed_forward: SwiGLU | None
    pooling: BytePooling | None
    core: nn.Module
    head: ParallelHead | None
    to_core: nn.Linear
    from_core: nn.Linear
    unpooling: ByteUnpooling | EmaUnpooling
    decoder: nn.ModuleList
    decoder_feed_forward: SwiGLU | None
    to_output: nn.Linear

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    @property
    def is_flat(self) -> bool: ...

    def ngram_rows(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor | None: ...

    def own_states(
        self, embedded: Tensor, ngrams: Tensor | None, follows: Tensor | None = None
    ) -> Tensor: ...

    def encode(
        self,
        own: Tensor,
        cu_seqlens: Tensor | Packing | None,
        caches: Sequence[KVCache | CacheRows] | None = None,
    ) -> Tensor: ...

    def pool(
        self, byte_ids: Tensor, encoded: Tensor, patches: Patches, ngrams: Tensor | None
    ) -> list[Tensor]: ...

    def pool_states(self, encoded: Tensor, cu_patchlens: Tensor) -> Tensor: ...

    def core_inputs(self, pooled: Tensor, ngrams: Tensor | None = None) -> Tensor: ...

    def core_states(self, core_outputs: Tensor, core_inputs: Tensor) -> Tensor: ...

    def byte_inputs(self, states: Tensor, patches: Patches, encoded: Tensor) -> Tensor: ...

    def decode_slots(self, states: Tensor) -> Tensor: ...

    def decode(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None,
        caches: Sequence[KVCache | CacheRows] | None = None,
    ) -> Tensor: ...

    def output_states(self, x: Tensor) -> Tensor: ...
