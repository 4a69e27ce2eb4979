"""The byte-level model: bytes pooled into patches, a core over patches, a decoder over bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from stlm_kernels import Patches, segment_pool
from stlm_kernels.runtime import checked_ids

from .build import (
    decoder_blocks,
    encoder_blocks,
    initialise,
    matches_of,
    memory_of,
    ngram_mode,
    ngrams_of,
    patcher_of,
    pooling_of,
    unpooling_of,
)
from .config import BYTES, IGNORED, ModelConfig
from .generation.sampling import GenerationMixin
from .layers.embedding import TiedEmbedding, UntiedEmbedding, lookup
from .layers.inputs import check_inputs, check_patches
from .layers.kv_cache import CacheRows, KVCache
from .layers.memory import follower_rows
from .layers.norms import rms_norm
from .layers.packing import Packing, packing_of, targets_of_documents
from .layers.parallel_head import ParallelHead
from .layers.patching import BytePatcher, with_recurring_slots
from .layers.pooling import ByteUnpooling, EmaUnpooling
from .layers.transformer import PatchCore, TransformerBlock, run_blocks
from .layers.typed_call import typed_as


class STLM(GenerationMixin, nn.Module):
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

    >>> model = STLM(ModelConfig(core_layers=1, decoder_layers=1))
    >>> model(torch.tensor([[256, *b"bytes"]])).shape
    torch.Size([1, 6, 257])
    """

    # Of models with patches alone.
    patcher: BytePatcher
    to_core: nn.Linear
    core: nn.Module
    # Of models with patches whose output is autoregressive.
    from_core: nn.Linear
    unpooling: ByteUnpooling | EmaUnpooling

    def __init__(self, config: ModelConfig, core: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        table = TiedEmbedding if config.tied else UntiedEmbedding
        self.embedding = table(
            config.vocab_size,
            config.byte_dim,
            logit_scale=config.logit_scale,
            softcap=config.softcap,
        )
        self.ngrams, self.ngrams_to_bytes = ngrams_of(config)
        self.matches, self.memory = matches_of(config), memory_of(config)
        if self.is_flat and core is not None:
            raise ValueError('core: expected None with patch_rule "none", got a module')
        if not self.is_flat:
            self._add_patch_rate(PatchCore(config) if core is None else core)
        self.decoder, self.decoder_feed_forward = decoder_blocks(config)
        self.to_output = nn.Linear(config.byte_dim, config.byte_dim, bias=False)
        initialise(self)
        self.checkpointing = config.checkpointing

    @property
    def checkpointing(self) -> bool:
        """Keeping of the inputs of blocks alone in training: less memory, a second forward pass.

        Setting it holds for all blocks of the model, and of a core such as `PatchCore`.
        """
        return any(block.checkpointing for block in self._blocks())

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        for block in self._blocks():
            block.checkpointing = value

    def _blocks(self) -> list[TransformerBlock]:
        return [module for module in self.modules() if isinstance(module, TransformerBlock)]

    def _add_patch_rate(self, core: nn.Module) -> None:
        config = self.config
        self.patcher = patcher_of(config)
        self.encoder, self.encoder_feed_forward = encoder_blocks(config)
        self.pooling = pooling_of(config)
        self.to_core = nn.Linear(config.byte_dim, config.core_dim, bias=False)
        self.core = core
        self.head: ParallelHead | None = None
        if config.output == "parallel":
            assert config.slots is not None
            self.head = ParallelHead(config.core_dim, config.byte_dim, config.slots)
        else:
            self.from_core = nn.Linear(config.core_dim, config.byte_dim, bias=False)
            self.unpooling = unpooling_of(config)

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
        followers: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        byte_ids: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        patches: Patches | None = None,
        followers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        byte_ids: Tensor,  # (B, T) or (T,) integers
        targets: Tensor | None = None,  # as byte_ids
        *,
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
        patches: Patches | None = None,
        followers: Tensor | None = None,  # (T, sizes) int64
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the summed loss where targets are given.

        Args:
            byte_ids: (B, T), each row one document, or packed (T,); ids of the vocabulary, where
                256 stands before a document (of words: as their data has it). Right padding needs
                no mask: no earlier row sees it.
            targets: what logits[..., t] must predict; -100 is ignored. Nothing is shifted here.
            cu_seqlens: document boundaries of packed byte_ids; None is one document. Rows from its
                last entry on belong to no document: their targets are ignored, whatever they are.
            patches: from a loader or a rule of your own, for the flattened byte_ids.
            followers: from a loader: indices of the flattened byte_ids by `MatchEmbedding` and by a
                `TextMemory`, in training one of other texts: `stlm_models.training.recall`.

        Returns:
            logits (..., vocab_size) fp32 without the padded rows of the table, or
            (loss_sum, n_valid): nats over the targets not ignored, and their number, both 0-d.

        Raises:
            ValueError: for shapes that do not fit, dense byte_ids with cu_seqlens, and patches that
                would let a byte read what is not complete at it.
            IndexError: for ids or targets out of range (on the CPU).
        """
        if targets is not None:
            return self._loss(byte_ids, targets, cu_seqlens, patches, None, followers)
        check_inputs(byte_ids, None)
        packing = packing_of(byte_ids, cu_seqlens)
        return self.embedding.logits(self._run(byte_ids, packing, patches, followers)[0])

    def byte_loss(
        self,
        byte_ids: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        patches: Patches | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` with targets, where the 256 bytes alone have probability, as in generation.

        Special ids are never a target, so that what a model gives them is lost to the bytes. Of a
        model of words all ids are words, and this is `forward`.

        Raises:
            IndexError: for a target that is no byte (on the CPU), and as `forward`.
        """
        valid_vocab = BYTES if self.config.tokens == "bytes" else None
        return self._loss(byte_ids, targets, cu_seqlens, patches, valid_vocab)

    def _loss(
        self,
        byte_ids: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        patches: Patches | None,
        valid_vocab: int | None,
        followers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_inputs(byte_ids, targets)
        packing = packing_of(byte_ids, cu_seqlens)
        hidden, auxiliary = self._run(byte_ids, packing, patches, followers)
        counted = targets_of_documents(targets, None if cu_seqlens is None else packing)
        loss_sum, n_valid = self.embedding.loss(
            hidden, counted, ignore_index=IGNORED, valid_vocab=valid_vocab
        )
        return loss_sum if auxiliary is None else loss_sum + auxiliary() * n_valid, n_valid

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def hidden(
        self,
        byte_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        patches: Patches | None = None,
    ) -> Tensor:
        """The states that the output projection reads, (..., byte_dim); arguments as `forward`."""
        return self._run(byte_ids, packing_of(byte_ids, cu_seqlens), patches)[0]

    def _run(
        self,
        byte_ids: Tensor,
        packing: Packing,
        patches: Patches | None,
        followers: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """The states of `hidden`, and what gives the weighed auxiliary loss, where there is one."""
        flat = byte_ids.flatten()
        with checked_ids(flat, self.embedding.vocab_size):
            return self._run_checked(byte_ids, flat, packing, patches, followers)

    def _run_checked(
        self,
        byte_ids: Tensor,
        flat: Tensor,
        packing: Packing,
        patches: Patches | None,
        followers: Tensor | None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        embedded = self.embedding(flat)
        ngrams = self.ngram_rows(flat, packing.cu_seqlens)
        follows = follower_rows(self.matches, self.memory, flat, packing.cu_seqlens, followers)
        own = self.own_states(embedded, ngrams, follows)
        if self.is_flat:
            if patches is not None:
                raise ValueError('patches: expected None with patch_rule "none", got patches')
            return self._decode_as(byte_ids, own, packing), None
        patches = self._slots_of(patches, flat, packing)
        encoded = self.encode(own, packing)
        inputs = self.core_inputs(*self.pool(flat, encoded, patches, ngrams))
        states = self.core_states(self._core_outputs(inputs, patches), inputs)
        if self.head is None:
            x = self.byte_inputs(states, patches, encoded)
            return self._decode_as(byte_ids, x, packing), None
        slots = self.decode_slots(self.head.with_null(states)).flatten(0, 1)
        hidden = self.output_states(lookup(slots, self.head.next_rows(patches)))
        wanted = self.training and self.config.reconstruction_weight > 0
        return hidden.unflatten(0, byte_ids.shape), (
            partial(self._reconstruction, flat, inputs, patches) if wanted else None
        )

    def _slots_of(self, patches: Patches | None, byte_ids: Tensor, packing: Packing) -> Patches:
        if patches is None:
            max_patches = self.config.max_patches if self.training else None
            patches = self.patcher(byte_ids, packing.cu_seqlens, max_patches=max_patches)
        else:
            check_patches(patches, packing)
        return with_recurring_slots(patches) if isinstance(self.core, PatchCore) else patches

    def _core_outputs(self, inputs: Tensor, patches: Patches) -> Tensor:
        """Run the core over inputs (P, core_dim); slots of no patch give zeros, by ours itself."""
        packing = Packing(patches.cu_seqlens, len(inputs))
        if isinstance(self.core, PatchCore):
            return self.core(inputs, packing)
        return packing.clear(self.core(inputs, patches.cu_seqlens))

    def _decode_as(self, byte_ids: Tensor, x: Tensor, packing: Packing) -> Tensor:
        """Run the decoder over x (T, byte_dim), dense where byte_ids are."""
        return self.decode(x.unflatten(0, byte_ids.shape), packing if byte_ids.dim() == 1 else None)

    def _reconstruction(self, byte_ids: Tensor, inputs: Tensor, patches: Patches) -> Tensor:
        """Weighed mean nats of the bytes (T,) that the head finds in what the core was given."""
        assert self.head is not None
        slots = self.decode_slots(inputs).flatten(0, 1)
        rows = lookup(slots, self.head.own_rows(patches))
        counted = (patches.patch_ids >= 0) & (byte_ids < BYTES)
        targets = byte_ids.long().masked_fill(~counted, IGNORED)
        nats, count = self.embedding.loss(self.output_states(rows), targets, ignore_index=IGNORED)
        return self.config.reconstruction_weight * nats / count.clamp(min=1)

    # The stages of `hidden`, which `CachedRun` takes one by one.

    def ngram_rows(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor | None:
        """(T, ngram_dim) of packed ids (T,), where the config has n-grams."""
        return None if self.ngrams is None else self.ngrams.rows(byte_ids, cu_seqlens)

    def own_states(
        self, embedded: Tensor, ngrams: Tensor | None, follows: Tensor | None = None
    ) -> Tensor:
        """Return bytes' own states, of embeddings (..., byte_dim), n-gram and follower rows."""
        # Rows of the table are small, as an output projection wants them: patches would drown them.
        own = rms_norm(embedded)
        if follows is not None:
            own = own + follows
        if self.ngrams is None:
            return own
        project = self.ngrams.projection if self.is_flat else self.ngrams_to_bytes
        return own if project is None else own + project(ngrams)

    def encode(
        self,
        own: Tensor,
        cu_seqlens: Tensor | Packing | None,
        caches: Sequence[KVCache | CacheRows] | None = None,
    ) -> Tensor:
        """The states of bytes that the decoder adds, of their own states (..., byte_dim): causal.

        cu_seqlens and caches as in `Attention.forward`.
        """
        if self.config.encoder == "patch":
            return own
        return run_blocks(self.encoder, own, cu_seqlens, caches, self.encoder_feed_forward)

    def pool(
        self, byte_ids: Tensor, encoded: Tensor, patches: Patches, ngrams: Tensor | None
    ) -> list[Tensor]:
        """Pool the bytes of each patch: states (P, byte_dim), and n-grams (P, ngram_dim)."""
        if self.pooling is None:
            pooled = self.embedding.pool(byte_ids, patches, mode=self.config.pooling)
        else:
            pooled = self.pool_states(encoded, patches.cu_patchlens)
        if ngrams is None:
            return [pooled]
        mode = ngram_mode(self.config)
        return [pooled, segment_pool(ngrams, patches.cu_patchlens, mode=mode)]

    def pool_states(self, encoded: Tensor, cu_patchlens: Tensor) -> Tensor:
        """Pool states of `encode` (T, byte_dim) into one for each patch, (P, byte_dim)."""
        assert self.pooling is not None
        if self.config.encoder == "patch":
            shared = self.encoder_feed_forward
            encoded = run_blocks(self.encoder, encoded, cu_patchlens, None, shared)
        return self.pooling.pool(encoded, cu_patchlens)

    def core_inputs(self, pooled: Tensor, ngrams: Tensor | None = None) -> Tensor:
        """(P, core_dim) of what `pool` gives."""
        if self.ngrams is not None:
            pooled = pooled + self.ngrams.projection(ngrams)
        return rms_norm(self.to_core(pooled))

    def core_states(self, core_outputs: Tensor, core_inputs: Tensor) -> Tensor:
        """Normalise the core's outputs (P, core_dim), which have its inputs' shape."""
        expected, got = tuple(core_inputs.shape), tuple(core_outputs.shape)
        if got != expected:
            raise ValueError(f"core: expected states of {expected}, got {got}")
        return rms_norm(core_outputs)

    def byte_inputs(self, states: Tensor, patches: Patches, encoded: Tensor) -> Tensor:
        """The decoder's input: bytes' own states (T, byte_dim) and what they read of the core's."""
        patch_states = self.from_core(states)
        if isinstance(self.unpooling, EmaUnpooling):
            return self.unpooling(patch_states, states, patches, residual=encoded)
        return self.unpooling(patch_states, patches, residual=encoded)

    def decode_slots(self, states: Tensor) -> Tensor:
        """The parallel output's decoder: (N, core_dim) -> (N, L, byte_dim)."""
        assert self.head is not None
        x, boundaries = self.head(states)
        x = run_blocks(self.decoder, x, boundaries, None, self.decoder_feed_forward)
        return x.unflatten(0, (-1, self.head.slots))

    def decode(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None,
        caches: Sequence[KVCache | CacheRows] | None = None,
    ) -> Tensor:
        """The decoder over bytes, as x; cu_seqlens and caches as in `Attention.forward`."""
        shared = self.decoder_feed_forward
        return self.output_states(run_blocks(self.decoder, x, cu_seqlens, caches, shared))

    def output_states(self, x: Tensor) -> Tensor:
        """Return the states that the output projection reads, of the decoder's (..., byte_dim)."""
        return self.to_output(rms_norm(x))
