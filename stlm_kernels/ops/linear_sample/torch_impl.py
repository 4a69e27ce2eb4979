"""Ids from logits in aten ops, in chunks of rows, so that no (N, V) tensor ever exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ..._noise import hashed, shifted
from ..linear_logprobs.torch_impl import widened

if TYPE_CHECKING:
    from .op import SampleOptions

CHUNK_ELEMENTS = 1 << 20
"""Logits drawn from at a time; each takes a few int64 of noise."""
GREEDY_ELEMENTS = 4 * CHUNK_ELEMENTS
"""The same without noise: the fewer products, the less often they read the table."""
LEAST_ROWS = 16
"""Rows below which the product would read the table for too little."""


def sample(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    seed: Tensor,  # () int64
    options: SampleOptions,
) -> Tensor:
    """(N,) int64."""
    rows, weight, bias = widened(rows, weight, bias, options.valid_vocab)
    elements = GREEDY_ELEMENTS if options.temperature == 0 else CHUNK_ELEMENTS
    step = max(LEAST_ROWS, elements // options.valid_vocab)
    # The operands are rounded; autocast would round the logits as well.
    with _checks.without_autocast(rows):
        if rows.shape[0] <= step:
            return _sample_chunk(rows, weight, bias, seed, 0, options)
        ids = [
            _sample_chunk(part, weight, bias, seed, i * step, options)
            for i, part in enumerate(rows.split(step))
        ]
    return torch.cat(ids)


def _sample_chunk(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    first_row: int,
    options: SampleOptions,
) -> Tensor:
    z = F.linear(rows, weight, bias)
    if options.logit_scale != 1.0:
        z = z * options.logit_scale
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    z = z.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    if options.temperature == 0:
        return z.argmax(1)
    # Below the largest first: then no temperature is too small to divide by.
    top = z.amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
    scores = (z - top) / options.temperature
    scores = scores - noise(seed, first_row, z.shape, z.dtype).log_()
    if options.top_k or options.top_p < 1:
        scores = scores.masked_fill(~_kept(z, top, options), -torch.inf)
    return scores.argmax(1)


def _kept(
    z: Tensor,  # (n, V)
    top: Tensor,  # (n, 1)
    options: SampleOptions,
) -> Tensor:
    """(n, V) bool: what top_k and then top_p keep."""
    if options.top_k:
        ranked = z.topk(options.top_k, dim=1).values
    else:
        ranked = z.sort(dim=1, descending=True).values
    count = torch.full_like(top, ranked.shape[1], dtype=torch.int64)
    if options.top_p < 1:
        mass = ((ranked - top) / options.temperature).softmax(1).cumsum(1)
        count = 1 + (mass[:, :-1] < options.top_p).sum(1, keepdim=True)
    least = ranked.gather(1, count - 1)
    above, ties = z > least, z == least
    room = count - above.sum(1, keepdim=True)
    return above | (ties & (ties.cumsum(1) <= room))


def noise(
    seed: Tensor,  # () int64
    first_row: int,
    shape: torch.Size,  # (n, V)
    dtype: torch.dtype,
) -> Tensor:
    """(n, V) exponential noise, by seed, row and id alone."""
    row = _counted(first_row, shape[0], seed.device)
    column = _counted(0, shape[1], seed.device)
    uniform = (
        shifted(hashed(seed, row[:, None], column), 24).to(dtype).mul_(2.0**-40).add_(2.0**-41)
    )
    return uniform.clamp_max_(1 - torch.finfo(dtype).eps / 2).neg_().log1p_().neg_()


def _counted(first: int, count: int, device: torch.device) -> Tensor:
    """first, first + 1, ...; where inductor compiles, loaded from memory.

    It would make the index of a C++ loop of an arange, and a compiler that takes signed overflow
    for impossible drops the end of a loop whose index is in the hash's products: seen wherever the
    seed was a number known to it. A sort stays a call.
    """
    numbers = torch.arange(first, first + count, device=device)
    return numbers.sort().values if torch.compiler.is_compiling() else numbers
