"""The states and attention weights of a decoder over bytes, where a caller asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stlm_models import STLM

from .layout_stlm import Layout

# transformers copies this file into saved folders: imports of stlm are absolute and public.


@dataclass
class Recording:
    """Inputs of the decoder's blocks, and weights of their attention, by column.

    Several calls of a block, as a cache makes them, follow each other in its list.
    """

    layout: Layout

    states: list[list[Tensor]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(stlm: STLM, layout: Layout, *, states: bool, weights: bool) -> Iterator[Recording]:
    """Record what the decoder does within a `with` block.

    It goes on from what is recorded, which takes a gradient that way. Weights need attention that
    computes them one by one, in memory of their size: it stands in place of the fused one
    meanwhile.

    Raises:
        ValueError: for a parallel output, whose decoder runs over slots of patches.
    """
    recording, hooks, replaced = Recording(layout), [], []
    if (states or weights) and not stlm.is_flat and stlm.head is not None:
        raise ValueError(
            'output_hidden_states, output_attentions: expected False with output "parallel", whose'
            " decoder runs over the slots of patches and not over positions"
        )
    try:
        for block in stlm.decoder:
            if states:
                given: list[Tensor] = []
                recording.states.append(given)
                hooks.append(block.register_forward_pre_hook(partial(_keep_input, given, layout)))
            if weights:
                attention: Any = block.attention
                attention._mix = partial(_weighed, attention, recording)
                replaced.append(attention)
        yield recording
    finally:
        for hook in hooks:
            hook.remove()
        for attention in replaced:
            del attention._mix


def _keep_input(
    given: list[Tensor], layout: Layout, block: torch.nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    given.append(layout.put_back(arguments[0]))
    return layout.take_states(given[-1]), *arguments[1:]


def _weighed(
    attention: Any,
    recording: Recording,
    q: Tensor,  # (B, T, H, K)
    k: Tensor,  # (B, T, H_kv, K)
    v: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Causal attention within the window by its formula, (B, T, H, K); its weights are kept."""
    if q.dim() != 4:
        raise ValueError(
            "output_attentions: expected False beside packed documents, got True; give each"
            " document a row"
        )
    shared = attention.heads // attention.kv_heads
    k, v = (x.repeat_interleave(shared, 2).to(q.dtype) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k).float() * attention.head_dim**-0.5
    positions = torch.arange(q.shape[1], device=q.device)
    back = positions[:, None] - positions
    unseen = back < 0
    if attention.window is not None:
        unseen = unseen | (back >= attention.window)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    recording.weights.append(recording.layout.put_back_weights(weights))
    weights = recording.layout.take_weights(recording.weights[-1])
    return torch.einsum("bhts,bshk->bthk", weights.to(v.dtype), v)
