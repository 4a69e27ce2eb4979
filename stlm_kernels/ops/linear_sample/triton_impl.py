"""Sampling in Triton for vocabularies of up to 512 columns, in one kernel.

A program owns BLOCK_N rows. Their logits z, columns down and rows across in one power-of-two block
of columns, never leave the chip. What top_k and top_p keep is found without sorting: floats mapped
to integers of the same order, the largest threshold at which enough lies at or above it is found
two bits at a time, in 16 rounds of three sums; of the columns at the threshold the lowest ids fill
what is left. The id is the argmax of (z - max z) / temperature - log(E) over what is kept, E =
-log(1 - u) with u a hash of (seed, row, id).

Floor, N = 64, D = 512, V = 256, bf16: 0.33 MB = 0.1 us; what takes the time is one launch, the
table through one SM (0.26 MB, 2 us) and 16 dependent rounds for each of top_k and top_p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type, logits_tile
from . import config as configs

COLUMN_STEP = tl.constexpr(configs.COLUMN_STEP)
ROW_STEP = tl.constexpr(configs.ROW_STEP)
MIX_FIRST = tl.constexpr(configs.MIX_FIRST)
MIX_SECOND = tl.constexpr(configs.MIX_SECOND)
DIGIT = tl.constexpr(2)
"""Bits of a threshold that are found together."""
LEAST = tl.constexpr(-(2**31))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _mixed(x):
    """SplitMix64's output function on int64, whose shifts bring ones in: hence the masks."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _noise(seed_ptr, rows, columns):
    """(columns, rows) exponential noise, by seed, row and id alone."""
    seeds = tl.load(seed_ptr) + tl.zeros(rows.shape, tl.int64)
    state = _mixed((_mixed(seeds) ^ rows.to(tl.int64)) * ROW_STEP)
    bits = _mixed((state[None, :] ^ columns.to(tl.int64)[:, None]) * COLUMN_STEP)
    u = ((bits >> 24) & 0xFFFFFFFFFF).to(tl.float32) * 9.094947017729282e-13  # 2^-40
    u = tl.minimum(u + 4.547473508864641e-13, 0.99999994)  # within (0, 1)
    # -log(1 - u); where 1 - u has lost the digits of u, its series.
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return tl.where(u < 0.015625, series, -tl.log(1.0 - u))


@triton.jit
def _ordered(z):
    """int32 in the order of the floats, which hold no NaN; both zeros are the same."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _reached(keys, weights, least, need, shift):
    """(rows,) int32: the largest digit at `shift` of a threshold that weights enough reach."""
    digit = tl.full(need.shape, 1, tl.int32) << shift
    first, second, third = tl.reduce(
        (
            tl.where(keys >= (least + digit)[None, :], weights, 0.0),
            tl.where(keys >= (least + 2 * digit)[None, :], weights, 0.0),
            tl.where(keys >= (least + 3 * digit)[None, :], weights, 0.0),
        ),
        0,
        _add_three,
    )
    return (first >= need).to(tl.int32) + (second >= need) + (third >= need)


@triton.jit
def _heaviest(keys, weights, need):
    """The fewest columns of the largest keys whose weights reach `need`; ties: lowest columns."""
    # The threshold's digits from the top, counted from the least integer; sums wrap around.
    least = tl.zeros(need.shape, tl.int32) + LEAST
    for step in range(0, 32 // DIGIT):
        shift = 32 - DIGIT * (step + 1)
        reached = _reached(keys, weights, least, need, shift)
        least += reached << shift
    above, ties = keys > least[None, :], (keys == least[None, :]) & (weights > 0.0)
    weight_above = tl.sum(tl.where(above, weights, 0.0), 0)
    earlier = (tl.cumsum(ties.to(tl.int32), 0) - 1).to(tl.float32)
    fits = weight_above[None, :] + earlier * weights < need[None, :]
    return (above & (weights > 0.0)) | (ties & fits)


@triton.jit(do_not_specialize=["n_rows", "top_k"])
def stlm_linear_sample_fwd(
    h_ptr, w_ptr, bias_ptr, seed_ptr, out_ptr,
    n_rows, valid, scale, cap, temperature, top_k, top_p,
    D: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, columns = rows < n_rows, tl.arange(0, BLOCK_V)
    z = logits_tile(
        h_ptr, w_ptr, bias_ptr, rows, live, columns, valid, scale, cap, D, DOT, HAS_BIAS, BLOCK_D
    )
    z = tl.where(z == z, tl.minimum(z, LARGEST), float("-inf"))
    score = z
    if temperature > 0:
        # Below the largest first: then no temperature is too small to divide by.
        top = tl.maximum(tl.max(z, 0), -LARGEST)
        score = (z - top[None, :]) / temperature
        # Columns that do not exist are -inf: last in every order, without mass, never the largest.
        kept = z == z
        if top_k > 0:
            need = tl.zeros((BLOCK_N,), tl.float32) + top_k
            kept = _heaviest(_ordered(z), tl.zeros(z.shape, tl.float32) + 1.0, need)
        if top_p < 1:
            mass = tl.where(kept, tl.exp(score), 0.0)
            kept = _heaviest(_ordered(z), mass, tl.sum(mass, 0) * top_p)
        score -= tl.log(_noise(seed_ptr, rows, columns))
        score = tl.where(kept, score, float("-inf"))
    best = tl.max(score, 0)
    ids = tl.min(tl.where(score == best[None, :], columns[:, None], BLOCK_V), 0)
    tl.store(out_ptr + rows, ids.to(tl.int64), mask=live)


def launch_fwd(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    seed: Tensor,  # () int64
    dot_dtype: torch.dtype,
    softcap: float,
    logit_scale: float,
    valid_vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """(N,) int64."""
    count, width = rows.shape
    out = torch.empty(count, dtype=torch.int64, device=rows.device)
    config = configs.fwd_config(width, valid_vocab, weight.dtype, dot_dtype, rows.device)
    _launch.launch(
        stlm_linear_sample_fwd, _launch.ceil_div(count, config["BLOCK_N"]),
        rows.contiguous(), weight.contiguous(), weight if bias is None else bias.contiguous(),
        seed, out,
        count, valid_vocab, logit_scale, softcap, temperature, top_k, top_p,
        D=width, DOT=dot_type(dot_dtype), HAS_BIAS=bias is not None,
        BLOCK_V=max(16, 1 << (valid_vocab - 1).bit_length()), device=rows.device, **config,
    )  # fmt: skip
    return out
