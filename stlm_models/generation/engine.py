"""A run of an `STLM` over texts that grow byte by byte: each byte costs one row of each byte layer.

The core runs once for each patch that closes, on the rows where one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import BOS_ID
from ..layers.linear import keeping
from .host_rows import rows_of
from .stages import ByteModel


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
        self._rows: _Rows = rows_of(model, batch)
        self._every = torch.arange(batch, device=self.device)
        self.hidden = self._rows.start(self._every, *_packed(windows, self.device))
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
        if len(rows) == len(self._every):
            return self._every
        return torch.tensor(list(rows), dtype=torch.int64, device=self.device)


class _Rows(Protocol):
    """State of each row, for a kind of model."""

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One packed run, in place of what these rows (R,) had seen: their last states (R, D)."""

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        """Show each of these rows (R,) its next id, of ids (B,), and return their states (R, D)."""


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
