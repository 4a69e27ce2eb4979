"""Rows of ids that grow: where each stands in its text, by kind of model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stlm_kernels import Patches, ema_unpool, unpool

from ..build import ngram_mode
from ..layers.memory import follower_rows
from ..layers.packing import Packing
from ..layers.pooling import EmaUnpooling
from ..layers.transformer import new_caches
from .block_run import BlockRun, caches_at
from .core_state import cached_core
from .followers import IncrementalFollowers
from .pool_state import pool_of
from .stages import ByteModel
from .state import IncrementalNgrams, IncrementalPatcher, IncrementalPooling


class FlatRows:
    """A model without patches: the caches of its decoder, and the last ids for n-grams."""

    def __init__(self, model: ByteModel, batch: int) -> None:
        self.model, self.caches = model, new_caches(model.decoder, batch)
        self.decoder = BlockRun(model.decoder, self.caches, model.decoder_feed_forward)
        self.ngrams = ngram_state(model, batch)
        self.followers = IncrementalFollowers(model, batch)

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.ngrams is not None:
            self.ngrams.resume(rows, byte_ids, cu_seqlens)
        self.followers.resume(rows, byte_ids, cu_seqlens)
        model = self.model
        self.decoder.renew()
        ngrams = model.ngram_rows(byte_ids, cu_seqlens)
        follows = follower_rows(model.matches, model.memory, byte_ids, cu_seqlens)
        x = model.own_states(model.embedding.embed(byte_ids), ngrams, follows)
        out = model.decode(x, cu_seqlens, caches_at(self.caches, rows))
        return out[cu_seqlens[1:].long() - 1]

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        model, ngrams = self.model, None
        if model.ngrams is not None and self.ngrams is not None:
            ngrams = rows_at(model.ngrams.embed(self.ngrams.step(byte_ids)), rows)
        follows = self.followers.step(byte_ids, rows)
        x = model.own_states(model.embedding.embed(rows_at(byte_ids, rows)), ngrams, follows)
        return model.output_states(self.decoder.step(x, rows))


class PatchedRows:
    """A model with patches: where each row stands in its patch, and what its next bytes read."""

    def __init__(self, model: ByteModel, batch: int) -> None:
        config, device = model.config, model.embedding.weight.device
        self.model = model
        self.patches = IncrementalPatcher(
            batch,
            config.patch_rule,
            patch_size=config.patch_size,
            max_patch_len=config.max_patch_len,
            device=device,
        )
        self.pool = pool_of(model, batch)
        self.ngrams = ngram_state(model, batch)
        self.followers = IncrementalFollowers(model, batch)
        self.ngram_pool = IncrementalPooling(
            batch, config.ngram_dim, ngram_mode(config), device=device
        )
        self.core = cached_core(model.core, batch)
        # Blocks inside patches run when one is whole, or once for all of its slots.
        encoder = nn.ModuleList() if config.encoder == "patch" else model.encoder
        decoder = nn.ModuleList() if model.head is not None else model.decoder
        self.encoder_caches, self.caches = new_caches(encoder, batch), new_caches(decoder, batch)
        self.encoder = BlockRun(encoder, self.encoder_caches, model.encoder_feed_forward)
        self.decoder = BlockRun(decoder, self.caches, model.decoder_feed_forward)
        self.reads: Tensor | None = None
        """States that the next bytes read: (B, D) of patches or their running average, or of the
        slots of a parallel output (B, L, D).
        """

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        model = self.model
        assert self.reads is not None
        closed = self.patches.step(byte_ids)
        # The host waits for how many rows these are, and where bytes are kept for their room.
        closing = rows[rows_at(closed, rows)]
        embedded = model.embedding.embed(byte_ids)
        ngrams = None
        if model.ngrams is not None and self.ngrams is not None:
            ngrams = model.ngrams.embed(self.ngrams.step(byte_ids))
        follows = self.followers.step(byte_ids, rows)
        own_ngrams = None if ngrams is None else rows_at(ngrams, rows)
        own = model.own_states(rows_at(embedded, rows), own_ngrams, follows)
        encoded = self.encoder.step(own, rows)
        pooled = [self.pool.step(embedded, rows, encoded, closed, closing)]
        if ngrams is not None:
            self.ngram_pool.add(ngrams)
        if len(closing):
            if ngrams is not None:
                pooled.append(self.ngram_pool.take(closing, ngrams.dtype))
            inputs = model.core_inputs(*pooled)
            states = model.core_states(self.core.append(closing, inputs), inputs)
            self.reads[closing] = self._next_reads(states, self.reads[closing])
        if model.head is not None:
            return model.output_states(self.reads[rows, self.patches.lengths[rows].long()])
        x = encoded + rows_at(self.reads, rows)
        return model.output_states(self.decoder.step(x, rows))

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        model = self.model
        self.encoder.renew()
        self.decoder.renew()
        patches = model.patcher(byte_ids, cu_seqlens)
        last = cu_seqlens[1:].long() - 1
        self.patches.resume(rows, byte_ids, cu_seqlens, patches)
        open_bytes = self.patches.lengths[rows]
        caches = caches_at(self.encoder_caches, rows)
        ngrams = model.ngram_rows(byte_ids, cu_seqlens)
        follows = follower_rows(model.matches, model.memory, byte_ids, cu_seqlens)
        own = model.own_states(model.embedding.embed(byte_ids), ngrams, follows)
        packing = Packing(cu_seqlens, len(byte_ids))
        encoded = model.encode(own, packing, caches)
        pooled = model.pool(byte_ids, encoded, patches, ngrams)
        open_patches = patches.patch_ids[last]
        self.pool.resume(rows, pooled[0][open_patches], encoded, last, open_bytes)
        if self.ngrams is not None:
            self.ngram_pool.resume(rows, pooled[1][open_patches], open_bytes)
            self.ngrams.resume(rows, byte_ids, cu_seqlens)
        self.followers.resume(rows, byte_ids, cu_seqlens)
        inputs = model.core_inputs(*pooled)
        out = self.core.start(rows, inputs, patches.cu_seqlens, open_bytes > 0)
        states = model.core_states(out, inputs)
        if model.head is not None:
            reads = model.decode_slots(model.head.with_null(states)[patches.read_ids[last].long()])
            self._keep(rows, reads)
            return model.output_states(reads[torch.arange(len(rows)), open_bytes.long()])
        self._keep(rows, self._reads_at(patches.read_ids[last], states, patches))
        x = model.byte_inputs(states, patches, encoded)
        return model.decode(x, packing, caches_at(self.caches, rows))[last]

    def _reads_at(self, read_ids: Tensor, states: Tensor, patches: Patches) -> Tensor:
        """(R, D) of the patches that the ends of texts read, (R,)."""
        model, h = self.model, self.model.from_core(states)
        if isinstance(model.unpooling, EmaUnpooling):
            gates = model.unpooling.gates(states)
            return ema_unpool(h, gates, read_ids, cu_seqlens=patches.cu_seqlens)
        return unpool(h, read_ids, null_state=model.unpooling.null_state)

    def _next_reads(self, states: Tensor, before: Tensor) -> Tensor:
        """Return what rows read next, of core states (R, core_dim) and what they read before."""
        model = self.model
        if model.head is not None:
            return model.decode_slots(states)
        h = model.from_core(states)
        if isinstance(model.unpooling, EmaUnpooling):
            gates = model.unpooling.gates(states)[:, None]
            return gates * h + (1 - gates) * before
        return h

    def _keep(self, rows: Tensor, reads: Tensor) -> None:
        if self.reads is None:
            self.reads = reads
        else:
            self.reads[rows] = reads


def rows_at(x: Tensor, rows: Tensor) -> Tensor:
    """Return these rows of x (B, ...), ascending; all of them without a copy."""
    return x if len(rows) == len(x) else x[rows]


def ngram_state(model: ByteModel, batch: int) -> IncrementalNgrams | None:
    if model.ngrams is None:
        return None
    return IncrementalNgrams(batch, model.ngrams.sizes, device=model.embedding.weight.device)
