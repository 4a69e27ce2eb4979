"""Learned patch boundaries, as H-Net has them (arXiv 2507.07955), and boundaries from given scores.

A `Router` in a model of your own, x being the (T, D) states of a causal encoder:

    routing = router(x, cu_seqlens)
    patches = find_patches(byte_ids, patch_start_mask=routing.starts, cu_seqlens=cu_seqlens)
    first = segment_pool(x, patches.cu_patchlens, mode="first")
    states = core(first, patches.cu_seqlens)
    gate = router.gate(routing, patches)
    smooth = ema_unpool(states, gate, patches.patch_ids, cu_seqlens=patches.cu_seqlens)
    out = x + smooth * routing.confidence[:, None]
    loss = loss + 0.03 * router.ratio_loss(routing, cu_seqlens)

The leak rule: what may be read through `patch_ids` is a patch's first state alone, which knows no
byte after the one that begins the patch. Any other pooling sees the whole patch, and a mask of
starts tells only at the next patch's first byte that it has ended: read it through `read_ids`.

Scores need no router. Where score[t] is known from bytes <= t, such as the entropy that a small
model gives the byte after t, a threshold on it ends a patch after byte t, and the patch may be
read at once, whatever the pooling:

    patches = find_patches(byte_ids, patch_end_mask=score > threshold, cu_seqlens=cu_seqlens)
    pooled = segment_pool(x, patches.cu_patchlens, mode="mean")
    out = unpool(pooled, patches.read_ids, residual=x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import Patches, segment_pool
from stlm_kernels.runtime import without_autocast

from .packing import dense_cu_seqlens, document_starts
from .typed_call import typed_as

EPS = 1e-12
"""H-Net's: p is the cosine's for states of any size that occurs."""


class Routing(NamedTuple):
    """Decisions of a router for each byte; bytes that belong to no document begin nothing.

    >>> routing = Router(64)(torch.randn(9, 64))
    >>> routing.starts[0].item(), routing.confidence.tolist() == [1.0] * 9
    (True, True)
    """

    probs: Tensor
    """(T,) float32 (float64 for float64): p, how much the byte differs from the one before it."""
    starts: Tensor
    """(T,) bool: the byte begins a patch; for `find_patches(patch_start_mask=...)`."""
    confidence: Tensor
    """(T,) ones, in probs' dtype, whose gradient is that of p at a start and of 1 - p elsewhere."""


class Router(nn.Module):
    """Begin a patch where the state of a byte turns away from that of the byte before it.

    p[t] = (1 - cos(W_q x[t], W_k x[t-1])) / 2, and 1 at a document's first byte; a patch begins
    where p[t] > 1/2, as in H-Net's code (its paper has >=). Nothing of it looks ahead: with a
    causal x it is causal. Both projections begin as the identity, so that equal neighbours begin no
    patch. H-Net's code applies W_q to x[t-1] and W_k to x[t]: its weights load with the two
    exchanged.

    Args:
        dim: width D of the states.
        target_length: N > 1, the mean number of bytes of a patch that `ratio_loss` asks for.

    >>> routing = Router(64, target_length=6.0)(torch.randn(9, 64))
    >>> routing.probs.shape, routing.starts.dtype
    (torch.Size([9]), torch.bool)
    """

    def __init__(self, dim: int, *, target_length: float = 6.0) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if not target_length > 1:
            raise ValueError(f"target_length: expected more than 1, got {target_length}")
        self.dim, self.target_length = dim, target_length
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def forward(
        self,
        x: Tensor,  # (T, D) or (B, T, D)
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
    ) -> Routing:
        """The routing of packed states, or of dense ones, each row a document, as if packed.

        A state of zeros points nowhere: its cosine is 0 and has no gradient, and p = 1/2 begins no
        patch.

        Raises:
            ValueError: dense x with cu_seqlens, or x of another width.
        """
        if x.shape[-1] != self.dim or x.dim() not in (2, 3):
            expected = f"shape (T, {self.dim}) or (B, T, {self.dim})"
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")
        if x.dim() == 3:
            cu_seqlens = dense_cu_seqlens(x[..., 0], cu_seqlens)
            x = x.flatten(0, 1)
        first, inside = _places(x, cu_seqlens)
        if cu_seqlens is not None:
            x = torch.where(inside[:, None], x, 0)
        query, key = _direction(self.query(x)), _direction(self.key(x))
        before = torch.where(first[:, None], 0, torch.cat([key[-1:], key[:-1]]))
        return _routing(query, before, first, inside)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def step(
        self,
        x: Tensor,  # (B, D)
        state: RouterState,
    ) -> Routing:
        """The routing of the next byte of each row, what `forward` gives at its position.

        The state then stands behind that byte. To go on after a full run, step once with the last
        state x of each row: its result was known, and the next one follows.

        Raises:
            ValueError: x of another width, or of other rows than the state has.
        """
        expected = (len(state.begins), self.dim)
        if tuple(x.shape) != expected:
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        query, key = _direction(self.query(x)), _direction(self.key(x))
        before = key.new_zeros(key.shape) if state.keys is None else state.keys.to(key.dtype)
        first, inside = state.begins, torch.ones_like(state.begins)
        state.keys, state.begins = key, ~inside
        return _routing(query, torch.where(first[:, None], 0, before), first, inside)

    def gate(self, routing: Routing, patches: Patches) -> Tensor:
        """(P,) the gate of each patch for `ema_unpool`: p of its first byte, 0 if it is empty."""
        with without_autocast(routing.probs):
            probs = routing.probs[:, None]
            return segment_pool(probs, patches.cu_patchlens, mode="first")[:, 0]

    def ratio_loss(
        self,
        routing: Routing,
        cu_seqlens: Tensor | None = None,  # (S+1,) int32, packed states' own
    ) -> Tensor:
        """N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)), 0-d; H-Net weighs it with 0.03.

        F is the fraction of bytes that begin a patch, G the mean of p, N the target length. It is
        1 where F = G = 1 / N. The gradient goes through G alone, up or down as F says.
        """
        length = self.target_length
        total = max(routing.probs.shape[0], 1)
        count = total if cu_seqlens is None else cu_seqlens[-1].clamp(min=1)
        fraction, mean = routing.starts.sum() / count, routing.probs.sum() / count
        kept, dropped = (length - 1) * fraction * mean, (1 - fraction) * (1 - mean)
        return length / (length - 1) * (kept + dropped)


class RouterState:
    """State of each row for `Router.step`: the direction of its newest byte's key.

    Args:
        batch: rows B; each one's next byte begins a document.
        device: where the state lies.

    >>> state = RouterState(batch=2)
    >>> Router(64).step(torch.randn(2, 64), state).starts.tolist()
    [True, True]
    """

    def __init__(self, batch: int, *, device: torch.device | None = None) -> None:
        self.keys: Tensor | None = None
        """(B, D) unit vectors; None before the first step."""
        self.begins = torch.ones(batch, dtype=torch.bool, device=device)
        """(B,) the next byte begins a document."""

    def begin_documents(self, rows: Tensor) -> None:
        """The next byte of these rows, (B,) bool, begins a document."""
        self.begins = self.begins | rows


def _routing(
    query: Tensor,  # (T, D) unit vectors
    before: Tensor,  # (T, D) unit vectors: the keys of the bytes before
    first: Tensor,  # (T,) bool
    inside: Tensor,  # (T,) bool
) -> Routing:
    cosine = (query * before).sum(-1)
    probs = ((1 - cosine) / 2).clamp(0, 1)  # rounding may leave the range
    probs = torch.where(inside, torch.where(first, 1, probs), 0)
    starts = inside & (probs > 0.5)
    chosen = torch.where(starts, probs, 1 - probs)
    return Routing(probs, starts, chosen + (1 - chosen).detach())


def _direction(x: Tensor) -> Tensor:
    """x in float32 or wider as unit vectors, so that their products are cosines.

    As F.normalize, vectors shorter than 1e-12 are divided by that; but zeros, where that makes
    gradients of 1e12, have none.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide.masked_fill((wide == 0).all(-1, keepdim=True), 0), dim=-1, eps=EPS)


def _places(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T,) bool each: the byte is the first of its document; it belongs to one."""
    places = torch.arange(x.shape[0], device=x.device)
    if cu_seqlens is None:
        return places == 0, places >= 0
    inside = places < cu_seqlens[-1]
    return inside & (places == document_starts(cu_seqlens, x.shape[0])), inside
