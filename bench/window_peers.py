"""Windowed attention in stock ops: blocks of one window that see themselves and the one before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels._spec import Case, Inputs

from .entry import Entry
from .others import own_keys

NO_DOCUMENT = -1
BEFORE_ALL = -2


def _batched(inputs: Inputs) -> Inputs:
    """(B, T, H, K), and the document of each row."""
    q = inputs["q"]
    operands = {name: inputs[name] if q.dim() == 4 else inputs[name][None] for name in "qkv"}
    borders = inputs.get("cu_seqlens")
    rows = torch.arange(operands["q"].shape[1], device=q.device)
    documents = torch.zeros_like(rows)
    if borders is not None:
        documents = torch.searchsorted(borders.long(), rows, right=True)
    own = {"window": inputs["window"], "scale": inputs["scale"], "packed": q.dim() == 3}
    return operands | own | {"documents": documents}


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, packed: bool,
    documents: Tensor,
) -> Tensor:  # fmt: skip
    length, heads, width = q.shape[1:]
    blocks = -(-length // window)
    tail = (0, 0, 0, 0, 0, blocks * window - length)
    q, k, v = (F.pad(x, tail).unflatten(1, (blocks, window)).transpose(2, 3) for x in (q, k, v))
    k, v = (_with_previous(x).repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    factor = width**-0.5 if scale is None else scale
    scores = (q * factor) @ k.transpose(-1, -2)  # (B, blocks, H, window, 2 window)
    # In place: the product does not keep its result for the backward pass.
    scores += _mask(window, documents, scores)
    out = (scores.softmax(-1) @ v).transpose(2, 3).flatten(1, 2)[:, :length]
    return out[0] if packed else out


def _with_previous(x: Tensor) -> Tensor:
    """(B, blocks, H, W, K) -> (B, blocks, H, 2 W, K): the block before, zeros at first, and own."""
    before = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat((before, x), dim=3)


def _mask(window: int, documents: Tensor, scores: Tensor) -> Tensor:
    """0 where a row may look, -inf elsewhere: (blocks, 1, window, 2 window), like scores."""
    length, device = documents.shape[0], scores.device
    blocks = -(-length // window)
    # Padding rows see each other, so that no row of scores is empty and turns into NaN.
    documents = F.pad(documents, (0, blocks * window - length), value=NO_DOCUMENT)
    keys = F.pad(documents, (window, 0), value=BEFORE_ALL).unfold(0, 2 * window, window)
    same = documents.view(blocks, window, 1) == keys[:, None]
    offsets = torch.arange(2 * window, device=device) - torch.arange(window, device=device)[:, None]
    allowed = same & (offsets > 0) & (offsets <= window)
    return scores.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)[:, None]


def _window_only(case: Case) -> str | None:
    return own_keys(case) if "W" in case.sizes else "it is for windows"


BLOCKS = Entry("blocks of bmm", _windowed, _batched, _window_only)
