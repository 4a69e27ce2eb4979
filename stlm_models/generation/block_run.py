"""Blocks of a transformer beside texts that grow: each runs on the next position of every row.

A row's products take a CPU less time than the modules, ops and checks around them. So plain blocks
run there by few calls of torch, on their own weights; blocks that are watched, replaced, quantised
or in 16 bits, and all blocks on a GPU, run as modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import runtime

from ..layers.kv_cache import CacheRows, KVCache
from ..layers.norms import rms_norm
from ..layers.rotary import rotary_columns
from ..layers.transformer import SwiGLU, run_blocks
from .plain_layers import DTYPES, Layer, hooks_of, layers_of
from .row_run import RowRun


class BlockRun:
    """Blocks beside their caches.

    Args:
        blocks: `TransformerBlock`s of one window and width of heads.
        caches: one for each.
        feed_forward: that the blocks share.
        owner: the module whose forward runs them, as that of `PatchCore` does.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        caches: Sequence[KVCache],
        feed_forward: SwiGLU | None = None,
        owner: nn.Module | None = None,
    ) -> None:
        self.blocks, self.caches = blocks, caches
        self.feed_forward, self.owner = feed_forward, owner
        self._layers: list[Layer] | None = None
        self._hooks: list[Any] = []
        self._row: RowRun | None = None
        """Where there is one text, which steps by the least of calls."""

    def renew(self) -> None:
        """Take the weights anew at the next step."""
        self._layers = self._row = None

    def step(
        self,
        x: Tensor,  # (R, D)
        rows: Tensor,  # (R,) int64, ascending
    ) -> Tensor:  # (R, D)
        """Run the next position of each of these rows."""
        if not len(self.blocks):
            return x
        layers = self._plain_layers(x)
        if layers and len(self.caches[0].lens) == 1:
            self._row = self._row or RowRun(layers, x)
            return self._row.step(x)
        if layers:
            return _step(layers, x, rows)
        caches = caches_at(self.caches, rows)
        if self.owner is not None:
            return cast(Tensor, self.owner(x[:, None], None, caches)[:, 0])
        return run_blocks(self.blocks, x[:, None], None, caches, self.feed_forward)[:, 0]

    def _plain_layers(self, x: Tensor) -> list[Layer]:
        """Return the layers; none where only their modules will do."""
        if x.dtype not in DTYPES or not len(x) or not runtime.values_visible(x):
            return []
        if torch.is_grad_enabled() or runtime.compute_dtype(x) != x.dtype:
            return []
        if self._layers is None:
            parts = [*self.blocks, self.feed_forward, self.owner]
            modules = [module for part in parts if part is not None for module in part.modules()]
            self._hooks = hooks_of(modules)
            is_own = not any("forward" in vars(module) for module in modules)
            self._layers = (
                layers_of(self.blocks, self.caches, self.feed_forward, x) if is_own else []
            )
        if any(self._hooks) or self.caches[0].by_head.dtype != x.dtype:
            return []
        return self._layers


class _Places(NamedTuple):
    """Places of the next position of some rows, the same in every layer."""

    rows: Tensor | None
    """(R,) int64; None is all rows of the batch."""
    cos: Tensor
    sin: Tensor
    slots: tuple[Any, ...]
    """Index of the new positions in (B, H_kv, C, K)."""
    held: int
    """Slots that hold a position of any of these rows then."""
    mask: Tensor
    """(B H_kv, 1, slots) 0 where one holds a position of its row, else -inf; or one 0 for all."""
    gathers: bool
    """The rows are few, so that copies of their caches are read, and not the caches of all."""


def _step(layers: Sequence[Layer], x: Tensor, rows: Tensor) -> Tensor:
    cache = layers[0].cache
    lens: list[int] = cache.lens.tolist()
    places = _places(layers[0], lens, rows, x)
    for layer in layers:
        attended = _attend(layer, rms_norm(x), places)
        x = torch.addmm(x, attended, layer.output)
        gate, up = torch.mm(rms_norm(x), layer.gate_up).chunk(2, -1)
        x = torch.addmm(x, F.silu(gate).mul_(up), layer.down)
    after = cache.lens + 1
    if places.rows is not None:
        after = cache.lens.index_copy(0, rows, after[rows])
    for layer in layers:
        layer.cache.lens, layer.cache.longest = after, max(lens) + 1
    return x


def _places(layer: Layer, lens: list[int], rows: Tensor, x: Tensor) -> _Places:
    attention, window = layer.attention, layer.cache.window
    is_all = len(rows) == len(lens)
    own = lens if is_all else [lens[row] for row in rows.tolist()]
    longest, is_even = max(own), min(own) == max(own)
    held = [n + 1 if window is None else min(n + 1, window) for n in own]
    tables = rotary_columns(longest + 1, attention.head_dim, attention.rope_base, x.device, x.dtype)
    slots: tuple[Any, ...]
    if is_all and is_even:
        cos, sin = (table[longest] for table in tables)
        slots = slice(None), slice(None), longest if window is None else longest % window
    else:
        positions = torch.tensor(own)
        cos, sin = (table[positions][:, None] for table in tables)
        slots = rows, slice(None), positions if window is None else positions % window
    mask, gathers = x.new_zeros(1, 1, 1), 2 * len(rows) <= len(lens)
    if min(held) != max(held):
        used = torch.tensor(held)
        if not gathers:
            used = torch.zeros(len(lens), dtype=torch.int64).index_copy_(0, rows, used)
        is_free = torch.arange(max(held)) >= used[:, None]
        mask = x.new_zeros(is_free.shape).masked_fill_(is_free, -torch.inf)
        mask = mask.repeat_interleave(attention.kv_heads, 0)[:, None]
    return _Places(None if is_all else rows, cos, sin, slots, max(held), mask, gathers)


def _attend(layer: Layer, x: Tensor, places: _Places) -> Tensor:
    """Return what the heads give of x (R, D), (R, H K), once the caches hold its positions."""
    attention, cache = layer.attention, layer.cache
    heads, width = attention.heads, attention.head_dim
    qkv = torch.mm(x, layer.qkv).view(len(x), -1, width)
    turning = qkv[:, : heads + attention.kv_heads]
    if layer.gains is not None:
        turning = rms_norm(turning) * layer.gains
    turned = torch.addcmul(turning * places.cos, turning.roll(width // 2, -1), places.sin)
    cache.reserve(places.held)
    keys, values = cache.by_head.unbind()
    keys[places.slots], values[places.slots] = turned[:, heads:], qkv[:, turning.shape[1] :]
    keys, values = keys[:, :, : places.held], values[:, :, : places.held]
    q, rows = turned[:, :heads], places.rows
    if rows is None:
        return _mix(q, keys, values, places.mask)
    if places.gathers:
        return _mix(q, keys.index_select(0, rows), values.index_select(0, rows), places.mask)
    every = q.new_zeros(len(keys), *q.shape[1:]).index_copy_(0, rows, q)
    return _mix(every, keys, values, places.mask)[rows]


def _mix(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attend from q (B, H, K) to keys and values (B, H_kv, C, K): (B, H K)."""
    batch, kv_heads, _, width = keys.shape
    queries = q.reshape(batch * kv_heads, -1, width)
    scores = torch.baddbmm(mask, queries, keys.flatten(0, 1).mT, alpha=width**-0.5)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(batch, -1)


def caches_at(caches: Sequence[KVCache], rows: Tensor) -> Sequence[KVCache | CacheRows]:
    """Caches of these rows, ascending; of all of them without a copy."""
    return [cache if len(rows) == len(cache.lens) else cache.at(rows) for cache in caches]
