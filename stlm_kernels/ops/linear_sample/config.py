"""Limits and configuration of the linear_sample kernel, and the constants of its noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._launch import Config, block_of, config_for, width_bucket
from ..._torch.random_bits import COLUMN_STEP, MIX_FIRST, MIX_SECOND, ROW_STEP
from ..linear_logprobs.config import MAX_VOCAB
from ..linear_logprobs.config import unsupported_reasons as reasons_of_the_rows

__all__ = [
    "COLUMN_STEP",
    "MIX_FIRST",
    "MIX_SECOND",
    "ROW_STEP",
    "declined_reasons",
    "fwd_config",
    "unsupported_reasons",
]

TILE_BYTES = 32 * 1024
"""Bytes of the table at a time: a few stages of this fit every GPU's shared memory."""


def unsupported_reasons(*, input: Tensor, **arguments: Any) -> list[str]:
    """List the reasons why the kernel cannot take this call; empty if it can."""
    reasons, valid = reasons_of_the_rows(input=input), _valid_vocab(**arguments)
    if valid > MAX_VOCAB:
        reasons.append(f"{valid} columns of logits do not fit on the chip (at most {MAX_VOCAB})")
    return reasons


def declined_reasons(**arguments: Any) -> list[str]:
    """A large vocabulary is torch's case by design, of which nothing warns."""
    valid = _valid_vocab(**arguments)
    if valid <= MAX_VOCAB:
        return []
    return [f"impl='auto' leaves {valid} columns to torch's matrix products"]


def _valid_vocab(*, linear_weight: Tensor, valid_vocab: int | None = None, **_: Any) -> int:
    return linear_weight.shape[0] if valid_vocab is None else valid_vocab


def fwd_config(
    width: int, valid: int, stored: torch.dtype, dot: torch.dtype, device: torch.device
) -> Config:
    """Few rows to a program: decoding has 1 to 64 of them, and all wait for the slowest program.

    One power-of-two block holds all columns, 258 in 512: what takes the time is a chain of 16
    dependent rounds over the columns, which a second, narrow block would double. Four warps for 256
    columns issue less than eight, counted, and their sums meet in words of different banks.
    """
    block_v = max(16, 1 << (valid - 1).bit_length())
    warps = 8 if block_v > 256 else 4
    if dot == torch.float32:  # which no matrix unit serves: half as many spill
        warps *= 2
    default = {
        "BLOCK_N": 16,
        "BLOCK_D": block_of(width, min(128, TILE_BYTES // (block_v * stored.itemsize))),
        "num_warps": warps,
    }
    shape = width_bucket(width, f"V{block_v}", stored, dot)
    return config_for("linear_sample_fwd", shape, default, device)
