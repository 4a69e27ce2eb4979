"""linear_sample for judging the others: the exact distribution in fp64, and plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear_logprobs.reference import reference_logits, yardstick_logits


def distribution(
    z: Tensor,  # (V,) fp64 logits after scale and cap
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """(V,) fp64 probabilities of each id, exactly 0 where it must never be drawn."""
    order = sorted(range(len(z)), key=lambda i: (-float(z[i]), i))
    if temperature == 0:
        order = order[:1]
    kept = torch.tensor(order[:top_k])
    z = z if temperature == 0 else z / temperature
    mass = z[kept].softmax(0)
    if top_p is not None:
        before = mass.cumsum(0) - mass
        count = max(1, int((before < top_p).sum()))
        kept, mass = kept[:count], mass[:count] / mass[:count].sum()
    return torch.zeros_like(z).index_copy(0, kept, mass)


def reference(
    input: Tensor,  # (..., D) fp64
    linear_weight: Tensor,  # (V, D) fp64
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> Tensor:
    """The ids where only one each can be drawn (ValueError elsewhere), one row after the other."""
    ids = []
    for row in input.reshape(-1, input.shape[-1]):
        z = reference_logits(row, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
        (possible,) = distribution(z, temperature, top_k, top_p).nonzero()
        ids.append(int(possible))
    return torch.tensor(ids, dtype=torch.int64).view(input.shape[:-1])


def yardstick(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> Tensor:
    """Plain torch as generators write it: logits, sort, cut, softmax, multinomial."""
    z = yardstick_logits(input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
    if temperature == 0:
        return z.argmax(1).view(input.shape[:-1])
    ranked, order = (z / temperature).sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    if top_p is not None:
        mass = ranked.softmax(1)
        ranked = ranked.masked_fill(mass.cumsum(1) - mass >= top_p, -torch.inf)
    drawn = torch.multinomial(ranked.softmax(1), 1) if len(z) else order[:, :1]
    return order.gather(1, drawn).view(input.shape[:-1])
