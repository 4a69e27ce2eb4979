"""Cut bytes into patches by a rule, as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stlm_kernels import Patches, find_patches
from stlm_kernels.runtime import values_visible

from .packing import dense_cu_seqlens, recurring_size
from .typed_call import typed_as


def with_recurring_slots(patches: Patches) -> Patches:
    """Add unused slots on a CPU, so that their number is one of few: see `recurring_size`."""
    if not values_visible(*patches):
        return patches
    count = len(patches.cu_patchlens) - 1
    end = patches.cu_patchlens[-1:].expand(recurring_size(count) - count)
    return patches._replace(cu_patchlens=torch.cat((patches.cu_patchlens, end)))


class BytePatcher(nn.Module):
    """Cut bytes into patches by a rule, as `stlm_kernels.find_patches` does.

    Args:
        rule, patch_size, max_patch_len, max_patches: see `stlm_kernels.find_patches`.

    >>> patcher = BytePatcher("space", max_patch_len=16)
    >>> patcher(torch.tensor([*b"two words"])).cu_patchlens.tolist()
    [0, 4, 9]
    """

    def __init__(
        self,
        rule: str,
        *,
        patch_size: int | None = None,
        max_patch_len: int | None = None,
        max_patches: int | None = None,
    ) -> None:
        super().__init__()
        self.rule, self.patch_size = rule, patch_size
        self.max_patch_len, self.max_patches = max_patch_len, max_patches

    def forward(
        self,
        byte_ids: Tensor,  # (T,) or (B, T)
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
        *,
        max_patches: int | None = None,
    ) -> Patches:
        """The patches of packed byte_ids, or of the rows of dense ones, counted as if packed.

        `max_patches` of this call stands in place of the patcher's own.

        Raises:
            ValueError: for dense byte_ids with cu_seqlens, and as `find_patches`.
        """
        if byte_ids.dim() == 2:
            cu_seqlens = dense_cu_seqlens(byte_ids, cu_seqlens)
            byte_ids = byte_ids.flatten()
        return find_patches(
            byte_ids,
            rule=self.rule,
            patch_size=self.patch_size,
            max_patch_len=self.max_patch_len,
            cu_seqlens=cu_seqlens,
            max_patches=self.max_patches if max_patches is None else max_patches,
        )

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class GivenPatches(BytePatcher):
    """Stands where a model has no rule: patches must be given."""

    def __init__(self) -> None:
        super().__init__("external")

    def forward(
        self,
        byte_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        max_patches: int | None = None,
    ) -> Patches:
        """Raises a ValueError."""
        raise ValueError(
            'patches: expected patches of your own with patch_rule "external", got None; such a'
            " model has no rule to cut bytes by, so it writes none"
        )
