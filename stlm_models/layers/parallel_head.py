"""The parallel output: all bytes of a patch at once, from the state of the patch before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stlm_kernels import Patches
from stlm_kernels.runtime import values_visible

from .typed_call import typed_as


class ParallelHead(nn.Module):
    """Spread the state of a patch over the slots of the bytes that follow it.

    Args:
        core_dim, byte_dim: width of a state, and of a slot.
        slots: L, the most bytes that a patch may have.

    >>> slots, cu_slots = ParallelHead(64, 32, slots=16)(torch.zeros(3, 64))
    >>> slots.shape, cu_slots.tolist()
    (torch.Size([48, 32]), [0, 16, 32, 48])
    """

    def __init__(self, core_dim: int, byte_dim: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.null_state = nn.Parameter(torch.zeros(core_dim))
        """State that is read before the first patch of a document is complete."""
        self.to_slots = nn.Linear(core_dim, slots * byte_dim, bias=False)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(N, core_dim) -> (N L, byte_dim), and the boundaries (N+1,) int32 between the states."""
        x = self.to_slots(states).view(len(states) * self.slots, -1)
        boundaries = torch.arange(len(states) + 1, dtype=torch.int32, device=x.device)
        return x, boundaries * self.slots

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def with_null(self, states: Tensor) -> Tensor:
        """(P, core_dim) -> (P+1, core_dim): the state that -1 stands for comes last."""
        return torch.cat((states, self.null_state.to(states.dtype)[None]))

    def next_rows(self, patches: Patches) -> Tensor:
        """(T,) int64: the row of `forward(with_null(states))` that predicts the byte after each.

        Raises:
            ValueError: for a patch of more bytes than there are slots, or one that is not read at
                its last byte, where slot 0 is next (values: CPU, eager).
        """
        slot = _places(patches) + 1
        closes = (patches.read_ids == patches.patch_ids) & (patches.patch_ids >= 0)
        slot = slot.masked_fill(closes, 0)
        inside = patches.patch_ids >= 0
        if values_visible(slot):
            self._check(slot.masked_fill(~inside, 0))
            _refuse_late_boundaries(patches)
        n_states = len(patches.cu_patchlens)  # the null state is one more than there are patches
        return patches.read_ids.long().remainder(n_states) * self.slots + self._clamp(slot)

    def own_rows(self, patches: Patches) -> Tensor:
        """(T,) int64: the row of `forward(states)` that stands for each byte itself."""
        own = patches.patch_ids.long().clamp(min=0)
        return own * self.slots + self._clamp(_places(patches))

    def _clamp(self, slot: Tensor) -> Tensor:
        # Bytes that belong to no patch have no slot. They are predicted from the last one of what
        # they read, and the reconstruction leaves them out.
        return slot.clamp(0, self.slots - 1)

    def _check(self, slot: Tensor) -> None:
        if slot.numel() and int(slot.max()) >= self.slots:
            at = int((slot >= self.slots).nonzero()[0])
            raise ValueError(
                f"patches: expected patches of at most {self.slots} bytes, the slots of the"
                f" parallel output, got one that is open after {int(slot[at])} bytes at byte {at}"
            )


def _places(patches: Patches) -> Tensor:
    """(T,) int64: how many bytes of its patch come before each byte."""
    # -1, no slot, counts from the last boundary, where the bytes without a slot begin.
    starts = patches.cu_patchlens[patches.patch_ids.long()].long()
    return torch.arange(len(starts), device=starts.device) - starts


def _refuse_late_boundaries(patches: Patches) -> None:
    """A mask of starts tells at the next patch's first byte alone that a patch has ended."""
    own = patches.patch_ids.long()
    after = torch.arange(1, len(own) + 1, device=own.device)
    is_last = (own >= 0) & (patches.cu_patchlens[own + 1] == after)
    goes_on = ~torch.isin(own + 1, patches.cu_seqlens.long())  # the document does
    late = (is_last & goes_on & (patches.read_ids != own)).nonzero()
    if late.numel():
        raise ValueError(
            "patches: expected a rule that closes patches, as the parallel output needs, got one"
            f" whose last byte {int(late[0])} does not read it"
        )
