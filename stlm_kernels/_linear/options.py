"""Options of the ops that make logits from hidden states, in plain numbers, and their checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, runtime
from .._sharding import require_rows

IGNORE_NOTHING = -(2**63)
"""Stands for ignore_index=None below the public functions: no sane target is this."""


class RowOptions(NamedTuple):
    """Options of a row's loss, as plain numbers.

    softcap 0 stands for none, so that kernels and torch see the same types always.
    """

    ignore_index: int
    softcap: float
    logit_scale: float
    valid_vocab: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class DistillOptions(NamedTuple):
    """Options of a row's divergence, as plain numbers; softcap 0 stands for none."""

    temperature: float
    softcap: float
    logit_scale: float
    valid_vocab: int


class SampleOptions(NamedTuple):
    """Options of sampling, as plain numbers.

    softcap 0, top_k 0 and top_p 1 stand for none; temperature 0 for the largest logit.
    """

    softcap: float
    logit_scale: float
    valid_vocab: int
    temperature: float
    top_k: int
    top_p: float


def row_options(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
) -> RowOptions:
    """The checks that every loss of this family shares; the options in plain numbers."""
    valid = check_projection(input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
    _checks.require_tensor(
        "target", target, tuple(input.shape[:-1]), _checks.ID_DTYPES, input.device
    )
    require_rows(
        input, {"target": target}, {"linear_weight": linear_weight, "linear_bias": linear_bias}
    )
    if ignore_index is not None:
        _checks.require_int("ignore_index", ignore_index)
        ok = -(2**63) <= ignore_index < 2**63
        _checks.require(ok, "ignore_index", "an int that int64 holds", ignore_index)
    ignored = IGNORE_NOTHING if ignore_index is None else ignore_index
    if runtime.values_visible(target):
        wide = target.long()
        counted = target if ignore_index is None else torch.where(wide == ignored, 0, wide)
        _checks.check_id_values("target", counted, 0, valid)
    return RowOptions(ignored, softcap or 0.0, float(logit_scale), valid)


def check_projection(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
) -> int:
    """The checks of everything that makes logits from hidden states; the columns that exist."""
    _checks.require(isinstance(input, Tensor), "input", "a Tensor", type(input).__name__)
    shape, device, weights = tuple(input.shape), input.device, _checks.weight_dtypes(input.dtype)
    _checks.require(len(shape) >= 1, "input", "at least one dimension", shape)
    _checks.require_tensor("input", input, shape, _checks.FLOATS)
    width = shape[-1]
    _checks.require(width >= 1, "input", "D >= 1", shape)
    _checks.require_tensor("linear_weight", linear_weight, ("V", width), weights, device)
    vocab = linear_weight.shape[0]
    _checks.require(vocab >= 1, "linear_weight", "V >= 1", (vocab, width))
    if linear_bias is not None:
        _checks.require_tensor("linear_bias", linear_bias, (vocab,), weights, device)
    valid = vocab if valid_vocab is None else valid_vocab
    _checks.require_int_at_least("valid_vocab", valid, 1)
    _checks.require(valid <= vocab, "valid_vocab", f"at most V = {vocab}", valid)
    _checks.require_softcap(softcap)
    ok = _checks.is_finite(logit_scale)
    _checks.require_number(ok, "logit_scale", "a finite number", logit_scale)
    return valid
