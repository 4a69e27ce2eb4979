"""Packed documents: their boundaries, and what all layers over one stream of rows share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import IGNORED
from .kv_cache import Slots
from .rotary import rotary_tables


@dataclass(frozen=True)
class Rows:
    """Rows of a stream as a layer of attention reads them.

    No tuple, in which FSDP2 would cast the tables with other inputs of a block.

    Args:
        cos, sin: (T or more, K/2) float32, the rotary position of each row.
        cu_seqlens: (S+1,) int32 documents of packed rows; None for dense or cached ones.
        unused: (T, 1) bool, packed rows of no document.
        slots: places of cached rows in the caches of all layers.
    """

    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor | None = None
    unused: Tensor | None = None
    slots: Slots | None = None


class Packing:
    """Documents of a packed stream: computed once, at first use, and handed to every layer.

    Args:
        cu_seqlens: (S+1,) int32 document boundaries; rows from the last entry on belong to none.
        length: rows T of the stream.
    """

    def __init__(self, cu_seqlens: Tensor, length: int) -> None:
        self.cu_seqlens, self.length = cu_seqlens, length
        self._starts: Tensor | None = None
        self._unused: Tensor | None = None
        self._rows: dict[tuple[int, float], Rows] = {}

    def starts(self) -> Tensor:
        """Return the first row of each row's document, (T,) int64."""
        if self._starts is None:
            self._starts = document_starts(self.cu_seqlens, self.length)
        return self._starts

    def unused(self) -> Tensor:
        """Return the rows that belong to no document, (T, 1) bool."""
        if self._unused is None:
            self._unused = unused_rows(self.cu_seqlens, self.length)
        return self._unused

    def rows(self, head_dim: int, base: float) -> Rows:
        """Return what layers of this width of a head and base of rotary positions read."""
        if (head_dim, base) not in self._rows:
            places = torch.arange(self.length, device=self.cu_seqlens.device)
            # Boundaries that are none are refused by attention; here they only must index.
            positions = (places - self.starts()).clamp(min=0)
            cos, sin = rotary_tables(self.length, head_dim, base, positions.device)
            rows = Rows(cos[positions], sin[positions], self.cu_seqlens, self.unused())
            self._rows[head_dim, base] = rows
        return self._rows[head_dim, base]

    def clear(self, x: Tensor) -> Tensor:
        """Return x (T, D) with zeros in unused rows: see `cleared`."""
        return cleared(x, self.unused())


def cleared(
    x: Tensor,  # (T, D)
    unused: Tensor,  # (T, 1) bool
) -> Tensor:
    """Return x with zeros in unused rows, and so its gradient, whatever they hold, NaN even.

    Nothing reads them, but in the gradient of a linear map zero times NaN is not zero.
    """
    return torch.where(unused, 0.0, x)  # one launch, where masked_fill copies first


def packing_of(byte_ids: Tensor, cu_seqlens: Tensor | None) -> Packing:
    """Return the packing of the flattened byte_ids (B, T) or (T,)."""
    if byte_ids.dim() == 2:
        return Packing(dense_cu_seqlens(byte_ids, cu_seqlens), byte_ids.numel())
    if cu_seqlens is None:
        return Packing(dense_cu_seqlens(byte_ids[None]), len(byte_ids))
    require_type(cu_seqlens, Tensor, "cu_seqlens", "a tensor")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: expected int32 (S+1,), got {got}")
    return Packing(cu_seqlens, len(byte_ids))


def dense_cu_seqlens(byte_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Document boundaries of dense (B, T) ids, whose rows are the documents."""
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None with dense byte_ids, got a tensor")
    rows, length = byte_ids.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=byte_ids.device) * length


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the first row of the document of each of `length` rows, (length,) int64."""
    rows = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # right=True steps over empty documents: as many end at or before a row as lie before its own.
    return cu_seqlens[torch.searchsorted(cu_seqlens[1:], rows, right=True)].long()


def unused_rows(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the rows from the last boundary on, which belong to no document, (length, 1) bool."""
    return (torch.arange(length, device=cu_seqlens.device) >= cu_seqlens[-1])[:, None]


def recurring_size(count: int) -> int:
    """Return the least number from `count` on that is one of few, at most a sixteenth more.

    oneDNN, by which torch multiplies 16-bit numbers on a CPU, prepares code for each number of rows
    and keeps it, half a megabyte, for the last 1,024 of them; and texts have ever new numbers of
    patches.
    """
    step = 1 << max(0, (count >> 4).bit_length() - 1)
    return -(-count // step) * step


def targets_of_documents(
    targets: Tensor,  # (T,) or (B, T) integers
    cu_seqlens: Tensor | Packing | None,  # (S+1,) int32, of packed targets
) -> Tensor:
    """The targets, -100 from cu_seqlens[-1] on: rows there belong to no document.

    Other integers than int64 are widened first, where -100 may be no value of theirs.
    """
    if cu_seqlens is None:
        return targets
    packing = cu_seqlens if isinstance(cu_seqlens, Packing) else Packing(cu_seqlens, len(targets))
    return targets.long().masked_fill(packing.unused()[:, 0], IGNORED)


def require_type(value: object, kind: type, name: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
