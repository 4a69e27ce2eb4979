"""Checks of the arguments of `STLMForCausalLM.forward`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stlm_models import STLM
from stlm_models.config import BYTES, IGNORED

from .configuration_stlm import STLMHFConfig
from .growing_stlm import GrowingTexts
from .layout_stlm import Layout
from .recording_stlm import Recording, recorded

# transformers copies this file into saved folders: imports of stlm are absolute and public.

WHY_REFUSED = {"inputs_embeds": "a model that cuts and pools bytes has to see them as input_ids"}
ALSO_SAID = ("cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments of packed documents that say what others say."""


@dataclass(frozen=True)
class Wanted:
    """Outputs that a call wants: logits as in `forward`."""

    logits: int | Tensor
    hidden_states: bool
    attentions: bool

    @property
    def records(self) -> bool:
        return self.hidden_states or self.attentions

    def recorded(self, stlm: STLM, layout: Layout) -> AbstractContextManager[Recording]:
        return recorded(stlm, layout, states=self.hidden_states, weights=self.attentions)

    def outputs(self, recording: Recording, hidden: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Recorded states, and those that the table is multiplied with (B, T, D)."""
        outputs = {}
        if self.hidden_states:
            # A cache runs a block once for each new id.
            given = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in recording.states)
            outputs["hidden_states"] = (*given, hidden)
        if self.attentions:
            outputs["attentions"] = tuple(recording.weights)
        return outputs


def targets_of(
    layout: Layout, labels: Tensor | None, shift_labels: Tensor | None, config: STLMHFConfig
) -> Tensor:
    """Targets of each shown position; special ids are ignored, for none is predicted."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    assert given is not None
    if tuple(given.shape) != layout.shape:
        raise ValueError(f"{name}: expected shape {layout.shape}, got {tuple(given.shape)}")
    if shift_labels is None:
        targets = layout.targets(given)
    elif layout.kept is None:
        targets = layout.take(given)
    else:
        targets = layout.take(given.masked_fill(~layout.kept, IGNORED))
    if config.model_config.tokens != "bytes":
        return targets
    return targets.masked_fill((targets >= BYTES) & (targets < config.vocab_size), IGNORED)


def check_cache(cache: Any) -> GrowingTexts | None:
    """The cache, or a ValueError for one of transformers' own, which holds keys and values."""
    if cache is not None and not isinstance(cache, GrowingTexts):
        got = type(cache).__name__
        raise ValueError(f"cache: expected None or what an earlier call returned, got {got}")
    return cache


def check_new_ids(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    """Refuse what would change how the ids beside a cache go on from it."""
    if attention_mask is not None and not attention_mask[:, -input_ids.shape[1] :].all():
        raise ValueError("attention_mask: expected ones for the ids beside a cache, got a zero")
    if position_ids is not None and (position_ids <= 0).any():
        raise ValueError("position_ids: expected positions above 0 beside a cache, got 0")


def choice_of(value: bool | None, config: STLMHFConfig, name: str) -> bool:
    chosen = getattr(config, name, False) if value is None else value
    if not isinstance(chosen, bool):
        raise ValueError(f"{name}: expected None or a bool, got {chosen!r}")
    return chosen


def refuse_others(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name in ALSO_SAID or value is None or value is False:
            continue
        why = WHY_REFUSED.get(name, "an STLM has no use for it")
        raise ValueError(f"{name}: expected None, got a value: {why}")
