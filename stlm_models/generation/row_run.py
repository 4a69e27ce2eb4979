"""Plain blocks beside one text that grows: all memory of a step is there before it.

A row's products take a CPU less time than torch takes to call its ops. So products, softmax and
SiLU are torch's, written into tensors of their own, and what is elementwise is numpy's on the same
memory, at a third of the price of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.kv_cache import KVCache
from ..layers.norms import EPS, host_rms_norm
from ..layers.rotary import rotary_columns
from .plain_layers import Layer


class RowRun:
    """Plain blocks beside the caches of one text.

    Args:
        layers: the blocks, at least one.
        like: (1, D), for dtype and width.
    """

    def __init__(self, layers: Sequence[Layer], like: Tensor) -> None:
        self.cache = layers[0].cache
        self.head_dim = layers[0].attention.head_dim
        self.rope_base = layers[0].attention.rope_base
        self._x, self._normed = torch.empty_like(like), torch.empty_like(like)
        self._row, self._normed_row = self._x.numpy()[0], self._normed.numpy()[0]
        self._layers = [_Layer(layer, self._x, self._normed) for layer in layers]
        self._n_tables = 0
        self._lens, self._position = torch.empty(0), 0

    def step(self, x: Tensor) -> Tensor:
        """Run the next position: x (1, D) -> (1, D), which the next step overwrites."""
        position = self._next_position()
        cos, sin = self._cos[position], self._sin[position]
        window = self.cache.window
        held = position + 1 if window is None else min(position + 1, window)
        slot = position if window is None else position % window
        row, normed = self._row, self._normed_row
        row[:] = x.numpy()[0]
        mask = self._reserved(held)
        with np.errstate(all="ignore"):  # as torch's are
            for layer in self._layers:
                host_rms_norm(row, normed)
                layer.attend(cos, sin, slot, mask)
                host_rms_norm(row, normed)
                layer.feed_forward()
        self._took(position + 1)
        return self._x

    def _next_position(self) -> int:
        """Return it; another's step or a new text may have moved it since the last."""
        if self.cache.lens is not self._lens:
            self._lens = self.cache.lens.clone()
            self._position = int(self._lens)
            for layer in self._layers:
                layer.cache.lens = self._lens
            self._mask = torch.empty(0)
        if self._position >= self._n_tables:
            tables = rotary_columns(
                self._position + 1, self.head_dim, self.rope_base, self._x.device, self._x.dtype
            )
            self._n_tables = len(tables[0])
            self._cos, self._sin = (x.view(len(x), 2, -1).numpy() for x in tables)
        return self._position

    def _reserved(self, held: int) -> Tensor:
        """Return the mask (1, 1, C) of slots: 0 where one holds a position, else -inf."""
        for layer in self._layers:
            layer.bind(held)
        if self._mask.shape[-1] != self.cache.capacity:
            self._mask = self._x.new_full((1, 1, self.cache.capacity), -torch.inf)
            self._mask[..., :held] = 0
            self._mask_row = self._mask.numpy()[0, 0]
        self._mask_row[held - 1] = 0
        return self._mask

    def _took(self, positions: int) -> None:
        self._position = positions
        self._lens.numpy()[0] = positions
        for layer in self._layers:
            layer.cache.longest = positions


class _Layer:
    """A block, its workspace and views of its cache."""

    def __init__(self, layer: Layer, x: Tensor, normed: Tensor) -> None:
        attention = layer.attention
        heads, kv_heads, width = attention.heads, attention.kv_heads, attention.head_dim
        self.cache: KVCache = layer.cache
        self._x, self._normed = x, normed
        self._weights = layer
        self._qkv = x.new_empty(1, layer.qkv.shape[1])
        qkv = self._qkv.numpy()[0]
        self._turning = qkv[: (heads + kv_heads) * width].reshape(-1, 2, width // 2)
        self._halves_swapped = self._turning[:, ::-1]
        self._flat_heads = self._turning.reshape(-1, width)
        self._turned, self._squares = np.empty_like(self._turning), np.empty_like(self._flat_heads)
        self._gains: Any = None
        if layer.gains is not None:
            self._gains = layer.gains.numpy()
        self._new = qkv[heads * width :].reshape(2, kv_heads, width)
        self._queries = self._qkv[0, : heads * width].view(kv_heads, -1, width)
        self._attended = x.new_empty(kv_heads, heads // kv_heads, width)
        self._attended_row = self._attended.view(1, -1)
        self._scale = width**-0.5
        self._by_head = torch.empty(0)
        self._gate_up = x.new_empty(1, layer.gate_up.shape[1])
        gate, up = self._gate_up.chunk(2, -1)
        self._gate, self._gate_row, self._up_row = gate, gate.numpy(), up.numpy()

    def bind(self, held: int) -> None:
        """Make room for as many positions, and views of it where it is new."""
        cache = self.cache
        cache.reserve(held)
        if cache.by_head is self._by_head:
            return
        self._by_head = cache.by_head
        self._slots = self._by_head.numpy()[:, 0].transpose(2, 0, 1, 3)
        self._keys, self._values = self._by_head[0, 0].mT, self._by_head[1, 0]
        self._scores = self._x.new_empty(*self._attended.shape[:2], cache.capacity)

    def attend(self, cos: Any, sin: Any, slot: int, mask: Tensor) -> None:
        """Add to x what the heads give of the normed row."""
        torch.mm(self._normed, self._weights.qkv, out=self._qkv)
        turning, turned = self._turning, self._turned
        if self._gains is not None:
            heads, squares = self._flat_heads, self._squares
            np.multiply(heads, heads, out=squares)
            scales = np.add.reduce(squares, 1, keepdims=True)
            scales *= 1 / heads.shape[1]
            scales += EPS
            np.sqrt(scales, out=scales)
            heads /= scales
            heads *= self._gains
        np.multiply(self._halves_swapped, sin, out=turned)
        turning *= cos
        turning += turned
        self._slots[slot] = self._new
        torch.baddbmm(mask, self._queries, self._keys, alpha=self._scale, out=self._scores)
        torch.bmm(self._scores.softmax(-1), self._values, out=self._attended)
        self._x.addmm_(self._attended_row, self._weights.output)

    def feed_forward(self) -> None:
        """Add to x what the feed-forward gives of the normed row."""
        torch.mm(self._normed, self._weights.gate_up, out=self._gate_up)
        F.silu(self._gate, inplace=True)
        self._gate_row *= self._up_row
        self._x.addmm_(self._gate, self._weights.down)
