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
def _found(module: str, name: str) -> tuple[Any, str | None]:
    """A function of another library, or None and the reason."""
    library = module.split(".", 1)[0]
    if importlib.util.find_spec(library) is None:
        return None, f"no {library} is installed"
    try:
        return getattr(importlib.import_module(module), name), None
    except AttributeError:
        return None, f"{module} has no {name}"
    except Exception as error:  # a library may raise anything where it lacks something
        return None, f"{library} is installed, but {module} does not import: {error}"


def function_of(module: str, name: str) -> Any:
    """A function of another library, or None where this machine has none."""
    return _found(module, name)[0]


def why_missing(module: str, name: str) -> str | None:
    """Why `function_of` gives None, or None where it does not."""
    return _found(module, name)[1]


def own_keys(case: Case) -> str | None:
    """Why a peer of attention that is not asked for them cannot run a case with more keys than
    rows, or a window of two sides."""
    return "it is not asked for other keys" if {"TK", "left"} & set(case.sizes) else None


def on_gpu(case: Case) -> str | None:
    return None if torch.cuda.is_available() else "it needs a CUDA device"


NOT_ASKED_FOR = ("bias", "cap", "valid", "smoothing", "z", "scale", "weights", "lse")


def _reason(module: str, name: str) -> Callable[[Case], str | None]:
    def unsupported(case: Case) -> str | None:
        special = set(NOT_ASKED_FOR) & set(case.sizes)
        if special:
            return f"it is not asked for {' and '.join(sorted(special))}"
        return why_missing(module, name) or on_gpu(case)

    return unsupported


_LIGER = (
    "liger_kernel.ops.fused_linear_cross_entropy",
    "LigerFusedLinearCrossEntropyFunction",
)
_CCE = ("cut_cross_entropy", "linear_cross_entropy")


def _liger(**inputs: Any) -> Tensor:
    """Its autograd function: what stands around it needs another library."""
    loss: Tensor = function_of(*_LIGER).apply(
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


def _cce(**inputs: Any) -> Tensor:
    """Without its filter of small gradients; every release knows these arguments."""
    operands = inputs["input"], inputs["linear_weight"], inputs["target"]
    loss: Tensor = function_of(*_CCE)(
        *operands, reduction=inputs["reduction"], filter_eps=None, impl="cce"
    )
    return loss


LOSSES = (
    Entry("Liger", _liger, unsupported=_reason(*_LIGER)),
    Entry(
        "CCE, exact",
        _cce,
        unsupported=_reason(*_CCE),
        loose_gradients="it adds up the table's gradient in 16 bits",
    ),
)
