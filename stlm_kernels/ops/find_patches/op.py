"""The public find_patches: contract, checks, dispatch, the registered op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from . import torch_impl
from .config import unsupported_reasons

RULES = ("space", "fixed")


class Patches(NamedTuple):
    """Boundaries of patches, and the patch that each byte belongs to and may read."""

    cu_patchlens: Tensor
    """(P+1,) int32 patch boundaries in bytes; with `max_patches`, P is that."""
    patch_ids: Tensor
    """(T,) int32: the patch that holds the byte; -1 for bytes in no document or no slot."""
    read_ids: Tensor
    """(T,) int32: the last patch of the byte's document that is complete there; -1: none yet."""
    n_patches: Tensor
    """0-d int32: the true number of patches, also where it exceeds `max_patches`."""
    cu_seqlens: Tensor
    """(S+1,) int32 document boundaries in patches, at most `max_patches`."""


@named_errors
def find_patches(
    byte_ids: Tensor,  # (T,) uint8|int16|int32|int64
    *,
    rule: str | None = None,
    patch_start_mask: Tensor | None = None,  # (T,) bool
    patch_end_mask: Tensor | None = None,  # (T,) bool
    patch_size: int | None = None,
    max_patch_len: int | None = None,
    cu_seqlens: Tensor | None = None,  # (S+1,) int32
    max_patches: int | None = None,
    impl: Impl = "auto",
) -> Patches:
    """Cut bytes into patches by what is known at each byte, and find the patch each byte may read.

    A patch begins at the first byte of a document, after a byte that closes its patch, and where
    `patch_start_mask` says so. With p(t) the patch of byte t, read_ids[t] = p(t) if t closes it,
    else p(t) - 1, or -1 before the document's first: everything about it is known from bytes <= t.

    Args:
        byte_ids: (T,) uint8, int16, int32 or int64, not negative; only rule "space" reads them.
        rule: "space": a byte that is neither ASCII alphanumeric nor 0x80 to 0xBF (ids above 255 are
            neither) closes its patch unless its predecessor in the document is one too. "fixed":
            every `patch_size`-th byte of a document closes. None: a mask is given.
        patch_start_mask, patch_end_mask: (T,) bool, or None: this byte begins, or ends, its patch,
            decided from bytes <= t. Exactly one of rule and these is given.
        patch_size: an int >= 1 with rule "fixed", None with others.
        max_patch_len: an int >= 1: a patch of this length closes. None: no limit.
        cu_seqlens: (S+1,) int32 document boundaries in bytes: from 0, non-decreasing, at most T.
            Bytes from the last boundary on belong to no document. None: one document.
        max_patches: an int >= 1: so many patches, unused ones empty, with no synchronisation; bytes
            beyond read their document's last. None: the exact number, with one.
        impl: "auto", "triton" or "torch".

    Returns: `Patches`, whose fields say what they hold.
    Raises: ValueError for a wrong type, dtype, shape, device or option, for more or less than one
        rule or mask, on CPU in eager mode also for bad boundaries; IndexError there for a negative
        id; NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> find_patches(torch.tensor(list(b"to be")), rule="space").cu_patchlens.tolist()
    [0, 3, 5]

    Overflow: docs/numerics.md. Source: the rule of SpaceByte (arXiv 2404.14408), one byte later.
    """
    _check_rule(rule, patch_start_mask, patch_end_mask, patch_size)
    _check(byte_ids, rule, patch_start_mask, patch_end_mask, cu_seqlens)
    for name, value in (("max_patch_len", max_patch_len), ("max_patches", max_patches)):
        if value is not None:
            _checks.require_int_at_least(name, value, 1)
    if use_triton(
        "find_patches", impl, byte_ids.device, unsupported_reasons,
        byte_ids=byte_ids, rule=rule, max_patches=max_patches,
    ):  # fmt: skip
        return _by_kernels(
            byte_ids,
            rule,
            patch_start_mask,
            patch_end_mask,
            patch_size,
            max_patch_len,
            cu_seqlens,
            max_patches,
        )
    return Patches(
        *torch_impl.find_patches(
            byte_ids,
            patch_start_mask,
            patch_end_mask,
            patch_size,
            max_patch_len,
            cu_seqlens,
            max_patches,
        )
    )


def _check_rule(
    rule: str | None,
    patch_start_mask: Tensor | None,
    patch_end_mask: Tensor | None,
    patch_size: int | None,
) -> None:
    options = {"rule": rule, "patch_start_mask": patch_start_mask, "patch_end_mask": patch_end_mask}
    given = [name for name, value in options.items() if value is not None]
    got = " and ".join(given) or "none of them"
    _checks.require(
        len(given) == 1, "rule, patch_start_mask, patch_end_mask", "exactly one of them", got
    )
    if rule is not None:
        _checks.require_choice("rule", rule, RULES)
    if rule == "fixed":
        _checks.require_int_at_least("patch_size", patch_size, 1)
    else:
        _checks.require(patch_size is None, "patch_size", "None unless rule is 'fixed'", patch_size)


def _check(
    byte_ids: Tensor,
    rule: str | None,
    patch_start_mask: Tensor | None,
    patch_end_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _checks.require_ids("byte_ids", byte_ids)
    total = byte_ids.shape[0]
    for name, mask in (("patch_start_mask", patch_start_mask), ("patch_end_mask", patch_end_mask)):
        if mask is not None:
            _checks.require_tensor(name, mask, (total,), (torch.bool,), byte_ids.device)
    if cu_seqlens is not None:
        _checks.require_offsets("cu_seqlens", cu_seqlens, byte_ids.device)
    if not runtime.values_visible(byte_ids):
        return
    if cu_seqlens is not None:
        _checks.check_offset_values("cu_seqlens", cu_seqlens, total)
    if rule == "space" and byte_ids.dtype != torch.uint8:
        inside = byte_ids if cu_seqlens is None else byte_ids[: int(cu_seqlens[-1])]
        _check_not_negative(inside)


def _check_not_negative(byte_ids: Tensor) -> None:
    if byte_ids.numel() and int(byte_ids.min()) < 0:
        position = int((byte_ids < 0).nonzero()[0])
        raise IndexError(
            f"byte_ids: expected values >= 0, got {int(byte_ids[position])} at position {position}"
        )


def _by_kernels(
    byte_ids: Tensor,
    rule: str | None,
    patch_start_mask: Tensor | None,
    patch_end_mask: Tensor | None,
    patch_size: int | None,
    max_patch_len: int | None,
    cu_seqlens: Tensor | None,
    max_patches: int | None,
) -> Patches:
    mask = patch_end_mask if patch_start_mask is None else patch_start_mask
    how = rule or ("patch_end_mask" if patch_start_mask is None else "patch_start_mask")
    # There are never more patches than bytes, so without max_patches only unused slots are cut off.
    slots = max(1, byte_ids.shape[0]) if max_patches is None else max_patches
    patches = Patches(*_FWD(byte_ids, mask, how, patch_size, max_patch_len, cu_seqlens, slots))
    if max_patches is not None:
        return patches
    exact = patches.cu_patchlens[: int(patches.n_patches) + 1].clone()
    return patches._replace(cu_patchlens=exact)


def _fwd_meta(byte_ids: Tensor, cu_seqlens: Tensor | None, max_patches: int) -> tuple[Tensor, ...]:
    total = byte_ids.shape[0]
    boundaries = 2 if cu_seqlens is None else cu_seqlens.shape[0]
    shapes = ((max_patches + 1,), (total,), (total,), (), (boundaries,))
    return tuple(byte_ids.new_empty(shape, dtype=torch.int32) for shape in shapes)


_FWD = _library.register(
    "find_patches_fwd(Tensor byte_ids, Tensor? mask, str how, SymInt? patch_size, "
    "SymInt? max_patch_len, Tensor? cu_seqlens, SymInt max_patches) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher="find_patches:launch_fwd",
    meta=_fwd_meta,
    flops=lambda: 0,
)
