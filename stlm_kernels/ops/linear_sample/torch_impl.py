"""Ids from logits in aten ops, in chunks of rows, so that no (N, V) tensor ever exists."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import runtime
from ..._linear.options import SampleOptions
from ..._linear.projection import form_logits, widened
from ..._torch.random_bits import hashed, hashed_words, shifted

CHUNK_ELEMENTS = 1 << 20
"""Logits drawn from at a time; each takes a few int64 of noise."""
GREEDY_ELEMENTS = 4 * CHUNK_ELEMENTS
"""Elements of a chunk without noise: the fewer products, the less often they read the table."""
LEAST_ROWS = 16
"""Rows below which the product would read the table for too little."""
SORTED_SHARE = 8
"""numpy sorts a row of integers, vectorised, in less time than topk finds this share of it."""


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
    # The operands are cast; autocast would cast the logits as well.
    with runtime.without_autocast(rows):
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
    z = form_logits(rows, weight, bias, options).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    if options.temperature == 0:
        return _first_largest(z)
    if not options.top_k and options.top_p == 1:
        ids = _counted(0, z.shape[1], z.device)
        top = z.amax(1, keepdim=True)
        return _first_largest(_race(z, top, ids, seed, first_row, options))
    z, ids = _ranked(z, options.top_k or z.shape[1])
    first = _first_largest(_race(z, z[:, :1], ids, seed, first_row, options))
    return ids.gather(1, first[:, None])[:, 0]


def _first_largest(scores: Tensor) -> Tensor:
    """(n,) int64 of (n, k): where each row's largest is, of equal ones the first."""
    if runtime.values_visible(scores):  # numpy's is vectorised
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.argmax(1)


def _race(
    z: Tensor,  # (n, k) logits, ranked where top_p cuts them
    top: Tensor,  # (n, 1) the largest of each row
    ids: Tensor,  # (n, k) or (k,) whose they are
    seed: Tensor,  # () int64
    first_row: int,
    options: SampleOptions,
) -> Tensor:
    """(n, k) scores, the first largest of which is drawn; what top_p leaves out is -inf."""
    # Below the largest first: then no temperature is too small to divide by. A row that is -inf
    # becomes NaN, the first of which is its lowest id.
    scores = (z - top).div_(options.temperature)
    if options.top_p < 1:
        mass = scores.softmax(1).cumsum(1)
        scores[:, 1:].masked_fill_(mass[:, :-1] >= options.top_p, -torch.inf)
    rows = _counted(first_row, z.shape[0], z.device)
    return scores.sub_(noise(seed, rows[:, None], ids, z.dtype).log_())


def _ranked(
    z: Tensor,  # (n, V)
    count: int,
) -> tuple[Tensor, Tensor]:
    """(n, count) largest logits in falling order and their ids; of equal ones the lowest ids."""
    if z.dtype == torch.float64:
        z, ids = z.sort(dim=1, descending=True, stable=True)
        return z[:, :count], ids[:, :count]
    # A stable sort is slow, and topk promises nothing of equal ones. So each becomes an integer
    # of its own: bits whose order is that of falling floats, both zeros the same, and its id.
    bits = (0.0 - z).view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(2**31 - 1))
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(_counted(0, z.shape[1], z.device))
    if SORTED_SHARE * count >= z.shape[1] and runtime.values_visible(keys):
        keys.numpy().sort(axis=1)
        keys = keys[:, :count]
    else:
        keys = keys.topk(count, dim=1, largest=False).values
    ids = keys & (2**32 - 1)
    return z.gather(1, ids), ids


def noise(
    seed: Tensor,  # () int64
    rows: Tensor,  # (n, 1) int64
    ids: Tensor,  # (n, k) or (k,) int64
    dtype: torch.dtype,
) -> Tensor:
    """(n, k) exponential noise, by seed, row and id alone."""
    if runtime.values_visible(seed, rows, ids):  # numpy's calls are cheaper
        words = hashed_words(seed, rows, ids) >> 24
        below = torch.from_numpy(words.astype("float64" if dtype == torch.float64 else "float32"))
    else:
        below = shifted(hashed(seed, rows, ids), 24).to(dtype)
    below.mul_(-(2.0**-40)).sub_(2.0**-41)
    return below.clamp_min_(torch.finfo(dtype).eps / 2 - 1).log1p_().neg_()


def _counted(first: int, count: int, device: torch.device) -> Tensor:
    """first, first + 1, ...; where inductor compiles, loaded from memory.

    It would make the index of a C++ loop of an arange, and a compiler that takes signed overflow
    for impossible drops the end of a loop whose index is in the hash's products: seen wherever the
    seed was a number known to it. A sort stays a call.
    """
    numbers = torch.arange(first, first + count, device=device)
    return numbers.sort().values if torch.compiler.is_compiling() else numbers
