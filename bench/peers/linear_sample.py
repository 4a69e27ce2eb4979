"""Peers of linear_sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case

from .entry import Entry, compiled


def _logits(inputs: dict[str, Any]) -> Tensor:
    return F.linear(inputs["input"], inputs["linear_weight"], inputs.get("linear_bias"))


def _without_head_options(case: Case) -> str | None:
    special = {"cap", "scale", "valid"} & set(case.sizes)
    return f"it has no {' and no '.join(sorted(special))}" if special else None


def _greedy_only(case: Case) -> str | None:
    return _without_head_options(case) or (None if case.get("t") == 0 else "it draws nothing")


def _drawing_only(case: Case) -> str | None:
    return _without_head_options(case) or ("it draws" if case.get("t") == 0 else None)


def _argmax(**inputs: Any) -> Tensor:
    return _logits(inputs).argmax(-1)


def _likeliest(**inputs: Any) -> tuple[Tensor, Tensor]:
    """Return probabilities in falling order, cut by top-k and top-p, and their ids."""
    z = _logits(inputs).float() / inputs["temperature"]
    count = z.shape[-1] if inputs["top_k"] is None else inputs["top_k"]
    ranked, order = z.topk(count)
    mass = ranked.softmax(-1)
    if inputs["top_p"] is not None:
        mass = mass.masked_fill(mass.cumsum(-1) - mass >= inputs["top_p"], 0)
    return mass, order


def _race(**inputs: Any) -> Tensor:
    """Draw as gpt-fast does, without a wait: the largest probability over an exponential."""
    mass, order = _likeliest(**inputs)
    first = (mass / torch.empty_like(mass).exponential_()).argmax(-1, keepdim=True)
    return order.gather(-1, first)[..., 0]


def _multinomial(**inputs: Any) -> Tensor:
    mass, order = _likeliest(**inputs)
    return order.gather(-1, torch.multinomial(mass, 1))[..., 0]


_ARGMAX = Entry("F.linear + argmax", _argmax, unsupported=_greedy_only)
_RACE = Entry("top-k, top-p, exponentials", _race, unsupported=_drawing_only)

PEERS: dict[str, tuple[Entry, ...]] = {
    "linear_sample": (
        _ARGMAX,
        _RACE,
        Entry("top-k, top-p, multinomial", _multinomial, unsupported=_drawing_only),
        compiled(_ARGMAX),
        compiled(_RACE),
    ),
}
