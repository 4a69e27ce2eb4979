"""Peers of attention to packed documents: torch's varlen_attn, flash-linear-attention.

Both serve dense batches too: every sequence of the batch as a document.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, lengths_of
from .installed import function_of, on_gpu, own_keys, why_missing

_VARLEN = ("torch.nn.attention.varlen", "varlen_attn")
_FLA = ("fla.ops.attn", "parallel_attn")


@functools.cache  # called within what is timed
def _takes(module: str, name: str, argument: str) -> bool:
    return argument in inspect.signature(function_of(module, name)).parameters


def _why_not(module: str, name: str) -> str | None:
    """Return the reason why this machine has no such function with a window, or None."""
    missing = why_missing(module, name)
    if missing is None and not _takes(module, name, "window_size"):
        missing = f"this {name} has no window"
    return missing


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, **options: Any) -> Tensor:
    shape = q.shape
    q, k, v = (x.flatten(0, -3) for x in (q, k, v))
    out: Tensor = function_of(*_VARLEN)(q, k, v, cu, cu, longest, longest, **options)
    return out.view(shape)


def _varlen_inputs(inputs: Inputs) -> Inputs:
    q, cu, window = inputs["q"], inputs.get("cu_seqlens"), inputs["window"]
    if cu is None:
        tokens = q.shape[:-2].numel()
        cu = torch.arange(0, tokens + 1, q.shape[-3], dtype=torch.int32, device=q.device)
    # A torch that does not ask whether heads are grouped takes them as they come.
    grouped = (
        {"enable_gqa": q.shape[-2] != inputs["k"].shape[-2]}
        if _takes(*_VARLEN, "enable_gqa")
        else {}
    )
    return {name: inputs[name] for name in ("q", "k", "v", "scale")} | {
        "cu": cu,
        "longest": max(lengths_of(cu), default=0),
        "window_size": (-1 if window is None else window - 1, 0),
        **grouped,
    }


def _varlen_reason(case: Case) -> str | None:
    return own_keys(case) or _why_not(*_VARLEN) or on_gpu(case)


def _patch_inputs(inputs: Inputs) -> Inputs:
    """Give every patch as a document, without a window."""
    documents = {"window": None, "cu_seqlens": inputs["cu_patchlens"]}
    reach = -1, 0 if inputs["causal"] else -1
    return _varlen_inputs(inputs | documents) | {"window_size": reach}


def _fla(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out: Tensor = function_of(*_FLA)(
        *(x if x.dim() == 4 else x[None] for x in (q, k, v)), **options
    )
    return out.view(q.shape)


def _fla_inputs(inputs: Inputs) -> Inputs:
    """Give offsets in int64; a window of w is the token itself and w - 1 before it."""
    cu = inputs.get("cu_seqlens")
    return {name: inputs[name] for name in ("q", "k", "v", "scale")} | {
        "window_size": inputs["window"],
        "cu_seqlens": None if cu is None else cu.long(),
    }


def _fla_reason(case: Case) -> str | None:
    return own_keys(case) or _why_not(*_FLA) or on_gpu(case)


VARLEN = Entry("varlen_attn", _varlen, _varlen_inputs, _varlen_reason)
PATCH_VARLEN = Entry("varlen_attn", _varlen, _patch_inputs, _varlen_reason)
FLA = Entry("fla parallel_attn", _fla, _fla_inputs, _fla_reason)
