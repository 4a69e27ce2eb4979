"""A run of an `STLM` over texts that grow byte by byte: each byte costs one row of each byte layer.

The core runs once for each patch that closes, on the rows where one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stlm_kernels import Patches, ema_unpool, unpool

from ..build import ngram_mode
from ..config import BOS_ID
from ..layers.linear import keeping
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


class CachedRun:
    """Rows of ids that grow, and what `model.hidden` gives at the last id of each.

    It runs without gradients, but never in torch's inference mode: what is kept from there cannot
    be changed outside of it, nor can a module that keeps a tensor of its own be trained afterwards.

    Args:
        model: an `STLM`.
        windows: the ids of each row, at least one in each; rows may differ in length.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: ByteModel, windows: Sequence[list[int]]) -> None:
        self.model, self.device = model, model.embedding.weight.device
        self._weights: dict[Any, Tensor] = {}
        """Weights that were cast, for every step until the next restart."""
        batch = len(windows)
        self._rows: _Rows = FlatRows(model, batch) if model.is_flat else PatchedRows(model, batch)
        self.hidden = self._rows.start(self._index(range(batch)), *_packed(windows, self.device))
        """(B, D) the states before the output projection."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def restart(self, rows: Sequence[int], windows: Sequence[list[int]]) -> None:
        """Put these ids in place of all that these rows have seen; the others stay."""
        index = self._index(rows)
        self._weights.clear()
        self.hidden[index] = self._rows.start(index, *_packed(windows, self.device))

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, byte_ids: Tensor, rows: Sequence[int]) -> None:
        """Show one more id, of (B,), to each of these rows (ascending).

        A row that is left out must be restarted before it goes on.
        """
        index = self._index(rows)
        with keeping(self._weights):
            hidden = self._rows.step(byte_ids, index)
        if len(index) == len(self.hidden):
            self.hidden = hidden
        else:
            self.hidden[index] = hidden

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.int64, device=self.device)


class _Rows(Protocol):
    """State of each row, for a kind of model."""

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One packed run, in place of what these rows (R,) had seen: their last states (R, D)."""

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        """Show each of these rows (R,) its next id, of ids (B,), and return their states (R, D)."""


class FlatRows:
    """A model without patches: the caches of its decoder, and the last ids for n-grams."""

    def __init__(self, model: ByteModel, batch: int) -> None:
        self.model, self.caches = model, new_caches(model.decoder, batch)
        self.decoder = BlockRun(model.decoder, self.caches, model.decoder_feed_forward)
        self.ngrams = _ngram_state(model, batch)
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
            ngrams = _at(model.ngrams.embed(self.ngrams.step(byte_ids)), rows)
        follows = self.followers.step(byte_ids, rows)
        x = model.own_states(model.embedding.embed(_at(byte_ids, rows)), ngrams, follows)
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
        self.ngrams = _ngram_state(model, batch)
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
        closing = rows[_at(closed, rows)]
        embedded = model.embedding.embed(byte_ids)
        ngrams = None
        if model.ngrams is not None and self.ngrams is not None:
            ngrams = model.ngrams.embed(self.ngrams.step(byte_ids))
        follows = self.followers.step(byte_ids, rows)
        own_ngrams = None if ngrams is None else _at(ngrams, rows)
        own = model.own_states(_at(embedded, rows), own_ngrams, follows)
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
        x = encoded + _at(self.reads, rows)
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


def _at(x: Tensor, rows: Tensor) -> Tensor:
    """Return these rows of x (B, ...), ascending; all of them without a copy."""
    return x if len(rows) == len(x) else x[rows]


def _ngram_state(model: ByteModel, batch: int) -> IncrementalNgrams | None:
    if model.ngrams is None:
        return None
    return IncrementalNgrams(batch, model.ngrams.sizes, device=model.embedding.weight.device)


def _packed(windows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (T,) int32 and their boundaries (S+1,) int32."""
    ids = torch.tensor([i for window in windows for i in window], dtype=torch.int32, device=device)
    lengths = torch.tensor([0, *map(len, windows)], device=device)
    return ids, lengths.cumsum(0).int()


def advance(
    run: CachedRun,
    windows: Sequence[list[int]],
    ids: Tensor,  # (B,) integers
    rows: Sequence[int],
) -> None:
    """Show each of these rows (ascending) its next id, or the window that it goes on with.

    Args:
        windows: what each row sees, its next id included. One that has outgrown the context is
            cut by `fit_context`, in place.
        ids: of all rows; those of rows left out are not read.
    """
    context = run.model.config.context
    going = [i for i in rows if len(windows[i]) <= context]
    outgrown = [i for i in rows if len(windows[i]) > context]
    if going:
        run.step(ids, going)
    if outgrown:
        for i in outgrown:
            windows[i][:] = fit_context(run.model, windows[i])
        run.restart(outgrown, [windows[i] for i in outgrown])


def fit_context(model: ByteModel, window: list[int]) -> list[int]:
    """The window, or where it has outgrown the context its last half context or a little less.

    The cut falls on the first patch boundary there, so that no patch is torn; a text without a
    boundary there, and a flat model's, is cut at the half itself.
    """
    context = model.config.context
    if len(window) <= context:
        return window
    earliest = len(window) - context // 2
    if model.is_flat:
        return window[earliest:]
    starts = model.patcher(torch.tensor(window, dtype=torch.int16)).cu_patchlens[:-1]
    after = starts[starts >= earliest]
    return window[int(after[0]) if after.numel() else earliest :]


def check_writes_bytes(model: ByteModel) -> None:
    """Refuse a model that cannot go on byte by byte with a ValueError."""
    if model.config.tokens == "words":
        raise ValueError(
            'tokens: expected "bytes" to generate, got "words": the word model is a baseline that'
            " is judged by bits per byte and writes no bytes"
        )
    if model.config.patch_rule == "external":
        raise ValueError(
            'patch_rule: expected a rule to generate, got "external": the patches of bytes that are'
            " yet to be written are unknown"
        )


def lost_logits(peak: Tensor, place: str) -> FloatingPointError:
    """The error of logits to draw from whose maximum, 0-d, is no number."""
    return FloatingPointError(
        f"logits: expected numbers to draw from, got a maximum of {float(peak)} for {place}:"
        " check the model's parameters"
    )


def prompt_ids(prompt: bytes) -> list[int]:
    """Return the ids that a model is shown of a prompt: its bytes, or id 256 where it has none."""
    return [*prompt] or [BOS_ID]
