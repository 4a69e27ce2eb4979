"""Options of the ops that make logits from hidden states, in plain numbers, and their checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, runtime
from .._sharding import have_dtensors, require_rows

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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> RowOptions:
    """The checks that every loss of this family shares; the options in plain numbers."""
    options = _row_options(
        input, linear_weight, target, linear_bias, ignore_index, softcap, logit_scale, valid_vocab,
        label_smoothing, z_loss,
    )  # fmt: skip
    if have_dtensors():
        weights = {"linear_weight": linear_weight, "linear_bias": linear_bias}
        require_rows(input, {"target": target}, weights)
    if runtime.values_visible(target):
        wide, ignored = target.long(), options.ignore_index
        counted = target if ignore_index is None else torch.where(wide == ignored, 0, wide)
        _checks.check_id_values("target", counted, 0, options.valid_vocab)
    return options


@_checks.once_per_signature
def _row_options(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
    label_smoothing: float,
    z_loss: float,
) -> RowOptions:
    valid = check_projection(input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
    _checks.require_tensor("target", target, input.shape[:-1], _checks.ID_DTYPES, input.device)
    if ignore_index is not None:
        _checks.require_int("ignore_index", ignore_index)
        if not -(2**63) <= ignore_index < 2**63:
            _checks.require(False, "ignore_index", "an int that int64 holds", ignore_index)
    ok = _checks.is_number(label_smoothing) and 0 <= label_smoothing <= 1
    _checks.require_number(ok, "label_smoothing", "a number in [0, 1]", label_smoothing)
    ok = _checks.is_finite(z_loss) and z_loss >= 0
    _checks.require_number(ok, "z_loss", "a finite number >= 0", z_loss)
    ignored = IGNORE_NOTHING if ignore_index is None else ignore_index
    return RowOptions(
        ignored, softcap or 0.0, float(logit_scale), valid, float(label_smoothing), float(z_loss)
    )


def check_projection(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
) -> int:
    """The checks of everything that makes logits from hidden states; the columns that exist."""
    if not isinstance(input, Tensor):
        _checks.require(False, "input", "a Tensor", type(input).__name__)
    shape, device, weights = input.shape, input.device, _checks.weight_dtypes(input.dtype)
    if len(shape) < 1 or shape[-1] < 1:
        expected = "D >= 1" if len(shape) else "at least one dimension"
        _checks.require(False, "input", expected, tuple(shape))
    _checks.require_dtype("input", input, _checks.FLOATS)
    width = shape[-1]
    _checks.require_tensor("linear_weight", linear_weight, ("V", width), weights, device)
    vocab = linear_weight.shape[0]
    if vocab < 1:
        _checks.require(False, "linear_weight", "V >= 1", (vocab, width))
    if linear_bias is not None:
        _checks.require_tensor("linear_bias", linear_bias, (vocab,), weights, device)
    valid = vocab if valid_vocab is None else valid_vocab
    _checks.require_int_at_least("valid_vocab", valid, 1)
    if valid > vocab:
        _checks.require(False, "valid_vocab", f"at most V = {vocab}", valid)
    _checks.require_softcap(softcap)
    ok = _checks.is_finite(logit_scale)
    _checks.require_number(ok, "logit_scale", "a finite number", logit_scale)
    return valid
