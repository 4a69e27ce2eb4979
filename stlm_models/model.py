"""The byte-level model: bytes pooled into patches, a core over patches, a decoder over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from stlm_kernels import Patches

from . import decoding
from .attention import Attention, document_starts
from .cache import CacheRows, KVCache
from .config import ModelConfig
from .layers import (
    BytePatcher,
    ByteUnpooling,
    NgramPooling,
    TiedEmbedding,
    dense_cu_seqlens,
)
from .norms import rms_norm
from .pooling import reads_ahead
from .transformer import PatchCore, TransformerBlock, run_blocks

IGNORED = -100
"""The target of a position that counts for nothing."""


class STLM(nn.Module):
    """A byte-pooled language model: logits[..., t] predict the byte after position t.

    Args:
        config: the shape.
        core: any module of your own in place of ours, `core(x (P, core_dim), cu_seqlens) ->
            (P, core_dim)`, causal over the patches of each document. Rows from cu_seqlens[-1] on
            are unused slots. Generation runs it over all complete patches of a text whenever one
            is added; a core that offers `new_caches` and takes caches as `PatchCore` does runs on
            the new patch alone.
    """

    def __init__(self, config: ModelConfig, core: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = TiedEmbedding(
            config.vocab_size,
            config.byte_dim,
            logit_scale=config.logit_scale,
            softcap=config.softcap,
        )
        self.patcher = BytePatcher(
            config.patch_rule, patch_size=config.patch_size, max_patch_len=config.max_patch_len
        )
        self.ngrams = (
            NgramPooling(
                config.ngram_sizes, config.ngram_buckets, config.ngram_dim, config.byte_dim
            )
            if config.ngram_sizes
            else None
        )
        self.to_core = nn.Linear(config.byte_dim, config.core_dim, bias=False)
        self.core = PatchCore(config) if core is None else core
        self.from_core = nn.Linear(config.core_dim, config.byte_dim, bias=False)
        self.unpooling = ByteUnpooling(config.byte_dim)
        self.decoder = nn.ModuleList(_decoder_block(config) for _ in range(config.decoder_layers))
        self.to_output = nn.Linear(config.byte_dim, config.byte_dim, bias=False)
        _initialise(self)

    @overload
    def forward(
        self,
        byte_ids: Tensor,
        targets: None = None,
        *,
        cu_seqlens: Tensor | None = None,
        patches: Patches | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        byte_ids: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        patches: Patches | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        byte_ids: Tensor,  # (B, T) or (T,) integers
        targets: Tensor | None = None,  # as byte_ids
        *,
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
        patches: Patches | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the summed loss where targets are given.

        Args:
            byte_ids: (B, T), each row one document, or packed (T,); ids of the vocabulary, where
                256 stands before a document. Right padding needs no mask: no earlier row sees it.
            targets: what logits[..., t] must predict; -100 is ignored. Nothing is shifted here.
            cu_seqlens: document borders of packed byte_ids; None is one document.
            patches: from a loader or a rule of your own, for the flattened byte_ids.

        Returns:
            logits (..., vocab_size) fp32 without the padded rows of the table, or
            (loss_sum, n_valid): nats over the targets not ignored, and their number, both 0-d.

        Raises:
            ValueError: for shapes that do not fit, dense byte_ids with cu_seqlens, and patches that
                would let a byte read what is not complete at it.
            IndexError: for ids or targets out of range (on the CPU).
        """
        _check_inputs(byte_ids, targets)
        hidden = self.hidden(byte_ids, cu_seqlens=cu_seqlens, patches=patches)
        if targets is None:
            return self.embedding.logits(hidden)
        return self.embedding.loss(hidden, targets, ignore_index=IGNORED)

    def hidden(
        self,
        byte_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        patches: Patches | None = None,
    ) -> Tensor:
        """The states that the output projection reads, (..., byte_dim); arguments as `forward`."""
        dense = byte_ids.dim() == 2
        borders = _document_borders(byte_ids, cu_seqlens)
        flat = byte_ids.flatten()
        if patches is None:
            patches = self.patcher(flat, borders)
        else:
            check_patches(patches, borders, flat.shape[0])
        inputs = self.core_inputs(*self.pool(flat, patches, borders))
        patch_states = self.patch_states(self.core(inputs, patches.cu_seqlens), inputs)
        x = self.byte_inputs(flat, patch_states, patches).unflatten(0, byte_ids.shape)
        return self.decode(x, None if dense else borders)

    # The stages of `hidden`, which `CachedRun` takes one by one.

    def pool(self, byte_ids: Tensor, patches: Patches, cu_seqlens: Tensor) -> list[Tensor]:
        """What the bytes of each patch amount to: embeddings (P, byte_dim), n-grams (P, dim)."""
        mode = self.config.pooling
        pooled = [self.embedding.pool(byte_ids, patches, mode=mode)]
        if self.ngrams is not None:
            pooled.append(self.ngrams.pool(byte_ids, patches, cu_seqlens, mode=mode))
        return pooled

    def core_inputs(self, pooled: Tensor, ngrams: Tensor | None = None) -> Tensor:
        """(P, core_dim) of what `pool` gives."""
        if self.ngrams is not None:
            pooled = pooled + self.ngrams.projection(ngrams)
        return rms_norm(self.to_core(pooled))

    def patch_states(self, core_outputs: Tensor, core_inputs: Tensor) -> Tensor:
        """What bytes read, (P, byte_dim), of what the core made of its inputs (P, core_dim)."""
        expected, got = tuple(core_inputs.shape), tuple(core_outputs.shape)
        if got != expected:
            raise ValueError(f"core: expected states of {expected}, got {got}")
        return self.from_core(rms_norm(core_outputs))

    def byte_inputs(self, byte_ids: Tensor, patch_states: Tensor, patches: Patches) -> Tensor:
        """The decoder's input (T, byte_dim): the bytes (T,) and the patch states that they read."""
        # Its rows are small, as an output projection wants them: unpooled states would drown them.
        own = rms_norm(self.embedding.embed(byte_ids))
        return self.unpooling(patch_states, patches, residual=own)

    def decode(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        caches: Sequence[KVCache | CacheRows] | None = None,
    ) -> Tensor:
        """The decoder over bytes, as x; cu_seqlens and caches as in `Attention.forward`."""
        return self.to_output(rms_norm(run_blocks(self.decoder, x, cu_seqlens, caches)))

    generate = decoding.generate
    generate_batch = decoding.generate_batch
    stream = decoding.stream


def _decoder_block(config: ModelConfig) -> TransformerBlock:
    attention = Attention(
        config.byte_dim,
        config.decoder_heads,
        kv_heads=config.decoder_kv_heads,
        window=config.decoder_window,
        qk_norm=config.qk_norm,
        rope_base=config.rope_base,
    )
    return TransformerBlock(attention, config.decoder_ff)


def _initialise(model: nn.Module) -> None:
    """Linear maps keep the scale of their input; residual branches and the output begin at zero.

    A byte's own state, sent back through the tied table, would predict that byte again: the map in
    between, at zero, lets the first step predict what is frequent instead.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(("attention.output", "feed_forward.down", "to_output")):
            nn.init.zeros_(module.weight)
        else:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def _check_inputs(byte_ids: Tensor, targets: Tensor | None) -> None:
    if byte_ids.dim() not in (1, 2):
        expected = "shape (B, T) or (T,)"
        raise ValueError(f"byte_ids: expected {expected}, got {tuple(byte_ids.shape)}")
    if byte_ids.is_floating_point() or byte_ids.dtype == torch.bool:
        raise ValueError(f"byte_ids: expected integers, got {byte_ids.dtype}")
    if targets is not None and targets.shape != byte_ids.shape:
        expected = f"the shape of byte_ids {tuple(byte_ids.shape)}"
        raise ValueError(f"targets: expected {expected}, got {tuple(targets.shape)}")


def _document_borders(byte_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens of the flattened byte_ids."""
    if byte_ids.dim() == 2:
        return dense_cu_seqlens(byte_ids, cu_seqlens)
    if cu_seqlens is None:
        length = byte_ids.shape[0]
        return torch.tensor([0, length], dtype=torch.int32, device=byte_ids.device)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: expected int32 (S+1,), got {got}")
    return cu_seqlens


def check_patches(patches: Patches, cu_seqlens: Tensor, length: int) -> None:
    """Refuse patches that do not belong to these bytes, or that would leak (values: CPU only).

    Raises:
        ValueError: naming the field, and for a leak the byte and the patch that it reads.
    """
    for name in ("patch_ids", "read_ids"):
        shape = tuple(getattr(patches, name).shape)
        if shape != (length,):
            raise ValueError(f"patches.{name}: expected shape ({length},), got {shape}")
    if patches.cu_seqlens.shape != cu_seqlens.shape:
        got = tuple(patches.cu_seqlens.shape)
        raise ValueError(f"patches.cu_seqlens: expected {tuple(cu_seqlens.shape)}, got {got}")
    if patches.read_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    read = patches.read_ids.long()
    foreign = patches.cu_patchlens[read.clamp(min=0)] < document_starts(cu_seqlens, length)
    wrong = (reads_ahead(patches) | (foreign & (read >= 0))).nonzero().flatten()
    if wrong.numel():
        at = int(wrong[0])
        patch = int(read[at])
        start, end = int(patches.cu_patchlens[patch]), int(patches.cu_patchlens[patch + 1])
        raise ValueError(
            "patches.read_ids: expected only patches of the own document that are complete at the"
            f" byte that reads them, got byte {at} reading patch {patch}, bytes {start} to"
            f" {end - 1}: it would see bytes that it must predict or that are not its own"
        )
