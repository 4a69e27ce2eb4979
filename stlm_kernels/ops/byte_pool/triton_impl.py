"""byte_pool in Triton. out[p] = s_p sum_k a_k E[b_pk]; dE = C^T diag(s) G, C[p, v] the counts.

Forward. A warp owns BLOCK_D columns of PATCHES patches, one patch at a time: it adds one gathered
row for each byte, so the table's slice is read from L1, device memory sees each id and each output
once, and no patch waits for a longer one. Four rows are under way together. Pairs of bfloat16 are
read as one int32, whose halves are fp32 after a shift or a mask. Floor: T + 4P + 2PD bytes (bf16),
at 1M bytes, mean patch 6, D = 768: 271 MB = 63 us at 4.3 TB/s; D = 128: 11 us. Adds: T x D. Issue
slots of an H200 as bench.bounds counts them, not timed: 38 us at D = 128 and 179 at D = 768 for
patches of 6 bytes, 33 and 157 for English words; too many where the assembler unrolls a loop.

Backward. A program owns BLOCK_V rows x BLOCK_D columns of dE for one run of patches. It counts the
bytes of BLOCK_P patches into a tile of C^T by comparing slot by slot, and multiplies that with the
upstream tile on the tensor cores; its cost does not depend on which bytes are frequent. The runs'
partial sums are added in a fixed order. Floor: T + 4P + 2PD + 4VD bytes, 63 us at D = 768, against
2 P V D = 69 GFLOP = 87 us of products, half that where the upper 128 rows are skipped.

With a slot gain a patch is no longer a bag: dE takes one one-hot product for each slot, and dgain
one gathered product sum. Right and deterministic, without a speed target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import INTERPRETED, segment_bounds, sum_splits
from . import config as configs


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


@triton.jit
def _upstream_tile(grad_ptr, patches, columns, live, scale, D: tl.constexpr):
    """scale * G in fp32; rows of empty patches are not read, so that NaN there reaches nothing."""
    mask = live[:, None] & (columns < D)[None, :]
    grad = tl.load(grad_ptr + patches[:, None] * D + columns[None, :], mask=mask, other=0.0)
    return grad.to(tl.float32) * scale[:, None]


@triton.jit
def _add_product(acc, left, x, DOT: tl.constexpr, TERMS: tl.constexpr):
    """acc + left @ x; `left` is exact in DOT, x may need several terms to keep its digits."""
    left = left.to(DOT)
    for _ in tl.static_range(TERMS):
        term = x.to(DOT)
        acc = tl.dot(left, term, acc, input_precision="ieee")
        x -= term.to(tl.float32)
    return acc


@triton.jit
def _id_at(ids_ptr, position, vocab, CHECKED: tl.constexpr):
    """Return the id of a byte, 0 for a bad one, and the mask of good ones."""
    raw = tl.load(ids_ptr + position)
    good = (raw >= 0) & (raw < vocab)
    if CHECKED:
        raw = tl.where(good, raw, 0)
    return raw.to(tl.int64), good


@triton.jit
def _sum_of_rows(
    ids_ptr, weight_ptr, gain_ptr, start, end, columns, vocab, gain_slots,
    D: tl.constexpr, HAS_GAIN: tl.constexpr, CHECKED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Add the rows of a patch; also returns whether all its ids are good."""
    acc = tl.zeros(columns.shape, tl.float32)
    all_good = tl.full((), 1, tl.int1)
    for position in tl.range(start, end, loop_unroll_factor=4):
        byte, good = _id_at(ids_ptr, position, vocab, CHECKED)
        all_good &= good
        row = tl.load(weight_ptr + byte * D + columns, mask=columns < D, other=0.0)
        # Cast to the stored dtype first: under autocast the table is fp32.
        row = row.to(STORED).to(tl.float32)
        if HAS_GAIN:
            slot = tl.minimum(position - start, gain_slots - 1).to(tl.int64)
            gain = tl.load(gain_ptr + slot * D + columns, mask=columns < D, other=0.0)
            row *= gain.to(STORED).to(tl.float32)
        acc += row
    return acc, all_good


@triton.jit
def _sum_of_pairs(
    ids_ptr, weight_ptr, start, end, columns, vocab, D: tl.constexpr, CHECKED: tl.constexpr
):  # fmt: skip
    """Add rows of which each int32 holds two bfloat16: a shift or a mask makes them fp32."""
    low = tl.zeros(columns.shape, tl.float32)
    high = tl.zeros(columns.shape, tl.float32)
    all_good = tl.full((), 1, tl.int1)
    for position in tl.range(start, end, loop_unroll_factor=4):
        byte, good = _id_at(ids_ptr, position, vocab, CHECKED)
        all_good &= good
        if D % columns.shape[0] == 0:
            pair = tl.load(weight_ptr + byte * D + columns)
        else:
            pair = tl.load(weight_ptr + byte * D + columns, mask=columns < D, other=0)
        low += (pair << 16).to(tl.float32, bitcast=True)
        high += (pair & -65536).to(tl.float32, bitcast=True)
    return tl.interleave(low, high), all_good


@triton.jit(do_not_specialize=["total", "n_patches", "gain_slots", "chunks"])
def stlm_byte_pool_fwd(
    ids_ptr, weight_ptr, cu_ptr, gain_ptr, out_ptr,
    total, n_patches, vocab, gain_slots, chunks,
    D: tl.constexpr, MEAN: tl.constexpr, HAS_GAIN: tl.constexpr, CHECKED: tl.constexpr,
    BLOCK_D: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program // chunks
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    stored = out_ptr.dtype.element_ty
    first = (program % chunks) * PATCHES
    out = out_ptr + first.to(tl.int64) * D + columns
    for patch in range(first, tl.minimum(first + PATCHES, n_patches)):
        # Safe for any offsets: no byte outside [0, total) is read, a negative length is empty.
        start = tl.maximum(tl.load(cu_ptr + patch), 0)
        end = tl.minimum(tl.load(cu_ptr + patch + 1), total)
        if weight_ptr.dtype.element_ty == tl.int32:
            pairs = block * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
            acc, all_good = _sum_of_pairs(
                ids_ptr, weight_ptr, start, end, pairs, vocab, D // 2, CHECKED
            )
        else:
            acc, all_good = _sum_of_rows(
                ids_ptr, weight_ptr, gain_ptr, start, end, columns, vocab, gain_slots,
                D, HAS_GAIN, CHECKED, stored,
            )  # fmt: skip
        if MEAN:
            acc *= 1.0 / tl.maximum(end - start, 1).to(tl.float32)
        if CHECKED:
            acc = tl.where(all_good, acc, float("nan"))
        tl.store(out, acc.to(stored), mask=columns < D)
        out += D


@triton.jit(do_not_specialize=["total", "n_patches", "run"])
def stlm_byte_pool_bwd(
    ids_ptr, cu_ptr, grad_ptr, partial_ptr,
    total, n_patches, vocab, run,
    D: tl.constexpr, MEAN: tl.constexpr, DOT: tl.constexpr, TERMS: tl.constexpr,
    COUNT_CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    v_tiles = tl.cdiv(vocab, BLOCK_V)
    d_tiles = tl.cdiv(D, BLOCK_D)
    # Neighbouring programs read the same upstream tile for other table rows.
    first_row = (program % v_tiles).to(tl.int32) * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_V)
    columns = (program // v_tiles % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = program // (v_tiles * d_tiles)
    last_patch = tl.minimum((split + 1) * run, n_patches)
    acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for first in range(split * run, last_patch, BLOCK_P):
        patches = first + tl.arange(0, BLOCK_P)
        start, length, scale = _patch_tile(cu_ptr, patches, last_patch, total, MEAN)
        longest = tl.max(length)
        hits = tl.zeros((BLOCK_P,), tl.int32)
        for slot in range(0, longest):
            offset = _ids_at(ids_ptr + start, length, slot, vocab) - first_row
            hits |= ((offset >= 0) & (offset < BLOCK_V)).to(tl.int32)
        if tl.max(hits) > 0:
            x = _upstream_tile(grad_ptr, patches, columns, length > 0, scale, D)
            for chunk in range(0, longest, COUNT_CHUNK):
                counts = tl.zeros((BLOCK_V, BLOCK_P), tl.int32)
                for slot in range(chunk, tl.minimum(chunk + COUNT_CHUNK, longest)):
                    ids = _ids_at(ids_ptr + start, length, slot, vocab)
                    counts += (rows[:, None] == ids[None, :]).to(tl.int32)
                acc = _add_product(acc, counts, x, DOT, TERMS)
    mask = (rows < vocab)[:, None] & (columns < D)[None, :]
    out = (split * vocab + rows)[:, None] * D + columns[None, :]
    tl.store(partial_ptr + out, acc, mask=mask)


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
        x = _upstream_tile(grad_ptr, patches, columns, length > 0, scale, D)
        for slot in range(0, tl.max(length)):
            ids = _ids_at(ids_ptr + start, length, slot, vocab)
            gains = gain_ptr + tl.minimum(slot, gain_slots - 1).to(tl.int64) * D + columns
            gain = tl.load(gains, mask=columns < D, other=0.0).to(stored).to(tl.float32)
            acc = _add_product(acc, rows[:, None] == ids[None, :], x * gain[None, :], DOT, TERMS)
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
        x = _upstream_tile(grad_ptr, patches, columns, length > 0, scale, D)
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


def launch_fwd(
    byte_ids: Tensor,  # (T,)
    weight: Tensor,  # (V, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    position_weight: Tensor | None,  # (L, D)
    mean: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """(P, D) in `out_dtype`."""
    (vocab, width), patches = weight.shape, cu_patchlens.shape[0] - 1
    out = torch.empty((patches, width), dtype=out_dtype, device=weight.device)
    config = configs.fwd_config(width, out_dtype, weight.device)
    chunks = _launch.ceil_div(patches, config["PATCHES"])
    gain, table = weight, weight.contiguous()
    if position_weight is not None:
        gain = position_weight
    elif weight.dtype == out_dtype == torch.bfloat16 and _holds_pairs(table):
        table = table.view(torch.int32)
    # A byte is in the vocabulary of any table that has all 256 rows.
    checked = byte_ids.dtype != torch.uint8 or vocab < 256
    _launch.launch(
        stlm_byte_pool_fwd, chunks * _launch.ceil_div(width, config["BLOCK_D"]),
        byte_ids.contiguous(), table, cu_patchlens.contiguous(), gain.contiguous(),
        out, min(byte_ids.shape[0], 2**31 - 1), patches, vocab, gain.shape[0], chunks,
        D=width, MEAN=mean, HAS_GAIN=position_weight is not None, CHECKED=checked,
        device=weight.device, **config,
    )  # fmt: skip
    return out


def _holds_pairs(table: Tensor) -> bool:
    """Return True where each row is a whole number of aligned pairs of 16-bit numbers."""
    return table.shape[1] % 2 == 0 and table.storage_offset() % 2 == 0


def launch_bwd(
    grad: Tensor,  # (P, D)
    byte_ids: Tensor,  # (T,)
    cu_patchlens: Tensor,  # (P+1,)
    mean: bool,
    vocab: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    """(V, D) gradient of the table."""
    patches, width = grad.shape
    config = configs.bwd_config(width, grad.dtype, grad.device)
    programs = config.pop("PROGRAMS")
    tiles = _launch.ceil_div(vocab, config["BLOCK_V"]) * _launch.ceil_div(width, config["BLOCK_D"])
    splits, run = _launch.splits(patches, tiles, programs, config["BLOCK_P"])
    partial = torch.empty((splits, vocab, width), dtype=torch.float32, device=grad.device)
    dot, terms = _dot_plan(grad.dtype, weight_dtype, width, exact=not mean)
    _launch.launch(
        stlm_byte_pool_bwd, splits * tiles,
        byte_ids.contiguous(), cu_patchlens.contiguous(), grad.contiguous(), partial,
        byte_ids.shape[0], patches, vocab, run,
        D=width, MEAN=mean, DOT=dot, TERMS=terms, COUNT_CHUNK=configs.COUNT_CHUNK,
        device=grad.device, **config,
    )  # fmt: skip
    return sum_splits(partial, weight_dtype)


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
    dot, terms = _dot_plan(grad.dtype, weight.dtype, width, exact=False)
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
    return sum_splits(table, weight.dtype), sum_splits(by_slot, position_weight.dtype)


def _dot_plan(
    grad: torch.dtype, result: torch.dtype, width: int, exact: bool
) -> tuple[tl.dtype, int]:
    """Operand type of the product, and how many terms keep enough digits of scale * G.

    Unscaled 16-bit gradients are exact operands. Scaled ones take one bf16 term for a bf16 result
    (two for rows so narrow that their terms may cancel), two for fp16, three for fp32: a third
    in two is wrong by 4e-6, beyond fp32's tolerance.
    """
    if grad == torch.float32:
        return tl.float32, 1
    if exact:
        return (tl.float16 if grad == torch.float16 else tl.bfloat16), 1
    terms = {torch.bfloat16: 1 if width >= 16 else 2, torch.float16: 2, torch.float32: 3}[result]
    # The interpreter computes bf16 wrongly; fp16 stands in, so that terms are tested there.
    return (tl.float16 if INTERPRETED else tl.bfloat16), terms
