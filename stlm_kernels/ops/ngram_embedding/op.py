"""The public ngram_embedding: contract, checks, dispatch, and the registered op beneath it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..._torch.function import Function
from . import torch_impl
from .config import DEFAULT_MULTIPLIER, unsupported_reasons


@named_errors
def ngram_embedding(
    byte_ids: Tensor,  # (T,) uint8|int16|int32|int64
    tables: Sequence[Tensor],  # (M_i, D) each
    *,
    ngram_sizes: Sequence[int],
    multipliers: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,  # (S+1,) int32
    impl: Impl = "auto",
) -> Tensor:
    """Embed the n-grams that end at each byte by hashing, and add up those of all tables.

    out[t] = sum over i of tables[i][hash_i(t)], where hash_i(t) is the floor-mod by M_i of the
    int64-wrapped sum over j < n_i of byte_ids[t - n_i + 1 + j] * m_i^j, ids before the document's
    first byte counting as 0. The hash is BLT's, bit for bit, but never reads across documents.

    Args:
        byte_ids: (T,) uint8, int16, int32 or int64, at least 0.
        tables: one (M_i, D) tensor for each hash, of one width, device and dtype: float32, bfloat16
            or float16; float64 on the torch path.
        ngram_sizes: the n_i, ints >= 1, one for each table; a size may occur more than once.
        multipliers: the m_i, ints of int64, one for each table; primes are usual. None:
            1,000,000,007 for each, BLT's first; docs/conventions.md has its others.
        cu_seqlens: (S+1,) int32 document boundaries in bytes: from 0, non-decreasing, at most T.
            Bytes from the last boundary on give zeros and reach no gradient. None: one document.
        impl: "auto", "triton" or "torch".

    Returns: (T, D) in the tables' dtype, under autocast in the autocast dtype.
    Raises: ValueError for a wrong type, dtype, shape, device or option, or no table, on CPU in
        eager mode also for bad boundaries; IndexError there for a negative id in a document;
        NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> tables = [torch.randn(1000, 16) for _ in range(2)]
    >>> ngram_embedding(torch.tensor(list(b"bytes")), tables, ngram_sizes=(3, 4)).shape
    torch.Size([5, 16])

    Numerics: docs/numerics.md. Source: the hash n-gram embeddings of BLT (arXiv 2412.09871).
    """
    tables, ngram_sizes, multipliers = _check(
        byte_ids, tables, ngram_sizes, multipliers, cu_seqlens
    )
    tables, out_dtype = _library.distinct(*tables), runtime.compute_dtype(tables[0])
    if use_triton(
        "ngram_embedding", impl, byte_ids.device, unsupported_reasons,
        byte_ids=byte_ids, tables=tables, ngram_sizes=ngram_sizes, multipliers=multipliers,
        cu_seqlens=cu_seqlens,
    ):  # fmt: skip
        return _NgramEmbedding.apply(
            byte_ids, cu_seqlens, ngram_sizes, multipliers, out_dtype, *tables
        )
    return torch_impl.ngram_embedding(
        byte_ids, tables, ngram_sizes, multipliers, cu_seqlens, out_dtype
    )


def _check(
    byte_ids: Tensor,
    tables: Sequence[Tensor],
    ngram_sizes: Sequence[int],
    multipliers: Sequence[int] | None,
    cu_seqlens: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    _checks.require_ids("byte_ids", byte_ids)
    tables = _check_tables(tables, byte_ids.device)
    sizes = _one_a_table("ngram_sizes", ngram_sizes, len(tables), "a sequence of ints")
    for i, n in enumerate(sizes):
        _checks.require_int_at_least(f"ngram_sizes[{i}]", n, 1)
    if multipliers is None:
        multipliers = (DEFAULT_MULTIPLIER,) * len(tables)
    expected = "None or a sequence of ints"
    multipliers = _one_a_table("multipliers", multipliers, len(tables), expected)
    for i, multiplier in enumerate(multipliers):
        _checks.require_int64(f"multipliers[{i}]", multiplier)
    visible = [byte_ids]
    if cu_seqlens is not None:
        _checks.require_offsets("cu_seqlens", cu_seqlens, byte_ids.device)
        visible.append(cu_seqlens)
    if runtime.values_visible(*visible):
        ids = byte_ids
        if cu_seqlens is not None:
            _checks.check_offset_values("cu_seqlens", cu_seqlens, byte_ids.shape[0])
            ids = byte_ids[: int(cu_seqlens[-1])]
        _checks.check_id_values("byte_ids", ids, 0, 2**63)
    return tables, sizes, multipliers


def _check_tables(tables: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    several = not isinstance(tables, Tensor) and hasattr(tables, "__iter__")
    _checks.require(several, "tables", "a sequence of Tensors", type(tables).__name__)
    tables = tuple(tables)
    _checks.require(len(tables) >= 1, "tables", "at least 1 table", "none")
    shape: tuple[int | str, int | str] = ("M", "D")
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATS
    for i, table in enumerate(tables):
        name = f"tables[{i}]"
        _checks.require_tensor(name, table, shape, dtypes, device)
        filled = table.shape[0] >= 1 and table.shape[1] >= 1
        _checks.require(filled, name, "M >= 1 and D >= 1", tuple(table.shape))
        shape, dtypes = ("M", table.shape[1]), (table.dtype,)
    return tables


def _one_a_table(name: str, values: Sequence[int], tables: int, expected: str) -> tuple[int, ...]:
    _checks.require(hasattr(values, "__iter__"), name, expected, type(values).__name__)
    values = tuple(values)
    _checks.require(len(values) == tables, name, f"one int for each table ({tables})", len(values))
    return values


class _NgramEmbedding(Function):
    """Autograd over the registered ops."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        byte_ids: Tensor,
        cu_seqlens: Tensor | None,
        ngram_sizes: tuple[int, ...],
        multipliers: tuple[int, ...],
        out_dtype: torch.dtype,
        *tables: Tensor,
    ) -> Tensor:
        return _FWD(
            byte_ids, list(tables), cu_seqlens, list(ngram_sizes), list(multipliers), out_dtype
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        byte_ids, cu_seqlens, ngram_sizes, multipliers, _, *tables = inputs
        ctx.save_for_backward(byte_ids, cu_seqlens)
        ctx.longest = max(ngram_sizes)
        ctx.tables = [
            (n, multiplier, table.shape[0], table.dtype)
            for n, multiplier, table in zip(ngram_sizes, multipliers, tables, strict=True)
        ]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        byte_ids, cu_seqlens = ctx.saved_tensors
        wanted = [i for i, want in enumerate(ctx.needs_input_grad[5:]) if want]
        sizes, multipliers, rows, dtypes = zip(*(ctx.tables[i] for i in wanted), strict=True)
        whole = _library.run_backward(
            _BWD, "ngram_embedding", grads[0], byte_ids, cu_seqlens, list(sizes),
            list(multipliers), list(rows), ctx.longest, dtypes[0],
        )  # fmt: skip
        dtables: list[Tensor | None] = [None] * len(ctx.tables)
        for i, part in zip(wanted, whole.split(rows), strict=True):
            dtables[i] = part
        return None, None, None, None, None, *dtables


_FWD = _library.register(
    "ngram_embedding_fwd(Tensor byte_ids, Tensor[] tables, Tensor? cu_seqlens, int[] ngram_sizes, "
    "int[] multipliers, ScalarType out_dtype) -> Tensor",
    launcher="ngram_embedding:launch_fwd",
    meta=lambda byte_ids, tables, out_dtype: tables[0].new_empty(
        (byte_ids.shape[0], tables[0].shape[1]), dtype=out_dtype
    ),
    flops=lambda byte_ids, tables: byte_ids[0] * tables[0][1] * len(tables),
)
_library.register_vmap_loop(_FWD)
_BWD = _library.register(
    "ngram_embedding_bwd(Tensor grad, Tensor byte_ids, Tensor? cu_seqlens, int[] ngram_sizes, "
    "int[] multipliers, SymInt[] table_rows, int longest, ScalarType dtype) -> Tensor",
    launcher="ngram_embedding:launch_bwd",
    meta=lambda grad, table_rows, dtype: grad.new_empty(
        (sum(table_rows), grad.shape[1]), dtype=dtype
    ),
    flops=lambda grad, table_rows: grad[0] * grad[1] * len(table_rows),
)
