"""Gradients of byte_pool with a position weight, in Triton.

A patch is no bag of bytes then: dE takes one one-hot product for each slot, and the gradient of the
weight one gathered product sum. Right and deterministic, without a speed target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import segment_bounds, sum_each
from . import config as configs
from .triton_impl import add_product, dot_plan, upstream_tile


@triton.jit
def _ids_at(first_ptrs, length, slot, vocab):
    """Return the id in this slot of each patch, -1 where the patch is shorter or the id is bad."""
    inside = slot < length
    raw = tl.load(first_ptrs + slot, mask=inside, other=0)
    return tl.where(inside & (raw >= 0) & (raw < vocab), raw.to(tl.int32), -1)


@triton.jit
def _patch_tile(cu_ptr, patches, last_patch, total, MEAN: tl.constexpr):
    """Start, length and scale of a tile of patches; those past the end are empty."""
    start, end = segment_bounds(cu_ptr, patches, patches < last_patch, total)
    length = (end - start).to(tl.int32)
    scale = tl.full(length.shape, 1.0, tl.float32)
    if MEAN:
        scale = 1.0 / tl.maximum(length, 1).to(tl.float32)
    return start, length, scale


@triton.jit(do_not_specialize=["total", "n_patches", "gain_slots", "run"])
def stlm_byte_pool_bwd_gain_table(
    ids_ptr, cu_ptr, gain_ptr, grad_ptr, partial_ptr,
    total, n_patches, vocab, gain_slots, run,
    D: tl.constexpr, MEAN: tl.constexpr, DOT: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    v_tiles = tl.cdiv(vocab, BLOCK_V)
    d_tiles = tl.cdiv(D, BLOCK_D)
    rows = (program % v_tiles).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = (program // v_tiles % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = program // (v_tiles * d_tiles)
    last_patch = tl.minimum((split + 1) * run, n_patches)
    stored = grad_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for first in range(split * run, last_patch, BLOCK_P):
        patches = first + tl.arange(0, BLOCK_P)
        start, length, scale = _patch_tile(cu_ptr, patches, last_patch, total, MEAN)
        x = upstream_tile(grad_ptr, patches, columns, length > 0, scale, D)
        for slot in range(0, tl.max(length)):
            ids = _ids_at(ids_ptr + start, length, slot, vocab)
            gains = gain_ptr + tl.minimum(slot, gain_slots - 1).to(tl.int64) * D + columns
            gain = tl.load(gains, mask=columns < D, other=0.0).to(stored).to(tl.float32)
            acc = add_product(acc, rows[:, None] == ids[None, :], x * gain[None, :], DOT, TERMS)
    mask = (rows < vocab)[:, None] & (columns < D)[None, :]
    out = (split * vocab + rows)[:, None] * D + columns[None, :]
    tl.store(partial_ptr + out, acc, mask=mask)


@triton.jit(do_not_specialize=["total", "n_patches", "gain_slots", "run"])
def stlm_byte_pool_bwd_gain_slots(
    ids_ptr, weight_ptr, cu_ptr, grad_ptr, partial_ptr,
    total, n_patches, vocab, gain_slots, run,
    D: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d_tiles = tl.cdiv(D, BLOCK_D)
    own_slot = (program % gain_slots).to(tl.int32)
    columns = (program // gain_slots % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = program // (gain_slots * d_tiles)
    last_patch = tl.minimum((split + 1) * run, n_patches)
    stored = grad_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(split * run, last_patch, BLOCK_P):
        patches = first + tl.arange(0, BLOCK_P)
        start, length, scale = _patch_tile(cu_ptr, patches, last_patch, total, MEAN)
        x = upstream_tile(grad_ptr, patches, columns, length > 0, scale, D)
        longest = tl.max(length)
        # The last row of the gain serves every slot from its own on.
        last = tl.where(own_slot == gain_slots - 1, longest, tl.minimum(own_slot + 1, longest))
        for slot in range(own_slot, last):
            ids = _ids_at(ids_ptr + start, length, slot, vocab)
            table = weight_ptr + ids.to(tl.int64)[:, None] * D + columns[None, :]
            mask = (ids >= 0)[:, None] & (columns < D)[None, :]
            row = tl.load(table, mask=mask, other=0.0).to(stored).to(tl.float32)
            acc += tl.sum(tl.where(mask, x * row, 0.0), 0)
    out = (split * gain_slots + own_slot) * D + columns
    tl.store(partial_ptr + out, acc, mask=columns < D)


def launch_bwd_gain(
    grad: Tensor,  # (P, D)
    byte_ids: Tensor,  # (T,)
    weight: Tensor,  # (V, D)
    cu_patchlens: Tensor,  # (P+1,)
    position_weight: Tensor,  # (L, D)
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """(V, D) gradient of the table and (L, D) gradient of the gain."""
    (patches, width), vocab, slots = grad.shape, weight.shape[0], position_weight.shape[0]
    grad, byte_ids, weight, cu, gain = (
        x.contiguous() for x in (grad, byte_ids, weight, cu_patchlens, position_weight)
    )
    config = configs.bwd_gain_config(width, grad.dtype, grad.device)
    programs, block_v = config.pop("PROGRAMS"), config.pop("BLOCK_V")
    d_tiles = _launch.ceil_div(width, config["BLOCK_D"])
    sizes = (byte_ids.shape[0], patches, vocab, slots)

    tiles = _launch.ceil_div(vocab, block_v) * d_tiles
    splits, run = _launch.splits(patches, tiles, programs, config["BLOCK_P"])
    table = torch.empty((splits, vocab, width), dtype=torch.float32, device=grad.device)
    dot, terms = dot_plan(grad.dtype, weight.dtype, width, exact=False)
    _launch.launch(
        stlm_byte_pool_bwd_gain_table, splits * tiles,
        byte_ids, cu, gain, grad, table, *sizes, run,
        D=width, MEAN=mean, DOT=dot, TERMS=terms, BLOCK_V=block_v, device=grad.device, **config,
    )  # fmt: skip

    splits, run = _launch.splits(patches, slots * d_tiles, programs, config["BLOCK_P"])
    by_slot = torch.empty((splits, slots, width), dtype=torch.float32, device=grad.device)
    _launch.launch(
        stlm_byte_pool_bwd_gain_slots, splits * slots * d_tiles,
        byte_ids, weight, cu, grad, by_slot, *sizes, run,
        D=width, MEAN=mean, device=grad.device, **config,
    )  # fmt: skip
    dtable, dgain = sum_each((table, by_slot), (weight.dtype, position_weight.dtype))
    return dtable, dgain
