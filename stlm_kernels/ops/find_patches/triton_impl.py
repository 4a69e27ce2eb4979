"""find_patches in Triton: a scan in three small passes, and a fourth for what is left over.

A byte begins a natural patch if it is the first of its document, is a start, or follows a byte that
closes by the rule. With L(t) the last natural begin at or before t, a byte begins a patch where
(t - L(t)) mod max_patch_len = 0 and closes one by length where (t - L(t) + 1) mod max_patch_len = 0
(no limit: the largest int32). The number of a patch is the count of begins.

1. blocks: a program owns BLOCK bytes and sums them up: its last natural begin, the begins that
   follow its first natural one, and how many bytes lie before that one.
2. carry: one program scans the blocks: the last natural begin and the count before each. Between
   two natural begins the forced ones are evenly spaced, so their count is two divisions.
3. write: a program owns BLOCK bytes: patch_ids, read_ids, and cu_patchlens where a patch begins.
4. finish: unused slots, document boundaries in patches, and the reads that an overflow takes away.

No atomics, no waiting of one program for another, no synchronisation with the host.
Floor: 9 T + 4 P bytes (an id or a mask read, two int32 written for each byte), 10 MB at 1M bytes;
passes 1 and 3 both read the ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._torch import segments
from ..._triton.tiles import segments_of
from . import config as configs

SPACE, FIXED, STARTS, CLOSES = (tl.constexpr(i) for i in range(4))
MODE_CODES = {"space": 0, "fixed": 1, "patch_start_mask": 2, "patch_end_mask": 3}
NO_LIMIT = torch.iinfo(torch.int32).max
FINISH_BLOCK = 1024


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _spacelike(ids_ptr, positions, mask):
    """Neither ASCII alphanumeric nor a UTF-8 continuation byte; True where masked out."""
    ids = tl.load(ids_ptr + positions, mask=mask, other=0)
    if ids.dtype == tl.int64:
        ids = tl.minimum(ids, 256)  # before it is narrowed: 2^32 + 97 is no letter
    ids = ids.to(tl.int32)
    lowered = ids | 0x20
    letter = (lowered >= 97) & (lowered <= 122)
    digit = (ids >= 48) & (ids <= 57)
    continuation = (ids >= 0x80) & (ids <= 0xBF)
    return ~(letter | digit | continuation)


@triton.jit
def _closes_by_rule(source_ptr, positions, starts, mask, size, MODE: tl.constexpr):
    """Mask of bytes that end their patch by the rule; `starts`: first bytes of their documents."""
    if MODE == SPACE:
        has_predecessor = mask & (positions > starts)
        after_space = _spacelike(source_ptr, positions - 1, has_predecessor) & has_predecessor
        closes = _spacelike(source_ptr, positions, mask) & ~after_space
    elif MODE == FIXED:
        closes = (positions - starts + 1) % size == 0
    elif MODE == CLOSES:
        closes = tl.load(source_ptr + positions, mask=mask, other=0) != 0
    else:
        closes = positions < 0
    return closes & mask


@triton.jit
def _documents_of(offsets_ptr, first, n_documents, BLOCK: tl.constexpr):
    """Mask of bytes in a document, and its first byte; offsets must be clamped and sorted."""
    document = segments_of(offsets_ptr, first, n_documents, BLOCK)
    inside = (document >= 0) & (document < n_documents)
    return inside, tl.load(offsets_ptr + document, mask=inside, other=0)


@triton.jit
def _natural_begins(source_ptr, positions, inside, starts, size, MODE: tl.constexpr):
    """Mask of the bytes that begin a patch whatever its length may be."""
    follows = inside & (positions > starts)
    if MODE == STARTS:
        begins = tl.load(source_ptr + positions, mask=follows, other=0) != 0
    else:
        begins = _closes_by_rule(source_ptr, positions - 1, starts, follows, size, MODE)
    return (begins & follows) | (inside & (positions == starts))


@triton.jit(do_not_specialize=["n_documents", "size", "limit", "n_blocks"])
def stlm_find_patches_blocks(
    source_ptr, offsets_ptr, summary_ptr,
    n_documents, size, limit, n_blocks,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """summary[:, block]: bytes before the first natural begin, the last one, begins from there."""
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    rows = first + tl.arange(0, BLOCK)
    positions = rows.to(tl.int32)
    inside, starts = _documents_of(offsets_ptr, first, n_documents, BLOCK)
    natural = _natural_begins(source_ptr, positions, inside, starts, size, MODE)
    latest = tl.associative_scan(tl.where(natural, positions, -1), 0, _maximum)
    begins = inside & (latest >= 0) & ((positions - latest) % limit == 0)
    tl.store(summary_ptr + block, tl.sum((inside & (latest < 0)).to(tl.int32)))
    tl.store(summary_ptr + n_blocks + block, tl.max(latest))
    tl.store(summary_ptr + 2 * n_blocks + block, tl.sum(begins.to(tl.int32)))


@triton.jit(do_not_specialize=["limit", "n_blocks"])
def stlm_find_patches_carry(
    summary_ptr, carry_ptr, n_patches_ptr, limit, n_blocks,
    BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """carry[:, block]: the last natural begin and the number of begins before the block."""
    latest = tl.full((), -1, tl.int32)
    begun = tl.zeros((), tl.int32)
    for first in range(0, n_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        own = blocks < n_blocks
        before = tl.load(summary_ptr + n_blocks + blocks - 1, mask=own & (blocks > 0), other=-1)
        before = tl.maximum(tl.associative_scan(before, 0, _maximum), latest)
        latest = tl.max(before)
        leading = tl.load(summary_ptr + blocks, mask=own, other=0)
        counted = tl.load(summary_ptr + 2 * n_blocks + blocks, mask=own, other=0)
        since = tl.where(own, blocks * BYTES - 1 - before, 0)
        counted += (since + leading) // limit - since // limit
        tl.store(carry_ptr + blocks, before, mask=own)
        tl.store(carry_ptr + n_blocks + blocks, begun + tl.cumsum(counted) - counted, mask=own)
        begun += tl.sum(counted)
    tl.store(n_patches_ptr, begun)


@triton.jit(do_not_specialize=["n_documents", "size", "limit", "n_blocks", "total", "slots"])
def stlm_find_patches_write(
    source_ptr, offsets_ptr, carry_ptr, cu_ptr, patch_ids_ptr, read_ids_ptr,
    n_documents, size, limit, n_blocks, total, slots,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    rows = first + tl.arange(0, BLOCK)
    positions = rows.to(tl.int32)
    inside, starts = _documents_of(offsets_ptr, first, n_documents, BLOCK)
    natural = _natural_begins(source_ptr, positions, inside, starts, size, MODE)
    latest = tl.associative_scan(tl.where(natural, positions, -1), 0, _maximum)
    latest = tl.maximum(latest, tl.load(carry_ptr + block))
    begins = inside & ((positions - latest) % limit == 0)
    begun = tl.load(carry_ptr + n_blocks + block) + tl.cumsum(begins.to(tl.int32))
    patches = begun - 1
    tl.store(cu_ptr + patches, positions, mask=begins & (patches <= slots))
    patch_ids = tl.where(inside & (patches < slots), patches, -1)
    tl.store(patch_ids_ptr + rows, patch_ids, mask=rows < total)

    closes = _closes_by_rule(source_ptr, positions, starts, inside, size, MODE)
    closes = closes | ((positions - latest + 1) % limit == 0)
    # Any begin behind the document's first byte, natural or forced, completes a patch of its own.
    readable = closes | (latest > starts) | (positions - latest >= limit)
    complete = tl.minimum(tl.where(closes, patches, patches - 1), slots - 1)
    read_ids = tl.where(inside & readable, complete, -1)
    tl.store(read_ids_ptr + rows, read_ids, mask=rows < total)


@triton.jit(do_not_specialize=["n_documents", "slots"])
def stlm_find_patches_finish(
    offsets_ptr, n_patches_ptr, cu_ptr, patch_ids_ptr, read_ids_ptr, boundaries_ptr,
    n_documents, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK slots, documents and, if patches overflow, bytes."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    rows = first + tl.arange(0, BLOCK)
    n_patches = tl.load(n_patches_ptr)
    end = tl.load(offsets_ptr + n_documents)
    unused = (rows >= n_patches) & (rows <= slots)
    tl.store(cu_ptr + rows, tl.zeros((BLOCK,), tl.int32) + end, mask=unused)

    own = rows <= n_documents
    first_bytes = tl.load(offsets_ptr + rows, mask=own, other=0)
    first_patches = tl.load(patch_ids_ptr + first_bytes, mask=own & (first_bytes < end), other=-1)
    boundaries = tl.where(first_patches >= 0, first_patches, tl.minimum(n_patches, slots))
    tl.store(boundaries_ptr + rows, boundaries, mask=own)

    if n_patches > slots:
        overflow = tl.load(cu_ptr + slots)
        inside, starts = _documents_of(offsets_ptr, first, n_documents, BLOCK)
        taken_away = inside & (starts >= overflow)
        tl.store(read_ids_ptr + rows, tl.full((BLOCK,), -1, tl.int32), mask=taken_away)


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
    limit = min(max_patch_len or NO_LIMIT, NO_LIMIT)
    config = configs.write_config(how, total, device)
    blocks = _launch.ceil_div(total, config["BLOCK"])

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    cu_patchlens, patch_ids, read_ids = empty(max_patches + 1), empty(total), empty(total)
    n_patches, boundaries, carry = empty(), empty(documents + 1), empty(2, blocks)
    bytes_of = ((byte_ids if mask is None else mask).contiguous(), offsets)
    sizes = (documents, min(patch_size or 1, NO_LIMIT), limit, blocks)
    _count(bytes_of, sizes, MODE_CODES[how], config, carry, n_patches)
    _launch.launch(
        stlm_find_patches_write, blocks,
        *bytes_of, carry, cu_patchlens, patch_ids, read_ids, *sizes, total, max_patches,
        MODE=MODE_CODES[how], device=device, **config,
    )  # fmt: skip
    _launch.launch(
        stlm_find_patches_finish,
        _launch.ceil_div(max(total, documents + 1, max_patches + 1), FINISH_BLOCK),
        offsets, n_patches, cu_patchlens, patch_ids, read_ids, boundaries,
        documents, max_patches,
        BLOCK=FINISH_BLOCK, num_warps=4, device=device,
    )  # fmt: skip
    return cu_patchlens, patch_ids, read_ids, n_patches, boundaries


def _count(
    bytes_of: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    mode: int,
    config: _launch.Config,
    carry: Tensor,  # (2, blocks), written
    n_patches: Tensor,  # (), written
) -> None:
    """The begins before each block, and of all."""
    *_, limit, blocks = sizes
    summary = torch.empty((3, blocks), dtype=torch.int32, device=carry.device)
    _launch.launch(
        stlm_find_patches_blocks, blocks,
        *bytes_of, summary, *sizes,
        MODE=mode, device=carry.device, **config,
    )  # fmt: skip
    _launch.launch(
        stlm_find_patches_carry, 1,
        summary, carry, n_patches, limit, blocks,
        BYTES=config["BLOCK"], device=carry.device, **configs.carry_config(blocks, carry.device),
    )  # fmt: skip
