"""Peers of qk_norm_rope."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, compiled


def _with_tables(inputs: Inputs) -> Inputs:
    """Give cos and sin of every position, repeated for both halves, in q's dtype; untimed."""
    tables = tables_by_row(inputs, inputs["q"].shape[:-2], inputs["q"].dtype)
    names = ("q", "k", "q_weight", "k_weight", "eps")
    return {name: inputs[name] for name in names if name in inputs} | tables


def tables_by_row(inputs: Inputs, lead: torch.Size, dtype: torch.dtype) -> Inputs:
    """(..., T, 1, K) cos and sin of rows (..., T)."""
    positions = inputs.get("positions")
    at = slice(lead[-1]) if positions is None else positions.long()
    return {
        name: inputs[name][at].repeat(*[1] * (len(lead) - 1), 1, 2)[..., None, :].to(dtype)
        for name in ("cos", "sin")
    }


def _halves_only(case: Case) -> str | None:
    return "it pairs the halves of a head" if "pairs" in case.sizes else None


def norm_rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q, q_weight), turned(k, k_weight)


_NORM_ROTATE = Entry("F.rms_norm + rotation", norm_rotate, _with_tables, _halves_only)


def _pairs(**inputs: Any) -> tuple[Tensor, Tensor]:
    """Rotate as the paper's repository does: complex numbers in float32."""
    turn = torch.complex(inputs["cos"], inputs["sin"])[: inputs["q"].shape[-3], None]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    return turned(inputs["q"]), turned(inputs["k"])


def _bare_pairs(case: Case) -> str | None:
    bare = "pairs" in case.sizes and case["norm"] == "none" and "positions" not in case.sizes
    return None if bare else "it turns pairs, without a norm"


PEERS: dict[str, tuple[Entry, ...]] = {
    "qk_norm_rope": (
        _NORM_ROTATE,
        Entry("complex numbers", _pairs, unsupported=_bare_pairs),
        compiled(_NORM_ROTATE),
    ),
}
