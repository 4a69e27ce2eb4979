"""`@triton.jit` helpers that count the bytes of patches: how often a patch holds each id.

32 slots of a patch are bit planes: bit s of plane k is bit k of the id in slot s. The slots that
hold an id are the AND of its planes or their complements, and their number is the count, whatever
the lengths of the patches. Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import segment_at

SLOTS = tl.constexpr(32)
"""Slots counted at a time."""
PATCH_WORK = tl.constexpr(32)
"""Bytes that a patch of its own is worth where work is shared out."""


@triton.jit
def share_start(cu_ptr, work, n_patches, total):
    """Return the patch in which a share of the work begins, and its first byte that is in it.

    Each patch is PATCH_WORK units of work, followed by one for each of its bytes.
    """
    patch = tl.maximum(segment_at(cu_ptr, work, n_patches, 128, PATCH_WORK), 0)
    start = tl.maximum(tl.load(cu_ptr + patch), 0)
    byte = tl.maximum(start, work - PATCH_WORK * (patch.to(tl.int64) + 1))
    return patch, tl.minimum(byte, total).to(tl.int32)


@triton.jit
def _slot_words(ids_ptr, start, length, first_row, rows, CHECKED: tl.constexpr):
    """(patches, 4) words of rows, and of 1 where there is one: byte i of word j is slot 8 i + j.

    A row is an id less first_row, in [0, rows).
    """
    words = tl.zeros((length.shape[0], 4), tl.int32)
    live = tl.zeros((length.shape[0], 4), tl.int32)
    slot = tl.arange(0, 4)
    here = ids_ptr + (start[:, None] + slot[None, :])
    for i in tl.static_range(4):
        inside = slot[None, :] + 8 * i < length[:, None]
        row = tl.load(here + 8 * i, mask=inside, other=0)
        if CHECKED:
            row -= first_row
            good = inside & (row >= 0) & (row < rows)
            row = tl.where(good, row, 0)
            live |= good.to(tl.int32) << (8 * i)
        words |= row.to(tl.int32) << (8 * i)
    return words, live


@triton.jit
def _plane(words, more, bit):
    """(patches,) int32: bit `bit` of the row in each of 32 slots, four and four from two words."""
    bits = ((words >> bit) & 0x01010101) | (((more >> bit) & 0x01010101) << 4)
    return tl.sum(bits << tl.arange(0, 4)[None, :], 1)


@triton.jit
def slots_inside(length):
    """(patches,) int32: a bit for each of the 32 slots that is one of the patch's."""
    inside = (1 << tl.minimum(tl.maximum(length, 0), 31)) - 1
    return tl.where(length < SLOTS, inside, -1)


@triton.jit
def planes_of(ids_ptr, start, length, first_row, rows, CHECKED: tl.constexpr):
    """(patches,) int32 each: live slots, and 8 planes of their rows.

    A row is an id less first_row; a slot is live where it is inside its patch and its row in
    [0, rows). Where CHECKED is off all rows inside are taken to be that.
    """
    words, good = _slot_words(ids_ptr, start, length, first_row, rows, CHECKED)
    more, more_good = _slot_words(ids_ptr, start + 4, length - 4, first_row, rows, CHECKED)
    return (
        _plane(good, more_good, 0) if CHECKED else slots_inside(length),
        _plane(words, more, 0),
        _plane(words, more, 1),
        _plane(words, more, 2),
        _plane(words, more, 3),
        _plane(words, more, 4),
        _plane(words, more, 5),
        _plane(words, more, 6),
        _plane(words, more, 7),
    )


@triton.jit
def slots_with(planes, FIRST: tl.constexpr, BITS: tl.constexpr, PATCHES: tl.constexpr):
    """Slots whose BITS bits from FIRST on are each number; int32.

    (2^BITS, patches), or (patches, 2^BITS) where PATCHES, the dimension of the patches, is 0.
    """
    number = tl.arange(0, 2**BITS)
    slots = tl.expand_dims(number * 0 - 1, PATCHES) | tl.expand_dims(planes[0] * 0, 1 - PATCHES)
    for bit in tl.static_range(BITS):
        unlike = tl.expand_dims(((number >> bit) & 1) - 1, PATCHES)
        slots &= tl.expand_dims(planes[1 + FIRST + bit], 1 - PATCHES) ^ unlike
    return slots


@triton.jit
def _ones_of(x):
    """Count the ones of each int32, in the form that the compiler takes for one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _exactly(count, DOT: tl.constexpr):
    """Counts in DOT. The mantissa of 2^k + n ends in n: a conversion is as slow as the count."""
    if DOT.is_bf16():
        return (count | 0x4300).to(tl.uint16).to(DOT, bitcast=True) - tl.full((), 128, DOT)
    elif DOT.is_fp16():
        return (count | 0x6400).to(tl.uint16).to(DOT, bitcast=True) - tl.full((), 1024, DOT)
    else:
        return (count | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def counts_of(high, low, live, DOT: tl.constexpr):
    """(high x low, patches) in DOT: the number of live slots that match both; at most 32."""
    slots = high[:, None, :] & (low & live[None, :])[None, :, :]
    slots = tl.reshape(slots, (high.shape[0] * low.shape[0], live.shape[0]))
    return _exactly(_ones_of(slots), DOT)


@triton.jit
def counts_by_patch(high, low, live, DOT: tl.constexpr):
    """(patches, high x low) in DOT: the same of slots whose first dimension are the patches."""
    slots = high[:, :, None] & (low & live[:, None])[:, None, :]
    slots = tl.reshape(slots, (live.shape[0], high.shape[1] * low.shape[1]))
    return _exactly(_ones_of(slots), DOT)
