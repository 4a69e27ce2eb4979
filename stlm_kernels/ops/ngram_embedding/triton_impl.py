"""ngram_embedding in Triton: hashes in registers, then gathers; runs of sorted hashes backward.

h_n(t) = h_{n-1}(t) * m + id[t - n + 1] in wrapping int64, so all tables of one multiplier m, in
order of their n, share one walk back over the bytes. The row is h_n floor-mod M_n.

Forward. A program owns BLOCK_T bytes x BLOCK_D columns: for each multiplier it walks back as far as
its longest n-gram, adds one gathered row of each table in fp32 and writes once; the hashes never
reach memory. Floor: T + 2 T D bytes (bf16), and each table row once where the tables stay in the
L2: at 1M bytes, 32 columns and 4096 rows 68 MB = 16 us at 4.3 TB/s. Six tables of 50,000 x 128 (77
MB) do not stay there, and pay up to 2 T D more for each. Adds: T x D for each table.

Backward, all tables together: dE[r] = sum of dY[t] over h(t) = r. The tables are too tall for a
count matrix, and frequent n-grams forbid a program for each row alone. So `keys` are the rows of a
byte in all tables, counted from the first row of the first one, or their number M for bytes that
are left out; torch's stable sort brings the bytes of a row together, in order; `bwd_heads` sums of
each CHUNK sorted bytes the run that lies at its start; and `bwd` owns the rows: it adds a row's
bytes up to the first boundary of a chunk, then the heads of the chunks that its run reaches. One of
the two reads each gradient row once for each table, and none adds more than CHUNK rows and
T / CHUNK heads to a table row, whatever is frequent. Where rows have few bytes, a tile takes more
rows. Both keep a tile of sums in the registers of one warp, rows of a run side by side, and add
those up once at the end. The order follows from the keys and sizes: deterministic, no atomics, no
synchronisation. However many tables there are, it is three launches beside the sort's.
Floor: T + 2 T D + 2 M D bytes: 16 us at 1M bytes and D = 32 with 4096 rows. The sort comes on top:
it moves its 10 or 12 bytes of key and position twice for every 8 bits of the key, which is why
fewer than 32,768 rows have 16-bit keys. The heads cost 8 D T / CHUNK bytes.
Counted on sm_90 for six tables of 50,000 x 128 at 1M bytes of English: at least 308 us backward, by
instructions; 501 us, most of it DRAM, where each table had launches and gradients of its own.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import segments_of, side_by_side
from . import config as configs


@triton.jit
def _documents(
    cu_ptr, first, n_documents, total, HAS_DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return BLOCK bytes from `first` on, their documents' first bytes, and which have one."""
    rows = first + side_by_side(BLOCK, 1)
    start = tl.zeros((BLOCK,), tl.int64)
    live = rows < total
    if HAS_DOCUMENTS:
        document = segments_of(cu_ptr, first, n_documents, BLOCK)
        live = live & (document >= 0) & (document < n_documents)
        start = tl.load(cu_ptr + document, mask=live, other=0).to(tl.int64)
        start = tl.maximum(start, 0)
    return rows, start, live


@triton.jit
def _extend(ids_ptr, rows, start, live, hashes, lowest, first, last, MULTIPLIER: tl.constexpr):
    """Extend the hashes of `first` bytes to those of `last`, and the lowest id that they hold."""
    for back in range(first, last):
        inside = live & (rows - back >= start)
        ids = tl.load(ids_ptr + rows - back, mask=inside, other=0).to(tl.int64)
        hashes = hashes * MULTIPLIER + ids
        lowest = tl.minimum(lowest, ids)
    return hashes, lowest


@triton.jit
def _floor_mod(hashes, M: tl.constexpr):
    rest = hashes % M
    return tl.where(rest < 0, rest + M, rest)


@triton.jit(do_not_specialize=["total", "n_documents", "chunks"])
def stlm_ngram_embedding_fwd(
    ids_ptr, tables, cu_ptr, out_ptr,
    total, n_documents, chunks,
    FIRST: tl.constexpr, LAST: tl.constexpr, MULTIPLIERS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """FIRST, LAST: a table goes on from hashes of FIRST bytes, 0 to begin, to those of LAST."""
    program = tl.program_id(0).to(tl.int64)
    columns = (program // chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    first_row = (program % chunks) * BLOCK_T
    rows, start, live = _documents(cu_ptr, first_row, n_documents, total, HAS_DOCUMENTS, BLOCK_T)
    hashes = tl.zeros((BLOCK_T,), tl.int64)
    lowest = tl.zeros((BLOCK_T,), tl.int64)
    stored = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in tl.static_range(len(ROWS)):
        if FIRST[i] == 0:
            hashes = tl.zeros((BLOCK_T,), tl.int64)
        hashes, lowest = _extend(
            ids_ptr, rows, start, live, hashes, lowest, FIRST[i], LAST[i], MULTIPLIERS[i]
        )
        source = tables[i] + _floor_mod(hashes, ROWS[i])[:, None] * D + columns[None, :]
        row = tl.load(source, mask=live[:, None] & (columns < D)[None, :], other=0.0)
        acc += row.to(stored).to(tl.float32)  # under autocast the tables are wider than the result
    acc = tl.where((lowest < 0)[:, None], float("nan"), acc)
    mask = (rows < total)[:, None] & (columns < D)[None, :]
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], acc.to(stored), mask=mask)


@triton.jit(do_not_specialize=["total", "n_documents", "longest"])
def stlm_ngram_embedding_keys(
    ids_ptr, cu_ptr, keys_ptr,
    total, n_documents, longest,
    FIRST: tl.constexpr, LAST: tl.constexpr, MULTIPLIERS: tl.constexpr, ROWS: tl.constexpr,
    OFFSETS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row of each byte in each table, counted through all of them; the number of all rows for
    bytes that the gradient leaves out."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK
    rows, start, live = _documents(cu_ptr, first_row, n_documents, total, HAS_DOCUMENTS, BLOCK)
    hashes = tl.zeros((BLOCK,), tl.int64)
    lowest = tl.zeros((BLOCK,), tl.int64)
    _, lowest = _extend(ids_ptr, rows, start, live, hashes, lowest, 0, longest, 1)
    for i in tl.static_range(len(ROWS)):
        if FIRST[i] == 0:
            hashes = tl.zeros((BLOCK,), tl.int64)
        hashes, _ = _extend(
            ids_ptr, rows, start, live, hashes, lowest, FIRST[i], LAST[i], MULTIPLIERS[i]
        )
        own = OFFSETS[i] + _floor_mod(hashes, ROWS[i])
        keys = tl.where(live & (lowest >= 0), own, OFFSETS[len(ROWS)])
        place = keys_ptr + i * total.to(tl.int64) + rows
        tl.store(place, keys.to(keys_ptr.dtype.element_ty), mask=rows < total)


@triton.jit
def _add_runs(
    acc, x_ptr, order_ptr, start, end, total, columns,
    D: tl.constexpr, TABLES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_P, BLOCK_K, BLOCK_D) and in it rows start[p] to end[p] of x, BLOCK_K at a time.

    With TABLES these are places in the order of the keys of so many tables, of `total` bytes each.
    """
    for first in range(0, tl.max(end - start).to(tl.int32), BLOCK_K):
        rows = start[:, None] + first + tl.arange(0, BLOCK_K)[None, :]
        inside = rows < end[:, None]
        if TABLES > 0:
            rows = tl.load(order_ptr + rows, mask=inside, other=0).to(tl.int64)
            for _ in tl.static_range(TABLES - 1):
                rows = tl.where(rows >= total, rows - total, rows)
        source = x_ptr + rows[:, :, None] * D + columns[None, None, :]
        x = tl.load(source, mask=inside[:, :, None] & (columns < D)[None, None, :], other=0.0)
        acc += x.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["n_rows", "total", "chunks"])
def stlm_ngram_embedding_bwd_heads(
    grad_ptr, keys_ptr, order_ptr, runs_ptr, heads_ptr,
    n_rows, total, chunks,
    D: tl.constexpr, TABLES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """heads[c]: the part of the run that lies at the start of chunk c."""
    program = tl.program_id(0).to(tl.int64)
    columns = (program // chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = program % chunks + tl.zeros((1,), tl.int64)
    key = tl.load(keys_ptr + chunk * CHUNK).to(tl.int64)
    end = tl.load(runs_ptr + key + 1, mask=key < n_rows, other=0).to(tl.int64)
    end = tl.minimum(end, (chunk + 1) * CHUNK)
    acc = tl.zeros((1, BLOCK_K, BLOCK_D), tl.float32)
    acc = _add_runs(
        acc, grad_ptr, order_ptr, chunk * CHUNK, end, total, columns, D, TABLES, BLOCK_K
    )
    place = heads_ptr + chunk[:, None] * D + columns[None, :]
    tl.store(place, tl.sum(acc, 1), mask=(columns < D)[None, :])


@triton.jit(do_not_specialize=["n_rows", "total", "blocks"])
def stlm_ngram_embedding_bwd(
    grad_ptr, order_ptr, runs_ptr, heads_ptr, out_ptr,
    n_rows, total, blocks,
    D: tl.constexpr, TABLES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = (program // blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = (program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    own = rows < n_rows
    start = tl.load(runs_ptr + rows, mask=own, other=0).to(tl.int64)
    end = tl.load(runs_ptr + rows + 1, mask=own, other=0).to(tl.int64)
    first_head = tl.cdiv(start, CHUNK)
    before_heads = tl.minimum(end, first_head * CHUNK)
    acc = tl.zeros((BLOCK_P, BLOCK_K, BLOCK_D), tl.float32)
    acc = _add_runs(
        acc, grad_ptr, order_ptr, start, before_heads, total, columns, D, TABLES, BLOCK_K
    )
    acc = _add_runs(
        acc, heads_ptr, order_ptr, first_head, tl.cdiv(end, CHUNK), total, columns, D, 0, BLOCK_K
    )
    mask = own[:, None] & (columns < D)[None, :]
    place = out_ptr + rows[:, None] * D + columns[None, :]
    tl.store(place, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=mask)


def launch_fwd(
    byte_ids: Tensor,  # (T,)
    tables: list[Tensor],  # (M_i, D)
    cu_seqlens: Tensor | None,  # (S+1,) int32
    ngram_sizes: list[int],
    multipliers: list[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    total, width = byte_ids.shape[0], tables[0].shape[1]
    out = torch.empty((total, width), dtype=out_dtype, device=byte_ids.device)
    config = configs.fwd_config(total, width, out_dtype, out.device)
    order, first = _walks(ngram_sizes, multipliers)
    chunks = _launch.ceil_div(total, config["BLOCK_T"])
    ids = byte_ids.contiguous()
    cu, documents = _documents_of(ids, cu_seqlens)
    _launch.launch(
        stlm_ngram_embedding_fwd, chunks * _launch.ceil_div(width, config["BLOCK_D"]),
        ids, tuple(tables[i].contiguous() for i in order), cu, out,
        total, documents, chunks,
        FIRST=first, LAST=tuple(ngram_sizes[i] for i in order),
        MULTIPLIERS=tuple(multipliers[i] for i in order),
        ROWS=tuple(len(tables[i]) for i in order), D=width,
        HAS_DOCUMENTS=cu_seqlens is not None, device=out.device, **config,
    )  # fmt: skip
    return out


def _walks(ngram_sizes: list[int], multipliers: list[int]) -> tuple[list[int], tuple[int, ...]]:
    """The tables by multiplier and size, and how many bytes the hash of each goes on from."""
    order = sorted(range(len(ngram_sizes)), key=lambda i: (multipliers[i], ngram_sizes[i]))
    first = [0] * len(order)
    for k in range(1, len(order)):
        before, here = order[k - 1], order[k]
        if multipliers[before] == multipliers[here]:
            first[k] = ngram_sizes[before]
    return order, tuple(first)


def launch_bwd(
    grad: Tensor,  # (T, D)
    byte_ids: Tensor,  # (T,)
    cu_seqlens: Tensor | None,  # (S+1,) int32
    ngram_sizes: list[int],
    multipliers: list[int],
    table_rows: list[int],
    longest: int,
    dtype: torch.dtype,
) -> Tensor:
    """(sum of table_rows, D): the gradients of some tables, one below the other, of a call whose
    longest n-gram is `longest`."""
    (total, width), device = grad.shape, grad.device
    grad, rows, tables = grad.contiguous(), sum(table_rows), len(table_rows)
    keys = _keys(byte_ids, cu_seqlens, ngram_sizes, multipliers, table_rows, longest)
    keys, order = torch.sort(keys, stable=True)
    every = torch.arange(rows + 1, device=device, dtype=keys.dtype)
    runs = torch.searchsorted(keys, every, out_int32=len(keys) < 2**31)

    config = configs.bwd_heads_config(len(keys), width, grad.dtype, device)
    chunk = config["CHUNK"]
    chunks = _launch.ceil_div(len(keys), chunk)
    heads = torch.empty((chunks, width), dtype=torch.float32, device=device)
    _launch.launch(
        stlm_ngram_embedding_bwd_heads, chunks * _launch.ceil_div(width, config["BLOCK_D"]),
        grad, keys, order, runs, heads, rows, total, chunks,
        D=width, TABLES=tables, device=device, **config,
    )  # fmt: skip

    out = torch.empty((rows, width), dtype=dtype, device=device)
    config = configs.bwd_config(len(keys), rows, width, grad.dtype, device)
    blocks = _launch.ceil_div(rows, config["BLOCK_P"])
    _launch.launch(
        stlm_ngram_embedding_bwd, blocks * _launch.ceil_div(width, config["BLOCK_D"]),
        grad, order, runs, heads, out, rows, total, blocks,
        D=width, TABLES=tables, CHUNK=chunk, device=device, **config,
    )  # fmt: skip
    return out


def _keys(
    byte_ids: Tensor,
    cu_seqlens: Tensor | None,
    ngram_sizes: list[int],
    multipliers: list[int],
    table_rows: list[int],
    longest: int,
) -> Tensor:  # (tables T,)
    """Keys that the backward sorts by, as narrow as may be: a radix sort takes time by the bit."""
    ids, total, rows = byte_ids.contiguous(), byte_ids.shape[0], sum(table_rows)
    dtype = torch.int16 if rows < 2**15 else torch.int32 if rows < 2**31 else torch.int64
    keys = torch.empty(len(table_rows) * total, dtype=dtype, device=ids.device)
    cu, documents = _documents_of(ids, cu_seqlens)
    order, first = _walks(ngram_sizes, multipliers)
    offsets = (0, *itertools.accumulate(table_rows))
    config = configs.keys_config(total, ids.device)
    _launch.launch(
        stlm_ngram_embedding_keys, _launch.ceil_div(total, config["BLOCK"]),
        ids, cu, keys, total, documents, longest,
        FIRST=first, LAST=tuple(ngram_sizes[i] for i in order),
        MULTIPLIERS=tuple(multipliers[i] for i in order),
        ROWS=tuple(table_rows[i] for i in order),
        OFFSETS=(*(offsets[i] for i in order), rows),
        HAS_DOCUMENTS=cu_seqlens is not None, device=ids.device, **config,
    )  # fmt: skip
    return keys


def _documents_of(ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """Boundaries (any tensor where there are none) and the number of documents."""
    if cu_seqlens is None:
        return ids, 1
    documents = cu_seqlens.shape[0] - 1
    return cu_seqlens.contiguous(), documents
