"""Kernels of others that may be installed: Liger, cut cross-entropy; found, never required."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stlm_kernels._spec import Case

from .entry import Entry


@functools.cache  # called within what is timed
def function_of(module: str, name: str) -> Any:
    """A function of another library, or None where this machine has none."""
    if importlib.util.find_spec(module.split(".", 1)[0]) is None:
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def on_gpu(case: Case) -> str | None:
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def _reason(found: Callable[[], Any], library: str) -> Callable[[Case], str | None]:
    def unsupported(case: Case) -> str | None:
        special = {"bias", "cap", "valid", "smoothing", "z", "scale"} & set(case.sizes)
        if special:
            return f"it is not asked for {' and '.join(sorted(special))}"
        return on_gpu(case) or (None if found() else f"no {library} is installed")

    return unsupported


def _liger_function() -> Any:
    module = "liger_kernel.ops.fused_linear_cross_entropy"
    return function_of(module, "LigerFusedLinearCrossEntropyFunction")


def _liger(**inputs: Any) -> Tensor:
    """Its autograd function: what stands around it needs another library."""
    loss: Tensor = _liger_function().apply(
        inputs["input"],
        inputs["linear_weight"],
        inputs["target"],
        None,  # bias
        None,  # weights of classes
        -100,
        0.0,  # z-loss
        0.0,  # label smoothing
        inputs["reduction"],
    )[0]
    return loss


def _cce_function() -> Any:
    return function_of("cut_cross_entropy", "linear_cross_entropy")


def _cce(**inputs: Any) -> Tensor:
    """Without its filter of small gradients; every release knows these arguments."""
    operands = inputs["input"], inputs["linear_weight"], inputs["target"]
    loss: Tensor = _cce_function()(
        *operands, reduction=inputs["reduction"], filter_eps=None, impl="cce"
    )
    return loss


LOSSES = (
    Entry("Liger", _liger, unsupported=_reason(_liger_function, "liger_kernel")),
    Entry(
        "CCE, exact",
        _cce,
        unsupported=_reason(_cce_function, "cut_cross_entropy"),
        loose_gradients="it adds up the table's gradient in 16 bits",
    ),
)
