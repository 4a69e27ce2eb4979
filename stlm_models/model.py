"""The byte-level model: bytes pooled into patches, a core over patches, a decoder over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor, nn

from stlm_kernels import Patches

from . import decoding
from .attention import Attention
from .cache import CacheRows, KVCache
from .config import ModelConfig
from .inputs import check_inputs, check_patches, document_borders
from .layers import BytePatcher, ByteUnpooling, NgramPooling, TiedEmbedding
from .norms import rms_norm
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

    Raises:
        ValueError: for a core beside patch_rule "none", which has none.
    """

    # Of models with patches alone.
    patcher: BytePatcher
    to_core: nn.Linear
    core: nn.Module
    from_core: nn.Linear
    unpooling: ByteUnpooling

    def __init__(self, config: ModelConfig, core: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = TiedEmbedding(
            config.vocab_size,
            config.byte_dim,
            logit_scale=config.logit_scale,
            softcap=config.softcap,
        )
        self.ngrams = (
            NgramPooling(
                config.ngram_sizes, config.ngram_buckets, config.ngram_dim, config.byte_dim
            )
            if config.ngram_sizes
            else None
        )
        if self.is_flat and core is not None:
            raise ValueError('core: expected None with patch_rule "none", got a module')
        if not self.is_flat:
            self._add_patch_rate(PatchCore(config) if core is None else core)
        self.decoder = nn.ModuleList(_decoder_block(config) for _ in range(config.decoder_layers))
        self.to_output = nn.Linear(config.byte_dim, config.byte_dim, bias=False)
        _initialise(self)

    def _add_patch_rate(self, core: nn.Module) -> None:
        config = self.config
        self.patcher = BytePatcher(
            config.patch_rule, patch_size=config.patch_size, max_patch_len=config.max_patch_len
        )
        self.to_core = nn.Linear(config.byte_dim, config.core_dim, bias=False)
        self.core = core
        self.from_core = nn.Linear(config.core_dim, config.byte_dim, bias=False)
        self.unpooling = ByteUnpooling(config.byte_dim)

    @property
    def is_flat(self) -> bool:
        """No patches: the decoder runs over all positions and nothing else does."""
        return self.config.patch_rule == "none"

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
                256 stands before a document (of words: as their data has it). Right padding needs
                no mask: no earlier row sees it.
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
        check_inputs(byte_ids, targets)
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
        borders = document_borders(byte_ids, cu_seqlens)
        flat = byte_ids.flatten()
        if self.is_flat:
            if patches is not None:
                raise ValueError('patches: expected None with patch_rule "none", got patches')
            x = self.flat_inputs(flat, borders)
        else:
            x = self._patched_inputs(flat, borders, patches)
        dense = byte_ids.dim() == 2
        return self.decode(x.unflatten(0, byte_ids.shape), None if dense else borders)

    def _patched_inputs(
        self, byte_ids: Tensor, cu_seqlens: Tensor, patches: Patches | None
    ) -> Tensor:
        if patches is None:
            patches = self.patcher(byte_ids, cu_seqlens)
        else:
            check_patches(patches, cu_seqlens, byte_ids.shape[0])
        inputs = self.core_inputs(*self.pool(byte_ids, patches, cu_seqlens))
        patch_states = self.patch_states(self.core(inputs, patches.cu_seqlens), inputs)
        return self.byte_inputs(byte_ids, patch_states, patches)

    # The stages of `hidden`, which `CachedRun` takes one by one.

    def flat_inputs(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """A flat model's decoder input (T, byte_dim) of packed ids (T,)."""
        ngrams = None if self.ngrams is None else self.ngrams.rows(byte_ids, cu_seqlens)
        return self.position_inputs(self.embedding.embed(byte_ids), ngrams)

    def position_inputs(self, embedded: Tensor, ngrams: Tensor | None = None) -> Tensor:
        """The same of embeddings (T, byte_dim) and n-gram rows (T, ngram_dim)."""
        if self.ngrams is not None:
            embedded = embedded + self.ngrams.projection(ngrams)
        return rms_norm(embedded)

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
