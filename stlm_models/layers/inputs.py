"""Checks of a model's input: ids, document boundaries and patches that do not fit are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from stlm_kernels import Patches
from stlm_kernels.runtime import values_visible

from .packing import Packing, require_type
from .pooling import reads_ahead


def check_inputs(byte_ids: Tensor, targets: Tensor | None) -> None:
    """Refuse ids (B, T) or (T,) and targets that are not integers of one shape."""
    require_type(byte_ids, Tensor, "byte_ids", "a tensor")
    if targets is not None:
        require_type(targets, Tensor, "targets", "a tensor")
    if byte_ids.dim() not in (1, 2):
        expected = "shape (B, T) or (T,)"
        raise ValueError(f"byte_ids: expected {expected}, got {tuple(byte_ids.shape)}")
    if byte_ids.is_floating_point() or byte_ids.dtype == torch.bool:
        raise ValueError(f"byte_ids: expected integers, got {byte_ids.dtype}")
    if targets is not None and targets.shape != byte_ids.shape:
        expected = f"the shape of byte_ids {tuple(byte_ids.shape)}"
        raise ValueError(f"targets: expected {expected}, got {tuple(targets.shape)}")


def check_patches(patches: Patches, packing: Packing) -> None:
    """Refuse patches that do not belong to these bytes, or that would leak (values: CPU only).

    Raises:
        ValueError: naming the field, and for a leak the byte and the patch that it reads.
        IndexError: for a read_id that is no patch.
    """
    cu_seqlens, length = packing.cu_seqlens, packing.length
    require_type(patches, Patches, "patches", "the Patches of find_patches")
    for name in ("patch_ids", "read_ids"):
        shape = tuple(getattr(patches, name).shape)
        if shape != (length,):
            raise ValueError(f"patches.{name}: expected shape ({length},), got {shape}")
    if patches.cu_seqlens.shape != cu_seqlens.shape:
        got = tuple(patches.cu_seqlens.shape)
        raise ValueError(f"patches.cu_seqlens: expected {tuple(cu_seqlens.shape)}, got {got}")
    if not values_visible(*patches, cu_seqlens):
        return
    _check_patch_boundaries(patches, cu_seqlens)
    read, last = patches.read_ids.long(), len(patches.cu_patchlens) - 1
    unknown = ((read < -1) | (read >= last)).nonzero().flatten()
    if unknown.numel():
        at = int(unknown[0])
        raise IndexError(
            f"patches.read_ids: expected values in [-1, {last - 1}], got {int(read[at])} at"
            f" position {at}"
        )
    foreign = patches.cu_patchlens[read.clamp(min=0)] < packing.starts()
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


def _check_patch_boundaries(patches: Patches, cu_seqlens: Tensor) -> None:
    """The core sees the documents of patches.cu_seqlens: they must be those of the bytes."""
    last = len(patches.cu_patchlens) - 1
    boundaries = patches.cu_seqlens.long()
    begins = patches.cu_patchlens[boundaries.clamp(0, last)]
    # Bytes behind the last patch belong to none, and so do boundaries there.
    expected = cu_seqlens.clamp(max=int(patches.cu_patchlens[-1]))
    wrong = ((begins != expected) | (boundaries < 0) | (boundaries > last)).nonzero().flatten()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(
            f"patches.cu_seqlens: expected entry {at} to be the patch that begins at byte"
            f" {int(expected[at])}, the boundary of a document, got {int(boundaries[at])}"
        )
