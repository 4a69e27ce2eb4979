"""Pooling of the states of bytes into patches, and reading them back without a leak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stlm_kernels import Patches, attention_pool, ema_unpool, segment_pool, unpool
from stlm_kernels.runtime import values_visible

from .typed_call import typed_as


class BytePooling(nn.Module):
    """Pool hidden states of bytes into one state per patch.

    Read the result through `Patches.read_ids`, as `ByteUnpooling` does: every mode but "first"
    looks at bytes of its patch that lie ahead of a position inside it.

    Args:
        mode: "mean", "sum", "max", "min", "first", "last", or "attention": each head of a learned
            query, the same for every patch, attends to the bytes of the patch, with projections of
            keys, values and the result.
        dim: width D of the states; with "attention" alone.
        heads: of attention, which divide dim; with "attention" alone.

    Raises:
        ValueError: for an unknown mode, for dim and heads that do not belong to it, or are missing.

    >>> patches = BytePatcher("space")(torch.tensor([*b"two words"]))
    >>> BytePooling("mean")(torch.zeros(9, 64), patches).shape
    torch.Size([2, 64])
    """

    MODES = ("mean", "sum", "max", "min", "first", "last", "attention")

    def __init__(self, mode: str, *, dim: int | None = None, heads: int | None = None) -> None:
        super().__init__()
        if mode not in self.MODES:
            raise ValueError(f"mode: expected one of {self.MODES}, got {mode!r}")
        self.mode = mode
        if mode == "attention":
            dim, heads = _checked_int("dim", dim), _checked_int("heads", heads)
            if dim % heads:
                raise ValueError(f"heads: expected a divisor of dim = {dim}, got {heads}")
            width = dim // heads
            self.query = nn.Parameter(torch.randn(heads, width) * width**-0.5)
            self.key_value = nn.Linear(dim, 2 * dim, bias=False)
            self.output = nn.Linear(dim, dim, bias=False)
            return
        for name, value in (("dim", dim), ("heads", heads)):
            if value is not None:
                raise ValueError(f'{name}: expected None with mode "{mode}", got {value!r}')

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        """x (T, D) or (B, T, D) -> (P, D)."""
        return self.pool(x.reshape(-1, x.shape[-1]), patches.cu_patchlens)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def pool(self, x: Tensor, cu_patchlens: Tensor) -> Tensor:
        """x (T, D) between the boundaries (P+1,) int32 -> (P, D)."""
        if self.mode != "attention":
            return segment_pool(x, cu_patchlens, mode=self.mode)
        key, value = self.key_value(x).unflatten(-1, (2, *self.query.shape)).unbind(1)
        pooled = attention_pool(self.query, key, value, cu_patchlens)
        return self.output(pooled.flatten(1))


def _checked_int(name: str, value: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        expected = 'an int of at least 1 with mode "attention"'
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value


class ByteUnpooling(nn.Module):
    """Give each byte the state of the last patch that is complete at it (`Patches.read_ids`).

    Args:
        dim: width of the states.
        null_state: learn what bytes read before the first patch of their document is complete;
            otherwise they read zeros.

    >>> patches = BytePatcher("space")(torch.tensor([*b"two words"]))
    >>> ByteUnpooling(64)(torch.zeros(2, 64), patches).shape
    torch.Size([9, 64])
    """

    def __init__(self, dim: int, *, null_state: bool = True) -> None:
        super().__init__()
        self.null_state = nn.Parameter(torch.zeros(dim)) if null_state else None

    def forward(
        self,
        patch_states: Tensor,  # (P, D)
        patches: Patches,
        residual: Tensor | None = None,  # (T, D) or (B, T, D)
    ) -> Tensor:
        """(T, D), in the shape of the residual where there is one.

        The residual must come from a causal encoder: what it knows of later bytes would leak.

        Raises:
            ValueError: for patches whose read_ids let a byte read a patch that is not complete at
                it (values: CPU, eager).
        """
        if values_visible(*patches):
            _refuse_reading_ahead(patches)
        flat = None if residual is None else residual.reshape(-1, residual.shape[-1])
        out = unpool(patch_states, patches.read_ids, null_state=self.null_state, residual=flat)
        return out if residual is None else out.view(residual.shape)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class EmaUnpooling(nn.Module):
    """Give each byte a running average of the patch states that are complete at it.

    z[j] = g[j] h[j] + (1 - g[j]) z[j-1], from z = 0 at each document's start; a byte gets the z of
    the patch that it may read. The gate g is the sigmoid of a linear map of the core's state.

    Args:
        core_dim: width of the core's states.

    Source: the smoothing of H-Net (arXiv 2507.07955), whose gates come from its router instead.

    >>> patches = BytePatcher("space")(torch.tensor([*b"two words"]))
    >>> states, own = torch.zeros(2, 64), torch.zeros(9, 64)
    >>> EmaUnpooling(64)(states, states, patches, own).shape
    torch.Size([9, 64])
    """

    def __init__(self, core_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(core_dim, 1, bias=False)

    def gates(self, core_states: Tensor) -> Tensor:
        """(P, core_dim) -> (P,) between 0 and 1."""
        return self.gate(core_states)[:, 0].sigmoid()

    def forward(
        self,
        patch_states: Tensor,  # (P, D)
        core_states: Tensor,  # (P, core_dim)
        patches: Patches,
        residual: Tensor,  # (T, D)
    ) -> Tensor:
        """(T, D); the residual and patches as in `ByteUnpooling.forward`."""
        if values_visible(*patches):
            _refuse_reading_ahead(patches)
        boundaries, read = patches.cu_seqlens, patches.read_ids
        # A patch without bytes says nothing: the average goes on as it was.
        gates = self.gates(core_states).masked_fill(patches.cu_patchlens.diff() == 0, 0)
        return ema_unpool(patch_states, gates, read, cu_seqlens=boundaries, residual=residual)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def reads_ahead(patches: Patches) -> Tensor:
    """(T,) bool: the bytes that read a patch which is not complete at them."""
    read, last = patches.read_ids.long(), len(patches.cu_patchlens) - 1
    ends = patches.cu_patchlens[(read + 1).clamp(0, last)]
    bytes_known = torch.arange(1, len(ends) + 1, device=ends.device)
    return (read >= 0) & (read < last) & (ends > bytes_known)


def _refuse_reading_ahead(patches: Patches) -> None:
    ahead = reads_ahead(patches)
    if bool(ahead.any()):
        at = int(ahead.nonzero()[0])
        patch = int(patches.read_ids[at])
        raise ValueError(
            "patches.read_ids: expected only patches that are complete at the byte that reads them,"
            f" got byte {at} reading patch {patch}, which ends with byte"
            f" {int(patches.cu_patchlens[patch + 1]) - 1}: it would see bytes that it must predict"
        )
