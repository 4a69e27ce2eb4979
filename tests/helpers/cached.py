"""Greedy writing with a cache and without, for models of any kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.models import TINY, scrambled
from stlm_models import STLM, ModelConfig
from stlm_models.config import BOS_ID
from stlm_models.generation.engine import fit_context


def varied(config: ModelConfig = TINY, core: nn.Module | None = None) -> STLM:
    """Flat enough for greedy writing that varies."""
    model = scrambled(config, core)
    nn.init.normal_(model.embedding.weight, std=0.3)
    return model


def full_states(model: STLM, windows: list[list[int]]) -> Tensor:
    """The states at the last id of each window, from one full run over all of them."""
    ids = torch.tensor([i for window in windows for i in window])
    boundaries = torch.tensor([0, *map(len, windows)]).cumsum(0).int()
    return model.hidden(ids, cu_seqlens=boundaries)[boundaries[1:].long() - 1]


def seen_ids(prompts: list[bytes]) -> list[list[int]]:
    """The ids that a model sees of prompts: id 256 begins empty ones alone."""
    return [[*prompt] or [BOS_ID] for prompt in prompts]


def write_greedily(model: STLM, windows: list[list[int]], length: int) -> list[bytes]:
    """The reference of generation: everything anew for each byte."""
    written = [bytearray() for _ in windows]
    for _ in range(length):
        windows = [fit_context(model, window) for window in windows]
        logits = model.embedding.logits(full_states(model, windows))[:, :256]
        for text, window, byte in zip(written, windows, logits.argmax(-1).tolist(), strict=True):
            text.append(byte)
            window.append(byte)
    return [bytes(text) for text in written]
