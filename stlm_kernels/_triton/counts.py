"""`@triton.jit` helpers that count the bytes of patches: how often a patch holds each id.

32 slots of a patch are bit planes: each bit of plane k is bit k of the id in one slot. The slots
that hold an id are the AND of its planes or their complements, and their number is the count,
whatever the lengths of the patches. Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from .tiles import segment_at

SLOTS = tl.constexpr(32)
"""Slots counted at a time."""
IDS = tl.constexpr(2048)
"""Ids looked at together to find the largest."""
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


def whole_words(ids: Tensor) -> Tensor:
    """Ids in memory that begins and ends with words of 4 bytes: a copy where it does not."""
    ids = ids.contiguous()
    size, each = ids.element_size(), max(1, 4 // ids.element_size())
    # Memory of others, by DLPack, may begin anywhere; that of shapes alone begins nowhere.
    begin = size * ids.storage_offset() if isinstance(ids, FakeTensor) else ids.data_ptr()
    if begin % 4 or ids.shape[0] % each:
        return pad(ids, (0, -ids.shape[0] % each)) if ids.shape[0] % each else ids.clone()
    return ids


@triton.jit
def largest_id(ids_ptr, first, last):
    """Return the largest id of the bytes from `first` to `last`, or 0."""
    largest = tl.zeros((IDS,), ids_ptr.dtype.element_ty)
    for at in range(first, last, IDS):
        here = at + tl.arange(0, IDS)
        largest = tl.maximum(largest, tl.load(ids_ptr + here, mask=here < last, other=0))
    return tl.max(largest)


@triton.jit
def window_of(start):
    """First slot of a patch that begins at `start`: slots begin at whole words."""
    return start & -4


@triton.jit
def reach_of(start, end):
    """Slots from the first to the last byte of each patch; 0 of an empty one."""
    return tl.where(end > start, end - window_of(start), 0)


@triton.jit
def _word(ids_ptr, window, end, WORD: tl.constexpr, EACH: tl.constexpr):
    """(patches, 4) words of EACH ids, those from WORD on, zeros where they begin behind `end`."""
    # Neighbours would be one thread's, which leaves others the same patches again.
    word = tl.max_contiguous(WORD + tl.arange(0, 4), 1)
    inside = EACH * word[None, :] < (end - window)[:, None]
    if EACH == 1:
        first = ids_ptr + window
    else:
        first = ids_ptr.to(tl.pointer_type(tl.int32)) + (window >> (EACH // 2))
    return tl.load(first[:, None] + word[None, :], mask=inside, other=0)


@triton.jit
def _low_bytes(ids_ptr, window, end, above, FIRST: tl.constexpr, EACH: tl.constexpr):
    """(patches, 4) words of the low bytes of four ids, and of bytes with bit 7 where the rest of an
    id is not `above`; slots are in the order of `_first_slots`."""
    if EACH == 4:
        words = _word(ids_ptr, window, end, FIRST, EACH)
        return words, words * 0 + tl.where(above > 0, -1, 0)
    elif EACH == 2:
        words = _word(ids_ptr, window, end, FIRST, EACH)
        more = _word(ids_ptr, window, end, FIRST + 8, EACH)
        low = (words & 0x00FF00FF) | ((more & 0x00FF00FF) << 8)
        high = ((words >> 8) & 0x00FF00FF) | (more & -0x00FF0100)
        high ^= (above & 127) * 0x01010101
        # Negative ids have 128 or more there, as no row has.
        return low, ((high & 0x7F7F7F7F) + 0x7F7F7F7F) | high | tl.where(above > 127, -1, 0)
    else:
        low = tl.zeros((window.shape[0], 4), tl.int32)
        unlike = tl.zeros((window.shape[0], 4), tl.int32)
        for i in tl.static_range(4):
            ids = _word(ids_ptr, window, end, FIRST + 8 * i, EACH)
            low |= (ids & 0xFF).to(tl.int32) << (8 * i)
            unlike |= ((ids >> 8) != above).to(tl.int32) << (8 * i + 7)
        return low, unlike


@triton.jit
def _plane(words, more, bit):
    """(patches,) int32: bit `bit` of the byte in each of 32 slots, four and four from two words."""
    bits = ((words >> bit) & 0x01010101) | (((more >> bit) & 0x01010101) << 4)
    return tl.sum(bits << tl.arange(0, 4)[None, :], 1)


@triton.jit
def _first_slots(count, EACH: tl.constexpr):
    """(patches,) int32: a bit for each of the first `count` of 32 slots.

    The bits of planes are in an order that memory has at hand: id i of word w is bit 32 / EACH x
    i + w, which is bit w % 8 % 4 + 4 (w // 4 % 2) of a byte.
    """
    count = tl.minimum(tl.maximum(count, 0), SLOTS)
    if EACH == 1:
        return tl.where(count < SLOTS, (1 << tl.minimum(count, 31)) - 1, -1)
    else:
        ONES: tl.constexpr = 0x01010101 if EACH == 4 else 0x00010001
        words = 1 << (count >> (EACH // 2))
        rest = (1 << (count & (EACH - 1)) * (SLOTS // EACH)) - 1
        return (words - 1) * ONES + words * (rest & ONES)


@triton.jit
def slots_inside(ids_ptr, window, start, end):
    """(patches,) int32: a bit for each of 32 slots from `window` on that is inside its patch."""
    BITS: tl.constexpr = ids_ptr.dtype.element_ty.primitive_bitwidth
    EACH: tl.constexpr = 32 // BITS if BITS < 32 else 1
    return _first_slots(end - window, EACH) & ~_first_slots(start - window, EACH)


@triton.jit
def _below(planes, bound):
    """(patches,) int32: slots whose byte is less than `bound`, which is at most 255."""
    less, same = planes[0] * 0, planes[0] * 0 - 1
    for i in tl.static_range(8):
        digit = -((bound >> (7 - i)) & 1)
        less |= same & digit & ~planes[7 - i]
        same &= ~(planes[7 - i] ^ digit)
    return less


@triton.jit
def planes_of(ids_ptr, window, start, end, first_row, rows, CHECKED: tl.constexpr):
    """(patches,) int32 each: live slots of the 32 from `window` on, and 8 planes of their ids.

    A slot is live where it is inside its patch, from `start` to `end`, and its id is one of `rows`
    rows from first_row on: at most as many as divide first_row, which ids then have in higher bits,
    and at most 256. Where CHECKED is off all ids inside are taken to be that.
    """
    BITS: tl.constexpr = ids_ptr.dtype.element_ty.primitive_bitwidth
    EACH: tl.constexpr = 32 // BITS if BITS < 32 else 1
    words, unlike = _low_bytes(ids_ptr, window, end, first_row >> 8, 0, EACH)
    more, more_unlike = _low_bytes(ids_ptr, window, end, first_row >> 8, 4, EACH)
    planes = (
        _plane(words, more, 0),
        _plane(words, more, 1),
        _plane(words, more, 2),
        _plane(words, more, 3),
        _plane(words, more, 4),
        _plane(words, more, 5),
        _plane(words, more, 6),
        _plane(words, more, 7),
    )
    live = slots_inside(ids_ptr, window, start, end)
    if CHECKED:
        live &= ~_plane(unlike, more_unlike, 7)
        least = first_row & 255
        if least + rows < 256:
            live &= _below(planes, least + rows)
        if least > 0:
            live &= ~_below(planes, least)
    return (live,) + planes  # noqa: RUF005 (no unpacking in kernels)


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
