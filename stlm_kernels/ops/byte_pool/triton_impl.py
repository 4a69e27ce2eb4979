"""byte_pool in Triton. out[p] = s_p sum_k a_k E[b_pk]; dE = C^T diag(s) G, C[p, v] the counts.

Forward in fp32, with a position weight, on other GPUs than sm_90 and sm_100 and for tables of more
than 512 rows; `product_impl` has the rest. A warp owns BLOCK_D columns of PATCHES patches, one
patch at a time: it adds one gathered row for each byte, so the table's slice is read from L1,
device memory sees each id and each output once, and no patch waits for a longer one. Four rows are
under way together. Pairs of bfloat16 are read as one int32, whose halves are fp32 after a shift or
a mask. Floor: T + 4P bytes and P x D numbers. Adds: T x D. Patches of more than 512 bytes are cut
into parts, see `_triton/long_segments.py`: two launches that return at once where there is none.

Backward. A program owns BLOCK_V rows x BLOCK_D columns of dE for a share of the work, which is cut
by bytes and patches alike and may begin and end inside a patch. It counts the bytes of BLOCK_P
patches, 32 slots of each at a time, into a tile of C^T (`_triton/counts.py`: from bit planes, at a
cost that depends neither on lengths nor on which bytes are frequent) and multiplies that with the
upstream tile; a half of the rows that no byte hits is skipped, so ASCII takes half of it. Programs
of rows from 256 on skip tiles that have none of their ids. A patch of more than LONG bytes is alone
in its tiles, 2 KB each. The shares' partial sums are added in a fixed order. Floor: T + 4P + 2PD +
4VD bytes, 56 us at D = 768, against 2 P V D = 69 GFLOP = 69 us of products, half that in ASCII. As
bench.bounds counts it, the sums of shares included: 14 us for English words (16 with 257 rows and
checks of ids) and 17 to 21 for patches of 6 bytes at D = 128, 60 and 79 to 104 at D = 768.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.config import part_rows_for
from ..._triton.counts import (
    SLOTS,
    counts_of,
    largest_id,
    planes_of,
    reach_of,
    share_start,
    slots_with,
    whole_words,
    window_of,
)
from ..._triton.long_segments import add_long_segments, long_rows, note_long, notes_for
from ..._triton.tiles import INTERPRETED, dot_type, sum_splits
from . import config as configs


@triton.jit
def upstream_tile(grad_ptr, patches, columns, live, scale, D: tl.constexpr):
    """scale * G in fp32; rows of empty patches are not read, so that NaN there reaches nothing."""
    mask = live[:, None] & (columns < D)[None, :]
    grad = tl.load(grad_ptr + patches[:, None] * D + columns[None, :], mask=mask, other=0.0)
    return grad.to(tl.float32) * scale[:, None]


@triton.jit
def add_product(acc, left, x, DOT: tl.constexpr, TERMS: tl.constexpr):
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
    ids_ptr, weight_ptr, gain_ptr, patch, start, end, columns, vocab, gain_slots,
    D: tl.constexpr, HAS_GAIN: tl.constexpr, CHECKED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Add the rows of bytes of the patch that begins at `patch`; are all its ids good?"""
    acc = tl.zeros(columns.shape, tl.float32)
    all_good = tl.full((), 1, tl.int1)
    for position in tl.range(start, end, loop_unroll_factor=4):
        byte, good = _id_at(ids_ptr, position, vocab, CHECKED)
        all_good &= good
        row = tl.load(weight_ptr + byte * D + columns, mask=columns < D, other=0.0)
        # Cast to the stored dtype first: under autocast the table is fp32.
        row = row.to(STORED).to(tl.float32)
        if HAS_GAIN:
            slot = tl.minimum(position - patch, gain_slots - 1).to(tl.int64)
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


@triton.jit
def sum_of_bytes(
    ids_ptr, weight_ptr, gain_ptr, patch, start, end, block, vocab, gain_slots,
    D: tl.constexpr, HAS_GAIN: tl.constexpr, CHECKED: tl.constexpr, STORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D,) sum of the rows of bytes of the patch that begins at `patch`; NaN of a bad id."""
    if weight_ptr.dtype.element_ty == tl.int32:
        pairs = block * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
        acc, all_good = _sum_of_pairs(
            ids_ptr, weight_ptr, start, end, pairs, vocab, D // 2, CHECKED
        )  # fmt: skip
    else:
        columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
        acc, all_good = _sum_of_rows(
            ids_ptr, weight_ptr, gain_ptr, patch, start, end, columns, vocab, gain_slots,
            D, HAS_GAIN, CHECKED, STORED,
        )  # fmt: skip
    if CHECKED:
        acc = tl.where(all_good, acc, float("nan"))
    return acc


@triton.jit
def pool_patches(
    ids_ptr, weight_ptr, cu_ptr, gain_ptr, at_ptr, out_ptr, first, last, block,
    total, vocab, gain_slots, part_rows,
    D: tl.constexpr, MEAN: tl.constexpr, HAS_GAIN: tl.constexpr, CHECKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pool patches `first` to `last`, one after the other, and note the long ones."""
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    stored = out_ptr.dtype.element_ty
    out = out_ptr + first.to(tl.int64) * D + columns
    for patch in range(first, last):
        # Safe for any offsets: no byte outside [0, total) is read, a negative length is empty.
        start = tl.maximum(tl.load(cu_ptr + patch), 0)
        end = tl.maximum(tl.minimum(tl.load(cu_ptr + patch + 1), total), 0)
        if end - start > part_rows:
            one = tl.arange(0, 1)
            note_long(at_ptr, patch + one, start + one, end + one, part_rows)
            end = start
        acc = sum_of_bytes(
            ids_ptr, weight_ptr, gain_ptr, start, start, end, block, vocab, gain_slots,
            D, HAS_GAIN, CHECKED, stored, BLOCK_D,
        )  # fmt: skip
        if MEAN:
            acc *= 1.0 / tl.maximum(end - start, 1).to(tl.float32)
        tl.store(out, acc.to(stored), mask=columns < D)
        out += D


@triton.jit(do_not_specialize=["total", "n_patches", "gain_slots", "chunks", "part_rows"])
def stlm_byte_pool_fwd(
    ids_ptr, weight_ptr, cu_ptr, gain_ptr, at_ptr, out_ptr,
    total, n_patches, vocab, gain_slots, chunks, part_rows,
    D: tl.constexpr, MEAN: tl.constexpr, HAS_GAIN: tl.constexpr, CHECKED: tl.constexpr,
    BLOCK_D: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = (program % chunks) * PATCHES
    pool_patches(
        ids_ptr, weight_ptr, cu_ptr, gain_ptr, at_ptr, out_ptr,
        first, tl.minimum(first + PATCHES, n_patches), program // chunks,
        total, vocab, gain_slots, part_rows, D, MEAN, HAS_GAIN, CHECKED, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total", "n_patches", "gain_slots", "parts", "part_rows"])
def stlm_byte_pool_fwd_long(
    ids_ptr, weight_ptr, cu_ptr, gain_ptr, at_ptr, partial_ptr,
    total, n_patches, vocab, gain_slots, parts, part_rows,
    D: tl.constexpr, HAS_GAIN: tl.constexpr, CHECKED: tl.constexpr, STORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the bytes of long patches in each part, see `_triton/long_segments.py`."""
    block = tl.program_id(0) // parts
    part = (tl.program_id(0) % parts).to(tl.int64)
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    for side in tl.static_range(2):
        start, end, patch = long_rows(
            at_ptr, cu_ptr, cu_ptr + 1, part, n_patches, total, part_rows, side
        )
        if end > start:
            acc = sum_of_bytes(
                ids_ptr, weight_ptr, gain_ptr, patch.to(tl.int32), start.to(tl.int32),
                end.to(tl.int32), block, vocab, gain_slots,
                D, HAS_GAIN, CHECKED, STORED, BLOCK_D,
            )  # fmt: skip
            tl.store(partial_ptr + (2 * part + side) * D + columns, acc, mask=columns < D)


@triton.jit
def patch_ends(cu_ptr, patches, mask, total, MEAN: tl.constexpr):
    """Start, end and scale of patches, int32; those masked out are empty, ends may lie before."""
    # A load of a number per thread or more is made once, and not anew for each layout in use.
    side = tl.arange(0, 4) // 2
    place = cu_ptr + tl.max_contiguous(patches[:, None] + side[None, :], [1, 1])
    ends = tl.load(place, mask=mask[:, None], other=0)
    # Both are 0 or more: the length of a patch that ends before it begins must not overflow.
    start = tl.max(tl.where(side == 0, ends, 0), 1)
    end = tl.max(tl.where(side == 1, tl.minimum(ends, total), 0), 1)
    scale = tl.full(patches.shape, 1.0, tl.float32)
    if MEAN:
        scale = 1.0 / tl.maximum(end - start, 1).to(tl.float32)
    return start, end, scale


@triton.jit(do_not_specialize=["total", "n_patches", "n_splits", "run"])
def stlm_byte_pool_bwd(
    ids_ptr, cu_ptr, grad_ptr, partial_ptr,
    total, n_patches, vocab, n_splits, run,
    D: tl.constexpr, MEAN: tl.constexpr, DOT: tl.constexpr, TERMS: tl.constexpr,
    CHECKED: tl.constexpr, LONG: tl.constexpr, ROW_BITS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = 2 ** (ROW_BITS - 1)
    program = tl.program_id(0).to(tl.int64)
    d_tiles = tl.cdiv(D, BLOCK_D)
    columns = (program % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = program // d_tiles % n_splits
    # Rows that few bytes hit come last, when others make room for programs with little to do.
    first_row = (program // (d_tiles * n_splits)).to(tl.int32) * (2 * HALF)
    patch, at = share_start(cu_ptr, split * run, n_patches, total)
    last_patch, stop = share_start(cu_ptr, (split + 1) * run, n_patches, total)
    last_patch = tl.minimum(last_patch + 1, n_patches)
    # Few shares have ids from 256 on, which are seldom.
    scanned = tl.where(first_row > 0, stop, at)
    if largest_id(ids_ptr, at, scanned) < first_row:
        last_patch = patch
    column = tl.arange(0, BLOCK_P)
    low = tl.zeros((HALF, BLOCK_D), tl.float32)
    high = tl.zeros((HALF, BLOCK_D), tl.float32)
    while patch < last_patch:
        patches = patch + column
        start, end, scale = patch_ends(cu_ptr, patches, patches < last_patch, total, MEAN)
        start, end = tl.maximum(start, at), tl.minimum(end, stop)
        longest = tl.max(reach_of(start, end))
        if longest > LONG:
            taken = tl.min(tl.where(reach_of(start, end) > LONG, column, BLOCK_P))
            if taken == 0:
                # A long patch is alone, in columns of SLOTS bytes.
                at = tl.maximum(tl.load(cu_ptr + patch), at)
                last, window = tl.max(tl.where(column == 0, end, 0)), window_of(at)
                start = tl.maximum(window + SLOTS * column, at)
                end = tl.minimum(window + SLOTS * (column + 1), last)
                longest = SLOTS
                patches -= column
                scale = tl.zeros(scale.shape, tl.float32) + tl.sum(tl.where(column == 0, scale, 0))
                at = tl.minimum(window + SLOTS * BLOCK_P, last)
                patch += (at == last).to(tl.int32)
            else:
                end = tl.where(column < taken, end, start)
                longest = tl.max(reach_of(start, end))
                patch += taken
        else:
            patch += BLOCK_P
        scale = tl.where(end > start, scale, 0.0)
        x = upstream_tile(grad_ptr, patches.to(tl.int64), columns, scale > 0, scale, D)
        for slot in tl.range(0, longest, SLOTS, num_stages=1):
            rows = tl.minimum(vocab - first_row, 2 * HALF)
            window = window_of(start) + slot
            planes = planes_of(ids_ptr, window, start, end, first_row, rows, CHECKED)
            last_bits = slots_with(planes, 0, 4, 1)
            first_bits = slots_with(planes, 4, ROW_BITS - 5, 1)
            live, upper = planes[0], planes[0] & planes[ROW_BITS]
            hits = tl.sum((upper != live).to(tl.int32) + (upper != 0).to(tl.int32) * 65536)
            if hits % 65536 > 0:
                counts = counts_of(first_bits, last_bits, live ^ upper, DOT)
                low = add_product(low, counts, x, DOT, TERMS)
            if hits >= 65536:
                counts = counts_of(first_bits, last_bits, upper, DOT)
                high = add_product(high, counts, x, DOT, TERMS)
    row = tl.arange(0, HALF)
    out = partial_ptr + ((split * vocab + first_row + row)[:, None] * D + columns[None, :])
    left = vocab - first_row
    tl.store(out, low, mask=(row < left)[:, None] & (columns < D)[None, :])
    tl.store(out + HALF * D, high, mask=(row < left - HALF)[:, None] & (columns < D)[None, :])


def launch_gather(
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
    total = min(byte_ids.shape[0], 2**31 - 1)
    part_rows = part_rows_for(total, config.pop("PART_ROWS"))
    chunks = _launch.ceil_div(patches, config["PATCHES"])
    blocks = _launch.ceil_div(width, config["BLOCK_D"])
    gain, table = weight, weight.contiguous()
    if position_weight is not None:
        gain = position_weight
    elif weight.dtype == out_dtype == torch.bfloat16 and _holds_pairs(table):
        table = table.view(torch.int32)
    cu = cu_patchlens.contiguous()
    # A byte is in the vocabulary of any table that has all 256 rows.
    constants = {
        "D": width, "HAS_GAIN": position_weight is not None,
        "CHECKED": byte_ids.dtype != torch.uint8 or vocab < 256, "BLOCK_D": config["BLOCK_D"],
    }  # fmt: skip
    may_be_long = total > part_rows and patches > 0
    at = notes_for(total, part_rows, weight.device) if may_be_long else cu
    arguments = (byte_ids.contiguous(), table, cu, gain.contiguous(), at)
    sizes = (total, patches, vocab, gain.shape[0])
    _launch.launch(
        stlm_byte_pool_fwd, chunks * blocks, *arguments, out, *sizes, chunks, part_rows,
        MEAN=mean, device=weight.device, **constants | config,
    )  # fmt: skip
    if may_be_long:
        parts = at.shape[0] - 1
        partial = torch.empty((parts, 2, width), dtype=torch.float32, device=weight.device)
        _launch.launch(
            stlm_byte_pool_fwd_long, parts * blocks, *arguments, partial, *sizes, parts, part_rows,
            STORED=dot_type(out_dtype), num_warps=config["num_warps"], device=weight.device,
            **constants,
        )  # fmt: skip
        add_long_segments(partial, out, at, cu[:-1], cu[1:], total, part_rows, mean)
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
    (patches, width), total = grad.shape, min(byte_ids.shape[0], 2**31 - 1)
    work = configs.work_of(total, patches)
    config = configs.bwd_config(width, work >= configs.MUCH_WORK, grad.dtype, grad.device)
    programs, rows = config.pop("PROGRAMS"), config.pop("BLOCK_V")
    d_tiles = _launch.ceil_div(width, config["BLOCK_D"])
    # A last tile of some of its rows is taken to have few bytes: it takes no other's place.
    splits, run = _launch.splits(
        work, max(1, vocab // rows) * d_tiles, programs, configs.WORK_BLOCK
    )
    partial = torch.empty((splits, vocab, width), dtype=torch.float32, device=grad.device)
    dot, terms = dot_plan(grad.dtype, weight_dtype, width, exact=not mean)
    checked = byte_ids.dtype != torch.uint8 or not rows == vocab == 256
    _launch.launch(
        stlm_byte_pool_bwd, splits * d_tiles * _launch.ceil_div(vocab, rows),
        whole_words(byte_ids), cu_patchlens.contiguous(), grad.contiguous(), partial,
        total, patches, vocab, splits, run,
        D=width, MEAN=mean, DOT=dot, TERMS=terms, CHECKED=checked, LONG=configs.LONG,
        ROW_BITS=rows.bit_length() - 1, device=grad.device, **config,
    )  # fmt: skip
    return sum_splits(partial, weight_dtype)


def dot_plan(
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
