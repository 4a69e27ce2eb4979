"""Weights of plain blocks, as their products take them beside texts that grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from ..layers.attention import Attention
from ..layers.kv_cache import KVCache
from ..layers.linear import is_plain
from ..layers.transformer import SwiGLU, TransformerBlock

DTYPES = (torch.float32, torch.float64)


class Layer(NamedTuple):
    """Weights of a block, each as a product takes it."""

    attention: Attention
    cache: KVCache
    qkv: Tensor
    gains: Tensor | None
    """(H + H_kv, K) of queries and keys."""
    output: Tensor
    gate_up: Tensor
    down: Tensor


def layers_of(
    blocks: nn.ModuleList, caches: Sequence[KVCache], shared: SwiGLU | None, x: Tensor
) -> list[Layer]:
    """Return the layers of plain blocks in x's dtype on its device, or none."""
    layers = []
    for block, cache in zip(blocks, caches, strict=True):
        if type(block) is not TransformerBlock or type(block.attention) is not Attention:
            return []
        attention, own = block.attention, block.feed_forward
        own = shared if own is None else own
        if type(own) is not SwiGLU:
            return []
        maps = [attention.query_key_value, attention.output, own.gate_up, own.down]
        if not all(map(is_plain, maps)) or not all(each.weight.dtype == x.dtype for each in maps):
            return []
        layers.append(
            Layer(
                attention,
                cache,
                attention.query_key_value.weight.t(),
                _gains(attention, x.dtype),
                attention.output.weight.t(),
                own.gate_up.weight.t(),
                own.down.weight.t(),
            )
        )
    return layers


def _gains(attention: Attention, dtype: torch.dtype) -> Tensor | None:
    q, k = attention.query_norm, attention.key_norm
    if q is None or k is None:
        return None
    gains = [q.expand(attention.heads, -1), k.expand(attention.kv_heads, -1)]
    return torch.cat(gains).to(dtype)


def hooks_of(modules: Sequence[nn.Module]) -> list[Any]:
    """Return what holds hooks of these modules, and of all modules, empty where there are none."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    everywhere = [getattr(global_hooks, f"_global_{kind}") for kind in kinds]
    return [*everywhere, *(getattr(each, f"_{kind}") for each in modules for kind in kinds)]
