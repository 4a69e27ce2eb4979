"""find_patches in aten ops: a few scans and searches over (T,), no loop over documents or patches.

Between two natural boundaries the forced closes of `max_patch_len` are simply every
`max_patch_len`-th byte, because every natural boundary restarts the count: that makes the rule
a remainder instead of a recurrence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import segments

IDS = 257
"""256 bytes, and one id for all above, which no rule tells apart."""


class _Documents(NamedTuple):
    """The document of each byte; the values of bytes outside every document mean nothing."""

    inside: Tensor  # (T,) bool, False for bytes that belong to no document
    ids: Tensor  # (T,) int64, counted from 1; 0 before the first document
    starts: Tensor  # (T,) int32, first byte of the own document
    offsets: Tensor  # (S+1,) int32, clamped to [0, T]

    def spread(self, by_boundary: Tensor) -> Tensor:
        """(S+1,) -> (T,), to each byte what its document's first boundary has."""
        return F.pad(by_boundary, (1, 0)).index_select(0, self.ids)


def find_patches(
    byte_ids: Tensor,  # (T,) any integer dtype
    starts: Tensor | None,  # (T,) bool
    closes: Tensor | None,  # (T,) bool
    patch_size: int | None,
    max_patch_len: int | None,
    cu_seqlens: Tensor | None,  # (S+1,) int32
    max_patches: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """cu_patchlens, patch_ids, read_ids, n_patches, cu_seqlens in patches.

    Rule "fixed" is a `patch_size`; rule "space" is neither a mask nor a size.
    """
    positions = torch.arange(byte_ids.shape[0], dtype=torch.int32, device=byte_ids.device)
    if cu_seqlens is None:
        # Arithmetic on the device: torch.tensor([0, T]) would be a copy from the host.
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=byte_ids.device) * len(positions)
    documents = _documents(positions, cu_seqlens)
    begins = positions == documents.starts
    if starts is not None:
        begins = begins | starts
        closed = torch.zeros_like(begins)
    else:
        closed = _natural_closes(byte_ids, positions, documents, closes, patch_size)
    begins = begins | torch.roll(closed, 1)
    if max_patch_len is not None:
        forced = _forced_closes(positions, begins, max_patch_len)
        closed = closed | forced
        begins = begins | torch.roll(forced, 1)
    return _number_patches(begins & documents.inside, closed, positions, documents, max_patches)


def _documents(positions: Tensor, cu_seqlens: Tensor) -> _Documents:
    total = len(positions)
    offsets = segments.clamped_bounds(cu_seqlens, total)
    zero, end = offsets.new_zeros(1), offsets.new_full((1,), total)
    covering = torch.cat([zero, offsets, end])  # before the first document, ..., after all
    ids = segments.segment_of_row(covering, total)
    inside = (ids > 0) & (ids < len(offsets))
    documents = _Documents(inside, ids, positions, offsets)
    return documents._replace(starts=documents.spread(offsets))


def _natural_closes(
    byte_ids: Tensor,  # (T,)
    positions: Tensor,  # (T,) int32
    documents: _Documents,
    closes: Tensor | None,  # (T,) bool
    patch_size: int | None,
) -> Tensor:  # (T,) bool
    if closes is not None:
        return closes
    if patch_size is not None:
        return _is_multiple(positions - documents.starts + 1, patch_size)
    # A table of all ids that a rule tells apart costs less than comparing every byte six times.
    seen = runtime.values_visible(byte_ids)
    table = SPACELIKE if seen else _is_spacelike(torch.arange(IDS, device=byte_ids.device))
    known = byte_ids if byte_ids.dtype == torch.uint8 else byte_ids.clamp(0, IDS - 1)
    spacelike = table.index_select(0, known.int())
    has_predecessor = positions != documents.starts
    return spacelike & ~(has_predecessor & torch.roll(spacelike, 1))


def _is_spacelike(byte_ids: Tensor) -> Tensor:  # (T,) bool
    """Neither ASCII alphanumeric nor a UTF-8 continuation byte."""
    lowered = byte_ids | 0x20
    letter = (lowered >= ord("a")) & (lowered <= ord("z"))
    digit = (byte_ids >= ord("0")) & (byte_ids <= ord("9"))
    continuation = (byte_ids >= 0x80) & (byte_ids <= 0xBF)
    return ~(letter | digit | continuation)


SPACELIKE = _is_spacelike(torch.arange(IDS, device="cpu"))  # whatever torch's default device is
"""Table of the rule for each id; made once, where no device and no graph has one of its own."""


def _forced_closes(positions: Tensor, begins: Tensor, max_patch_len: int) -> Tensor:  # (T,)
    run_starts = (positions * begins).cummax(0).values
    return _is_multiple(positions - run_starts + 1, max_patch_len)


def _is_multiple(lengths: Tensor, size: int) -> Tensor:  # bool
    # No length reaches the largest int32; a larger size would lose its upper bits.
    return lengths % min(size, torch.iinfo(torch.int32).max) == 0


def _number_patches(
    begins: Tensor,  # (T,) bool, False outside every document
    closed: Tensor,  # (T,) bool
    positions: Tensor,  # (T,) int32
    documents: _Documents,
    max_patches: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    begun = begins.cumsum(0, dtype=torch.int32)  # patches begun at or before each byte
    begun_before = F.pad(begun, (1, 0))
    n_patches = begun_before[-1].clone()
    slots = int(n_patches) if max_patches is None else max_patches
    latest = begun - 1
    # Each patch writes where it begins; those beyond the slots, and all other bytes, write into one
    # place more. Unused slots, and the end of the last patch, are where the last document ends.
    place = torch.where(begins, latest, slots + 1).clamp_(max=slots + 1).long()
    first_bytes = documents.offsets[-1:].expand(slots + 2)
    cu_patchlens = first_bytes.scatter(0, place, positions)[:-1].contiguous()

    patch_ids = torch.where(documents.inside & (latest < slots), latest, -1)
    document_boundaries = begun_before[documents.offsets]
    complete = (latest - 1).add_(closed).clamp_(max=slots - 1)
    readable = documents.inside & (complete >= documents.spread(document_boundaries))
    read_ids = torch.where(readable, complete, -1)
    return cu_patchlens, patch_ids, read_ids, n_patches, document_boundaries.clamp(max=slots)
