"""Draw ids from logits with stock PyTorch, repeatably."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_ids(
    logits: Tensor,  # (..., V)
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Tensor:  # (...) int64
    """One id per row of logits.

    Args:
        logits: (..., V), scaled and capped.
        temperature: divides the logits; 0 takes the largest, ties to the lowest id.
        top_k: keep the k largest, ties to the lowest id; more than V keeps all.
        top_p: then keep the smallest set with at least this mass, and at least one.
        seed: of the noise, which depends on it, the row and the id alone; None draws one from
            torch's generator.

    Raises:
        ValueError: temperature < 0, top_k < 1, top_p outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None or top_p is not None:
        logits = _keep_likely(logits, top_k, top_p)
    return (logits + _gumbel_noise(logits.shape, seed).to(logits.device)).argmax(-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise the ValueErrors of `sample_ids`, before any work is done."""
    if not temperature >= 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected None or at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p}")


def _keep_likely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set everything to -inf that top_k and then top_p drop."""
    # A stable sort breaks ties by id, on every device alike.
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = -torch.inf
    if top_p is not None:
        mass = ranked.softmax(-1)
        mass_before = mass.cumsum(-1) - mass
        ranked = ranked.masked_fill(mass_before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def _gumbel_noise(shape: torch.Size, seed: int | None) -> Tensor:
    """Noise whose first rows do not change when rows are appended."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return -(-uniform.clamp_min(1e-300).log()).log()
