"""find_patches in Triton: a scan over bytes in three launches.

A byte begins a natural patch if it is the first of its document, is a start, or follows a byte that
closes by the rule. With L(t) the last natural begin at or before t and r(t) = (t - L(t)) mod
max_patch_len, a byte begins a patch where r = 0 and closes one by length where r is the largest
(no limit: the largest int32). The number of a patch is the count of begins.

1. blocks: a program owns BLOCK bytes and sums them up: its last natural begin, the begins that
   follow its first natural one, how many bytes lie before that one, and the begins from the start
   of its last document on.
2. carry: one program scans the blocks: the last natural begin, the count and the first patch of the
   document before each. Between two natural begins the forced ones are evenly spaced, so their
   count is two divisions.
3. write: a program owns BLOCK bytes: patch_ids, read_ids, and cu_patchlens where a patch begins;
   the boundaries of documents that begin there; its share of unused slots and empty documents.

A program finds its document once, by bisection; only where another begins in its bytes does each
byte look for its own. Divisions by what a launch keeps constant are products with the reciprocal.
No atomics, no waiting of one program for another, no synchronisation with the host.
Floor: 9 T + 4 P bytes (an id or a mask read, two int32 written for each byte), 10 MB at 1M bytes;
passes 1 and 3 both read the ids.
Counted on sm_90 for English text: at least 4.3 + 0.02 + 6.3 us, by integer instructions, which have
half the rate of others (10 us in sum was aimed at); 8.0 by all instructions. Stores move 1.06 of
the fewest sectors, loads 2 to 3: the two bytes before each byte are read anew, off the alignment of
16, from lines that the first load has brought into L1; the notes of blocks are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._torch import segments
from ..._triton.tiles import segment_at, segments_from
from . import config as configs

SPACE, FIXED, STARTS, CLOSES = (tl.constexpr(i) for i in range(4))
MODE_CODES = {"space": 0, "fixed": 1, "patch_start_mask": 2, "patch_end_mask": 3}
NO_LIMIT = torch.iinfo(torch.int32).max
DOCUMENTS = tl.constexpr(32)
"""Documents whose boundaries a program writes at a time, and offsets that a bisection reads."""


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _remainder(x, divisor, magic, shift):
    """x modulo a divisor for x >= 0, by what `_reciprocal` made of the divisor."""
    magic = tl.zeros(x.shape, tl.int32) + magic
    quotient = tl.umulhi(x.to(tl.uint32), magic.to(tl.uint32)) >> shift
    return tl.minimum(x - quotient.to(tl.int32) * divisor, divisor - 1)


@triton.jit
def _spacelike(ids_ptr, positions, mask=None):
    """Neither ASCII alphanumeric nor a UTF-8 continuation byte; False where masked out."""
    ids = tl.load(ids_ptr + positions, mask=mask, other=None if mask is None else 97)
    if ids.dtype == tl.int64:
        ids = tl.minimum(ids, 256)  # before it is narrowed: 2^32 + 97 is no letter
    ids = ids.to(tl.int32)
    lowered = ids | 0x20
    letter = (lowered >= 97) & (lowered <= 122)
    digit = (ids >= 48) & (ids <= 57)
    continuation = (ids >= 0x80) & (ids <= 0xBF)
    return ~(letter | digit | continuation)


@triton.jit
def _document_at(offsets_ptr, first, n_documents, BLOCK: tl.constexpr):
    """Last document that begins two bytes before a block or earlier, its first byte, and whether it
    holds the whole block. Offsets must be clamped and sorted."""
    document = segment_at(offsets_ptr, first - 2, n_documents, DOCUMENTS)
    known = (document >= 0) & (document < n_documents)
    start = tl.load(offsets_ptr + document, mask=known, other=0)
    end = tl.load(offsets_ptr + document + 1, mask=known, other=-1)
    return document, start, end >= first + BLOCK


@triton.jit
def _by_rule(source_ptr, positions, inside, starts, size, magic, shift, MODE: tl.constexpr):
    """Masks of the bytes that begin a patch whatever its length may be, and of those that close."""
    follows = inside & (positions > starts)
    if MODE == SPACE:
        before = _spacelike(source_ptr, positions - 1, follows)
        begins = before & ~_spacelike(source_ptr, positions - 2, follows & (positions - 1 > starts))
        closes = _spacelike(source_ptr, positions, inside) & ~before
    elif MODE == FIXED:
        place = _remainder(tl.maximum(positions - starts, 0), size, magic, shift)
        begins, closes = inside & (place == 0), inside & (place == size - 1)
    elif MODE == CLOSES:
        begins = tl.load(source_ptr + positions - 1, mask=follows, other=0) != 0
        closes = tl.load(source_ptr + positions, mask=inside, other=0) != 0
    else:
        begins = tl.load(source_ptr + positions, mask=follows, other=0) != 0
        closes = inside & (positions < 0)
    return begins | (inside & (positions == starts)), closes


@triton.jit
def _in_one_document(source_ptr, positions, start, size, magic, shift, MODE: tl.constexpr):
    """Find boundaries as above where all bytes lie two bytes or more behind a document's start."""
    if MODE == SPACE:
        before = _spacelike(source_ptr, positions - 1)
        begins = before & ~_spacelike(source_ptr, positions - 2)
        closes = _spacelike(source_ptr, positions) & ~before
    elif MODE == FIXED:
        place = _remainder(positions - start, size, magic, shift)
        begins, closes = place == 0, place == size - 1
    elif MODE == CLOSES:
        begins = tl.load(source_ptr + positions - 1) != 0
        closes = tl.load(source_ptr + positions) != 0
    else:
        begins = tl.load(source_ptr + positions) != 0
        closes = positions < 0
    return begins, closes


@triton.jit
def _cut(source_ptr, offsets_ptr, first, document, start, n_documents, size, magic, shift,
         MODE: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """Masks of a block's bytes: those in a document, those that begin one, those that begin a
    patch by the rule, those that close one. ALONE: `document` holds the block."""
    positions = (first + tl.arange(0, BLOCK)).to(tl.int32)
    if ALONE:
        inside, heads = tl.full((BLOCK,), 1, tl.int1), tl.full((BLOCK,), 0, tl.int1)
        begins, closes = _in_one_document(source_ptr, positions, start, size, magic, shift, MODE)
    else:
        documents = segments_from(offsets_ptr, document, first, n_documents, BLOCK)
        inside = (documents >= 0) & (documents < n_documents)
        starts = tl.load(offsets_ptr + documents, mask=inside, other=0)
        heads = inside & (positions == starts)
        begins, closes = _by_rule(
            source_ptr, positions, inside, starts, size, magic, shift, MODE
        )  # fmt: skip
    return positions, inside, heads, begins, closes


@triton.jit
def _summarize(
    source_ptr, offsets_ptr, summary_ptr, block, document, start, n_documents,
    size, size_magic, size_shift, limit, limit_magic, limit_shift, pitch,
    MODE: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    positions, inside, heads, natural, _ = _cut(
        source_ptr, offsets_ptr, block * BLOCK, document, start, n_documents,
        size, size_magic, size_shift, MODE, BLOCK, ALONE,
    )  # fmt: skip
    latest = tl.associative_scan(tl.where(natural, positions, -1), 0, _maximum)
    since = _remainder(positions - latest, limit, limit_magic, limit_shift)
    begins = (inside & (latest >= 0) & (since == 0)).to(tl.int32)
    # Both counts fit a half of one number.
    counts = tl.sum(tl.where(inside & (latest < 0), 1 << 16, begins))
    tl.store(summary_ptr + block, counts >> 16)
    tl.store(summary_ptr + pitch + block + 1, tl.max(latest))
    tl.store(summary_ptr + 2 * pitch + block, counts & 0xFFFF)
    from_document = tl.full((), -1, tl.int32)
    if not ALONE:
        last = tl.max(tl.where(heads, positions, -1))
        counted = tl.sum(tl.where(positions >= last, begins, 0))
        from_document = tl.where(last >= 0, counted, -1)
    tl.store(summary_ptr + 3 * pitch + block, from_document)


@triton.jit(do_not_specialize=["n_documents", "size", "size_magic", "size_shift",
                               "limit", "limit_magic", "limit_shift"])  # fmt: skip
def stlm_find_patches_blocks(
    source_ptr, offsets_ptr, summary_ptr, n_documents,
    size, size_magic, size_shift, limit, limit_magic, limit_shift, pitch,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """summary[:, block]: bytes before the first natural begin; the last one, one place on; begins
    from the first one; begins from the last document's start, -1 where none starts here."""
    block = tl.program_id(0).to(tl.int64)
    if block == 0:
        tl.store(summary_ptr + pitch, -1)
    document, start, alone = _document_at(offsets_ptr, block * BLOCK, n_documents, BLOCK)
    if alone:
        _summarize(
            source_ptr, offsets_ptr, summary_ptr, block, document, start, n_documents,
            size, size_magic, size_shift, limit, limit_magic, limit_shift, pitch,
            MODE, BLOCK, True,
        )  # fmt: skip
    else:
        _summarize(
            source_ptr, offsets_ptr, summary_ptr, block, document, start, n_documents,
            size, size_magic, size_shift, limit, limit_magic, limit_shift, pitch,
            MODE, BLOCK, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["limit", "n_blocks"])
def stlm_find_patches_carry(
    summary_ptr, carry_ptr, n_patches_ptr, limit, n_blocks, pitch,
    BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """carry[:, block]: the last natural begin and the number of begins before the block; the first
    patch of the last document that begins before its end."""
    latest = tl.full((), -1, tl.int32)
    begun, of_document = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(0, n_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        own = blocks < n_blocks
        before = tl.load(summary_ptr + pitch + blocks, mask=own, other=-1)
        before = tl.maximum(tl.associative_scan(before, 0, _maximum), latest)
        latest = tl.max(before)
        leading = tl.load(summary_ptr + blocks, mask=own, other=0)
        counted = tl.load(summary_ptr + 2 * pitch + blocks, mask=own, other=0)
        from_document = tl.load(summary_ptr + 3 * pitch + blocks, mask=own, other=-1)
        since = tl.where(own, blocks * BYTES - 1 - before, 0)
        counted += (since + leading) // limit - since // limit
        ends = begun + tl.cumsum(counted)
        documents = tl.where(from_document >= 0, ends - from_document, 0)
        documents = tl.maximum(tl.associative_scan(documents, 0, _maximum), of_document)
        of_document = tl.max(documents)
        tl.store(carry_ptr + blocks, before, mask=own)
        tl.store(carry_ptr + pitch + blocks, ends - counted, mask=own)
        tl.store(carry_ptr + 2 * pitch + blocks, documents, mask=own)
        begun += tl.sum(counted)
    tl.store(n_patches_ptr, begun)


@triton.jit
def _put(x_ptr, x, first, total, BLOCK: tl.constexpr):
    """Store a block; where it is whole without a mask, which would keep words apart."""
    rows = first + tl.arange(0, BLOCK)
    if first + BLOCK <= total:
        tl.store(x_ptr + rows, x)
    else:
        tl.store(x_ptr + rows, x, mask=rows < total)


@triton.jit
def _write(
    source_ptr, offsets_ptr, carry_ptr, cu_ptr, patch_ids_ptr, read_ids_ptr, block,
    document, start, n_documents, size, size_magic, size_shift, limit, limit_magic, limit_shift,
    pitch, total, slots,
    MODE: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    first = block * BLOCK
    positions, inside, heads, natural, closes = _cut(
        source_ptr, offsets_ptr, first, document, start, n_documents,
        size, size_magic, size_shift, MODE, BLOCK, ALONE,
    )  # fmt: skip
    latest = tl.associative_scan(tl.where(natural, positions, -1), 0, _maximum)
    latest = tl.maximum(latest, tl.load(carry_ptr + block))
    since = _remainder(positions - latest, limit, limit_magic, limit_shift)
    begins = inside & (since == 0)
    patches = tl.load(carry_ptr + pitch + block) - 1 + tl.cumsum(begins.to(tl.int32))
    tl.store(cu_ptr + patches, positions, mask=begins & (patches <= slots))
    patch_ids = tl.where(inside & (patches < slots), patches, -1)
    _put(patch_ids_ptr, patch_ids, first, total, BLOCK)

    closes |= since == limit - 1
    of_document = tl.load(carry_ptr + 2 * pitch + block - 1, mask=block > 0, other=0)
    if not ALONE:
        here = tl.associative_scan(tl.where(heads, patches, -1), 0, _maximum)
        of_document = tl.where(here >= 0, here, of_document)
    # Where documents begin behind the last slot, their bytes read nothing.
    readable = inside & (closes | (patches > of_document)) & (of_document < slots)
    complete = tl.minimum(patches - 1 + closes.to(tl.int32), slots - 1)
    _put(read_ids_ptr, tl.where(readable, complete, -1), first, total, BLOCK)


@triton.jit
def _unused(offsets_ptr, cu_ptr, boundaries_ptr, block, blocks, n_patches, slots, n_documents,
            BLOCK: tl.constexpr):  # fmt: skip
    """A program's share of the slots that no patch took, and of the documents without bytes at the
    end."""
    end = tl.load(offsets_ptr + n_documents)
    share = tl.cdiv(slots + 1, blocks)
    limit = tl.minimum((block + 1) * share, slots + 1)
    for slot in range(tl.maximum(block * share, n_patches), limit, BLOCK):
        rows = slot + tl.arange(0, BLOCK)
        tl.store(cu_ptr + rows, tl.zeros((BLOCK,), tl.int32) + end, mask=rows < limit)
    share = tl.cdiv(n_documents + 1, blocks)
    limit = tl.minimum((block + 1) * share, n_documents + 1)
    for document in range(block * share, limit, DOCUMENTS):
        rows = document + tl.arange(0, DOCUMENTS)
        empty = (rows < limit) & (tl.load(offsets_ptr + rows, mask=rows < limit, other=0) >= end)
        counts = tl.zeros((DOCUMENTS,), tl.int32) + tl.minimum(n_patches, slots)
        tl.store(boundaries_ptr + rows, counts, mask=empty)


@triton.jit
def _boundaries(offsets_ptr, patch_ids_ptr, boundaries_ptr, document, first, limit, n_patches,
                slots, n_documents):  # fmt: skip
    """Boundaries of the documents from `document` on whose first byte this program has written."""
    limit = tl.minimum(limit, tl.load(offsets_ptr + n_documents))
    written = tl.full((), 1, tl.int32)
    while written > 0:
        rows = document + tl.arange(0, DOCUMENTS)
        place = tl.load(offsets_ptr + rows, mask=rows <= n_documents, other=2**31 - 1)
        owned = (place >= first) & (place < limit)
        patches = tl.load(patch_ids_ptr + place, mask=owned, other=-1)
        patches = tl.where(patches >= 0, patches, tl.minimum(n_patches, slots))
        tl.store(boundaries_ptr + rows, patches, mask=owned)
        written = tl.sum((place < limit).to(tl.int32))
        document += DOCUMENTS


@triton.jit(do_not_specialize=["n_documents", "size", "size_magic", "size_shift", "limit",
                               "limit_magic", "limit_shift", "n_blocks", "total",
                               "slots"])  # fmt: skip
def stlm_find_patches_write(
    source_ptr, offsets_ptr, carry_ptr, n_patches_ptr, cu_ptr, patch_ids_ptr, read_ids_ptr,
    boundaries_ptr, n_documents,
    size, size_magic, size_shift, limit, limit_magic, limit_shift, pitch, n_blocks, total, slots,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    document, start, alone = _document_at(offsets_ptr, first, n_documents, BLOCK)
    if alone:
        _write(
            source_ptr, offsets_ptr, carry_ptr, cu_ptr, patch_ids_ptr, read_ids_ptr, block,
            document, start, n_documents, size, size_magic, size_shift,
            limit, limit_magic, limit_shift, pitch, total, slots, MODE, BLOCK, True,
        )  # fmt: skip
    else:
        _write(
            source_ptr, offsets_ptr, carry_ptr, cu_ptr, patch_ids_ptr, read_ids_ptr, block,
            document, start, n_documents, size, size_magic, size_shift,
            limit, limit_magic, limit_shift, pitch, total, slots, MODE, BLOCK, False,
        )  # fmt: skip
    n_patches = tl.load(n_patches_ptr)
    _unused(
        offsets_ptr, cu_ptr, boundaries_ptr, block.to(tl.int32), n_blocks, n_patches, slots,
        n_documents, BLOCK,
    )  # fmt: skip
    if not alone:
        tl.debug_barrier()  # other threads of the program wrote the patch_ids
        _boundaries(
            offsets_ptr, patch_ids_ptr, boundaries_ptr, document + 1, first, first + BLOCK,
            n_patches, slots, n_documents,
        )  # fmt: skip


def launch_fwd(
    byte_ids: Tensor,  # (T,)
    mask: Tensor | None,  # (T,) bool, for "patch_start_mask" and "patch_end_mask"
    how: str,
    patch_size: int | None,
    max_patch_len: int | None,
    cu_seqlens: Tensor | None,  # (S+1,) int32
    max_patches: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """cu_patchlens, patch_ids, read_ids, n_patches, cu_seqlens in patches."""
    total, device = byte_ids.shape[0], byte_ids.device
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=device) * total
    offsets = segments.clamped_bounds(cu_seqlens, total).contiguous()
    documents = offsets.shape[0] - 1
    config = configs.write_config(how, total, device)
    blocks = max(1, _launch.ceil_div(total, config["BLOCK"]))
    pitch = configs.pitch_of(blocks)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    cu_patchlens, patch_ids, read_ids = empty(max_patches + 1), empty(total), empty(total)
    n_patches, boundaries = empty(), empty(documents + 1)
    summary, carry = empty(4, pitch), empty(3, pitch)
    bytes_of = ((byte_ids if mask is None else mask).contiguous(), offsets)
    limit = min(max_patch_len or NO_LIMIT, NO_LIMIT)
    lengths = (*_reciprocal(min(patch_size or 1, NO_LIMIT)), *_reciprocal(limit), pitch)
    _launch.launch(
        stlm_find_patches_blocks, blocks,
        *bytes_of, summary, documents, *lengths,
        MODE=MODE_CODES[how], device=device, **config,
    )  # fmt: skip
    _launch.launch(
        stlm_find_patches_carry, 1,
        summary, carry, n_patches, limit, blocks, pitch,
        BYTES=config["BLOCK"], device=device, **configs.carry_config(blocks, device),
    )  # fmt: skip
    _launch.launch(
        stlm_find_patches_write, blocks,
        *bytes_of, carry, n_patches, cu_patchlens, patch_ids, read_ids, boundaries,
        documents, *lengths, blocks, total, max_patches,
        MODE=MODE_CODES[how], device=device, **config,
    )  # fmt: skip
    return cu_patchlens, patch_ids, read_ids, n_patches, boundaries


def _reciprocal(divisor: int) -> tuple[int, int, int]:
    """A divisor in [1, 2^31), and what divides x in [0, 2^31) by it: the upper 32 bits of x times
    the magic number, shifted. 1 has none: `_remainder` is 0 without."""
    if divisor == 1:
        return 1, 0, 0
    bits = (divisor - 1).bit_length()
    magic = (1 << (31 + bits)) // divisor + 1
    return divisor, magic - (magic >> 31 << 32), bits - 1
