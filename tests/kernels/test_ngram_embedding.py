"""ngram_embedding beyond what every op owes: the hash, documents, hot rows, NaN, bad ids."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lanes import Way
from helpers.tensors import ints, leaf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from stlm_kernels import _launch, explain, ngram_embedding
from stlm_kernels.ops.ngram_embedding.reference import reference

NAN = math.nan
LEAST, MOST = -(2**63), 2**63 - 1
PRIMES = (1_000_000_007, 5_915_587_277, 1_500_450_271)
"""The first of BLT's, in its order."""
MULTIPLIERS = (*PRIMES, MOST, LEAST, MOST - 24, -1, 0, 1, 2**32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERY_RESULT_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")


def counting(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A table whose row r holds r, so that the result shows the hash."""
    return torch.arange(rows, dtype=dtype)[:, None]


def blt_hashes(ids: list[int], n: int, rows: int, multiplier: int = PRIMES[0]) -> list[int]:
    """The windows, powers and wrapped sums of BLT's rolling_polynomial_hash, in numpy's int64."""
    padded = np.array([0] * (n - 1) + ids, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, n)
    with np.errstate(over="ignore"):
        powers = np.power(np.int64(multiplier), np.arange(n, dtype=np.int64))
        return [int(h) for h in np.mod((windows * powers).sum(1), rows)]


def exact_hashes(ids: list[int], n: int, rows: int, multiplier: int) -> list[int]:
    """Whole numbers of any size, the sum wrapped into an int64 once, at the end."""
    padded = [0] * (n - 1) + ids
    sums = [sum(padded[t + j] * multiplier**j for j in range(n)) for t in range(len(ids))]
    return [((total - LEAST) % 2**64 + LEAST) % rows for total in sums]


# ---- the hash ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [1, 61, 4096, 50_000, 1_000_003])
def test_the_hash_of_blt(dtype: torch.dtype, rows: int) -> None:
    ids = list(b"Byte Latent Transformer \x00\x00\xfe\xff" * 2) + ([30_000] * 3)
    ids = [x % 256 if dtype == torch.uint8 else x for x in ids]
    for n in (1, 2, 3, 4, 5, 8, 13, 60):
        out = ngram_embedding(ints(*ids, dtype=dtype), [counting(rows)], ngram_sizes=(n,))
        assert out.flatten().int().tolist() == blt_hashes(ids, n, rows)


def test_hashes_by_hand() -> None:
    ids = ints(97, 98, 99, dtype=torch.uint8)
    got = ngram_embedding(ids, [counting(1000)], ngram_sizes=(3,)).flatten().int().tolist()
    # 97 p^2 = 97000001358000004753 and so on, less the multiple of 2^64 that leaves an int64.
    wrapped = (4766280989452246673, 5766281100452247401, 6766281115452247554)
    assert got == [h % 1000 for h in wrapped]


def test_large_ids_wrap() -> None:
    ids = ints(2**63 - 1, 2**62, 5, dtype=torch.int64)
    got = ngram_embedding(ids, [counting(997)], ngram_sizes=(2,)).flatten().int().tolist()
    assert got == blt_hashes(ids.tolist(), 2, 997)


def test_tables_are_added_in_any_order_of_lengths() -> None:
    ids = ints(*b"abcabcabd", dtype=torch.uint8)
    tables = [torch.randn(rows, 3, dtype=torch.float64) for rows in (64, 7, 31, 64)]
    ngram_sizes = (5, 1, 3, 5)
    each = [
        ngram_embedding(ids, [t], ngram_sizes=(n,))
        for t, n in zip(tables, ngram_sizes, strict=True)
    ]
    both = ngram_embedding(ids, tables, ngram_sizes=ngram_sizes)
    torch.testing.assert_close(both, torch.stack(each).sum(0))
    torch.testing.assert_close(both, reference(ids, tables, ngram_sizes=ngram_sizes))
    as_module = torch.nn.ParameterList(tables)
    assert torch.equal(ngram_embedding(ids, as_module, ngram_sizes=list(ngram_sizes)), both)


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("rows", [1, 61, 4096, 50_000])
def test_a_multiplier_of_ones_own(multiplier: int, rows: int) -> None:
    ids = [*b"Byte Latent Transformer \x00\x00\xfe\xff", 2**62, MOST, 0, 7]
    for n in (1, 2, 3, 8, 40):
        out = ngram_embedding(
            ints(*ids, dtype=torch.int64), [counting(rows)], ngram_sizes=(n,),
            multipliers=[multiplier],
        )  # fmt: skip
        found = out.flatten().int().tolist()
        assert found == exact_hashes(ids, n, rows, multiplier)
        assert found == blt_hashes(ids, n, rows, multiplier)


@EVERY_RESULT_LANE
def test_hash_functions_of_each_size(way: Way) -> None:
    """Functions are summed as BLT sums them, and in any order; each hashes each document alone."""
    documents = [list(b"aabcaab"), list(b"c"), list(b"abcabcabd")]
    sizes = (3, 1, 4)
    calls = [(n, m) for m in (*PRIMES, MOST, LEAST) for n in sizes]
    calls += [(2, PRIMES[1]), (3, PRIMES[0])]
    rng = torch.Generator().manual_seed(0)
    tables = [  # whole numbers, so that the sums are exact in every order
        torch.randint(-4, 5, (31 + i, 2), generator=rng).to(way.device, way.dtype).requires_grad_()
        for i in range(len(calls))
    ]
    want = torch.cat([
        torch.stack([
            table.detach().cpu().double()[exact_hashes(ids, n, len(table), m)]
            for table, (n, m) in zip(tables, calls, strict=True)
        ]).sum(0)
        for ids in documents
    ])  # fmt: skip
    ids = ints(*itertools.chain(*documents), dtype=torch.uint8).to(way.device)
    cu = ints(0, 7, 8, 17).to(way.device)
    upstream = (torch.arange(34).view(17, 2) % 7 - 3).to(want)
    for order in (range(len(calls)), sorted(range(len(calls)), key=lambda i: (i * 7) % 17)):
        own = [tables[i] for i in order]
        out = ngram_embedding(
            ids, own, ngram_sizes=[calls[i][0] for i in order],
            multipliers=[calls[i][1] for i in order], cu_seqlens=cu, impl=way.impl,
        )  # fmt: skip
        assert out.tolist() == want.tolist()
        grads = torch.autograd.grad(out, own, upstream.to(out))
        for table, grad, (n, m) in zip(own, grads, (calls[i] for i in order), strict=True):
            each = (exact_hashes(one, n, len(table), m) for one in documents)
            expected = torch.zeros(len(table), 2, dtype=torch.float64)
            expected.index_add_(0, torch.tensor([*itertools.chain(*each)]), upstream)
            assert grad.tolist() == expected.tolist()


def test_the_default_multiplier() -> None:
    ids, tables = ints(*b"abcabcabd"), [torch.randn(9, 2) for _ in range(2)]
    out = ngram_embedding(ids, tables, ngram_sizes=(2, 3))
    for multipliers in (None, [1_000_000_007] * 2):
        same = ngram_embedding(ids, tables, ngram_sizes=(2, 3), multipliers=multipliers)
        assert torch.equal(out, same)
    other = ngram_embedding(ids, tables, ngram_sizes=(2, 3), multipliers=(1_000_000_007, 3))
    assert not torch.equal(out, other)


# ---- documents --------------------------------------------------------------------------------


@EVERY_RESULT_LANE
def test_documents_are_hashed_alone(way: Way) -> None:
    ids = ints(*b"aab", *b"c", *b"aabca", 1, 2, dtype=torch.uint8).to(way.device)
    cu = ints(0, 0, 3, 4, 4, 9).to(way.device)
    tables = [torch.randn(rows, 2).to(way.device, way.dtype) for rows in (16, 37)]
    out = ngram_embedding(ids, tables, ngram_sizes=(2, 4), cu_seqlens=cu, impl=way.impl)
    alone = [
        ngram_embedding(ids[a:b], tables, ngram_sizes=(2, 4), impl=way.impl)
        for a, b in ((0, 3), (3, 4), (4, 9))
    ]
    assert torch.equal(out[:9], torch.cat(alone))
    assert not out[9:].any()


@EVERY_RESULT_LANE
def test_bytes_of_no_document_give_zeros_and_take_nothing(way: Way) -> None:
    ids = ints(1, 2, 3, -7, 2**15 - 1, dtype=torch.int16).to(way.device)
    table = torch.ones(4, 2, dtype=way.dtype, device=way.device).requires_grad_()
    out = ngram_embedding(
        ids, [table], ngram_sizes=(2,), cu_seqlens=ints(0, 3).to(way.device), impl=way.impl
    )
    assert out.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    upstream = torch.ones_like(out)
    upstream[3:] = NAN
    (grad,) = torch.autograd.grad(out, table, upstream)
    assert grad.sum().item() == 6


# ---- gradients --------------------------------------------------------------------------------


@EVERY_RESULT_LANE
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_hot_rows_of_many_chunks(way: Way, rows: int) -> None:
    """Runs that begin, end and lie on both sides of the chunks' boundaries; many rows have none."""
    ids = torch.cat([ints(5).expand(37), ints(9).expand(16), torch.arange(30), ints(5).expand(12)])
    ids = ids.to(way.device, torch.uint8)
    table = torch.zeros(rows, 3, dtype=way.dtype, device=way.device).requires_grad_()
    out = ngram_embedding(ids, [table], ngram_sizes=(1,), impl=way.impl)
    upstream = (torch.arange(out.numel()).view(out.shape) % 7 - 3).to(out)
    with _launch.overriding({"ngram_embedding_bwd_heads": {"CHUNK": 8}}):
        (grad,) = torch.autograd.grad(out, table, upstream)
    want = torch.zeros(rows, 3, dtype=torch.float64)
    want.index_add_(0, ids.long().cpu() % rows, upstream.double().cpu())
    assert grad.tolist() == want.tolist()


@EVERY_RESULT_LANE
@pytest.mark.parametrize("last_rows", [5, 2**15])
def test_tables_of_one_backward_keep_apart(way: Way, last_rows: int) -> None:
    """Tables in no order, one of them frozen; together they pass the rows of 16-bit keys."""
    sizes, multipliers = (3, 1, 2, 1), (PRIMES[0], 31, PRIMES[0], 31)
    ids = torch.cat([ints(5).expand(37), torch.arange(40), ints(7).expand(23)])
    ids, cu = ids.to(way.device, torch.uint8), ints(0, 30, 30, 90).to(way.device)
    tables = [torch.zeros(n, 3, dtype=way.dtype, device=way.device) for n in (7, 4, 9, last_rows)]
    moving = [table.requires_grad_() for i, table in enumerate(tables) if i != 2]
    options: dict[str, Any] = {"ngram_sizes": sizes, "multipliers": multipliers, "cu_seqlens": cu}
    with _launch.overriding({"ngram_embedding_bwd_heads": {"CHUNK": 8}}):
        out = ngram_embedding(ids, tables, impl=way.impl, **options)
        upstream = (torch.arange(out.numel()).view(out.shape) % 7 - 3).to(out)
        grads = torch.autograd.grad(out, moving, upstream)
    wide = [table.detach().cpu().double().requires_grad_() for table in tables]
    options["cu_seqlens"] = cu.cpu()
    reference_out = reference(ids.cpu(), wide, **options)
    want = torch.autograd.grad(reference_out, [wide[0], wide[1], wide[3]], upstream.cpu().double())
    assert all(got.tolist() == x.tolist() for got, x in zip(grads, want, strict=True))


def test_all_tables_share_the_launches_of_the_backward() -> None:
    tables = [torch.zeros(40, 16, requires_grad=True) for _ in range(3)]
    names: list[str] = []
    with _launch.recording(lambda kernel, *_: names.append(kernel.fn.__name__)):
        out = ngram_embedding(ints(1, 2, 3), tables, ngram_sizes=(2, 3, 4), impl="triton")
        torch.autograd.grad(out, tables, torch.ones_like(out))
    assert [name.removeprefix("stlm_ngram_embedding_") for name in names] == [
        "fwd", "keys", "bwd_heads", "bwd",
    ]  # fmt: skip


@EVERY_RESULT_LANE
def test_nan_reaches_no_row_but_its_own(way: Way) -> None:
    ids = ints(1, 2, 1, 3).to(way.device)
    table = torch.zeros(8, 2, dtype=way.dtype, device=way.device).requires_grad_()
    out = ngram_embedding(ids, [table], ngram_sizes=(1,), impl=way.impl)
    upstream = torch.ones_like(out)
    upstream[1] = NAN
    (grad,) = torch.autograd.grad(out, table, upstream)
    assert grad[:, 0].nan_to_num(nan=-1).tolist() == [0, 2, -1, 1, 0, 0, 0, 0]


@EVERY_RESULT_LANE
@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_accumulate_wide(way: Way, recorded: bool) -> None:
    if recorded and way.impl == "triton":
        pytest.skip("a kernel's gradient is not differentiated")
    tables = [leaf(n, 1, dtype=way.dtype).detach().to(way.device).requires_grad_() for n in (2, 1)]
    ids = torch.cat([ints(0).expand(1000), ints(1).expand(500)]).to(way.device)
    out = ngram_embedding(ids, tables, ngram_sizes=(1, 2), impl=way.impl)
    grads = torch.autograd.grad(
        out, tables, torch.ones_like(out).requires_grad_(recorded), create_graph=recorded
    )
    assert grads[0].flatten().tolist() == [1000, 500]
    assert grads[1].item() == torch.tensor(1500.0, dtype=way.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    half = torch.finfo(dtype).eps / 2
    tables = [torch.full((1, 1), x, dtype=dtype) for x in (1.0, half, half)]
    assert ngram_embedding(ints(3), tables, ngram_sizes=(1, 2, 3)).item() == 1 + 2 * half


# ---- against the reference -----------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(0, 12))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ngram_sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    multiplier = st.sampled_from(MULTIPLIERS) | st.integers(LEAST, MOST)
    width = draw(st.integers(1, 3))
    cu = None
    if draw(st.booleans()):
        inner = draw(st.lists(st.integers(0, total), max_size=4))
        cu = ints(0, *sorted(inner))
    tables = [  # whole numbers, so that every sum is exact in every dtype
        torch.randint(-4, 5, (draw(st.integers(1, 9)), width), generator=rng).double()
        for _ in ngram_sizes
    ]
    return {
        "byte_ids": torch.randint(0, 3, (total,), generator=rng).to(torch.uint8),
        "tables": tables,
        "ngram_sizes": ngram_sizes,
        "multipliers": draw(st.none() | st.tuples(*[multiplier] * len(ngram_sizes))),
        "cu_seqlens": cu,
    }


@given(calls(), st.sampled_from(FLOATS))
def test_equals_the_reference(call: dict[str, Any], dtype: torch.dtype) -> None:
    ours = [table.to(dtype).requires_grad_() for table in call["tables"]]
    wide = [table.clone().requires_grad_() for table in call["tables"]]
    out, want = ngram_embedding(**{**call, "tables": ours}), reference(**{**call, "tables": wide})
    assert out.tolist() == want.tolist()
    upstream = torch.arange(out.numel()).view(out.shape) % 7 - 3.0
    got = torch.autograd.grad(out, ours, upstream.to(dtype))
    wanted = (
        torch.autograd.grad(
            want, wide, upstream.double(), allow_unused=True, materialize_grads=True
        )
        if want.requires_grad
        else [torch.zeros_like(x) for x in wide]
    )
    for a, b in zip(got, wanted, strict=True):
        assert a.tolist() == b.tolist()


# ---- transforms, unchecked values -------------------------------------------------------------


@EVERY_RESULT_LANE
def test_vmap_over_any_argument(way: Way) -> None:
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows what the transforms do")
    ids = torch.randint(0, 4, (2, 10)).to(way.device)
    first, second = torch.randn(2, 5, 2, device=way.device), torch.randn(4, 2, device=way.device)
    cu = ints(0, 4, 9).to(way.device)

    def square(ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
        out = ngram_embedding(
            ids, [first, second], ngram_sizes=(2, 1), cu_seqlens=cu, impl=way.impl
        )
        return out.square().sum()

    gradient = torch.func.grad(square, argnums=(1, 2))
    several = [(0, None, None), (None, 0, None), (0, 0, None)]
    for dims in several[2:] if way.impl == "triton" else several:  # kernels take time here
        batched = (ids, first, second)
        given = [x if d == 0 or x is second else x[0] for x, d in zip(batched, dims, strict=True)]
        got = torch.func.vmap(gradient, in_dims=dims)(*given)
        for i in range(2):
            picked = [x if d is None else x[i] for x, d in zip(given, dims, strict=True)]
            leaves = [x.clone().requires_grad_() for x in picked[1:]]
            wanted = torch.autograd.grad(square(picked[0], *leaves), leaves)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a[i], b)


@EVERY_RESULT_LANE
@pytest.mark.parametrize("documents", [False, True])
def test_unchecked_negative_ids_are_loud_and_left_out(way: Way, documents: bool) -> None:
    ids = ints(1, 2, -1, 3, 1, 2, -9, 4, dtype=torch.int64).to(way.device)
    tables = [torch.ones(4, 1, dtype=way.dtype, device=way.device) for _ in range(2)]
    # A decreasing boundary and one beyond the end: in bounds all the same.
    cu = ints(0, 3, 2**31 - 1).to(way.device) if documents else None

    def total(*tables: Tensor) -> tuple[Tensor, Tensor]:
        out = ngram_embedding(ids, tables, ngram_sizes=(1, 2), cu_seqlens=cu, impl=way.impl)
        return out.sum(), out

    grads, out = torch.func.grad(total, argnums=(0, 1), has_aux=True)(*tables)
    bad = [2, 6, 7] if documents else [2, 3, 6, 7]
    assert out.isnan().flatten().nonzero().flatten().tolist() == bad
    for grad in grads:
        assert grad.sum().item() == 8 - len(bad)


def test_unchecked_boundaries_stay_in_bounds() -> None:
    def total(table: Tensor) -> Tensor:
        return ngram_embedding(ints(1, 1, 1, 1), [table], ngram_sizes=(2,), cu_seqlens=cu).sum()

    for boundaries in ((0, 3, 1, 99), (-5, 2), (2, 3), (4, 0), (0,)):
        cu = ints(*boundaries)
        assert torch.func.grad(total)(torch.ones(4, 1)).isfinite().all()
    cu = ints(1, 3)  # the first byte belongs to no document
    assert torch.func.grad(total)(torch.ones(4, 1)).sum().item() == 2


@pytest.mark.parametrize("multipliers", [None, (PRIMES[1], LEAST)])
def test_compiles_once_for_all_lengths(multipliers: tuple[int, ...] | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ngram_embedding, fullgraph=True, backend=counter, dynamic=True)
    tables = [leaf(8, 3), leaf(7, 3)]
    for total in (40, 33, 57):
        ids, cu = torch.arange(total) % 5, ints(0, 7, total - 2)
        arguments: dict[str, Any] = {
            "ngram_sizes": (2, 3),
            "multipliers": multipliers,
            "cu_seqlens": cu,
        }
        out, want = compiled(ids, tables, **arguments), ngram_embedding(ids, tables, **arguments)
        torch.testing.assert_close(out, want)
        got = torch.autograd.grad(out.square().sum(), tables)
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), tables), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


# ---- arguments --------------------------------------------------------------------------------

IDS, TABLE = ints(0, 1, 2, 3), torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"byte_ids": IDS.float()}, "byte_ids: expected dtype uint8 or int16 or int32 or int64"),
        ({"byte_ids": IDS[None]}, r"byte_ids: expected shape \(T,\), got \(1, 4\)"),
        ({"tables": TABLE}, "tables: expected a sequence of Tensors, got Tensor"),
        ({"tables": []}, "tables: expected at least 1 table, got none"),
        ({"tables": [TABLE] * 2}, r"ngram_sizes: expected one int for each table \(2\), got 1"),
        ({"tables": [TABLE, 3], "ngram_sizes": (1, 2)}, r"tables\[1\]: expected a Tensor, got int"),
        ({"tables": [TABLE[0]]}, r"tables\[0\]: expected shape \(M, D\), got \(2,\)"),
        ({"tables": [TABLE[:0]]}, r"tables\[0\]: expected M >= 1 and D >= 1, got \(0, 2\)"),
        ({"tables": [TABLE[:, :0]]}, r"tables\[0\]: expected M >= 1 and D >= 1, got \(5, 0\)"),
        ({"tables": [TABLE.int()]}, r"tables\[0\]: expected dtype float32 or"),
        (
            {"tables": [TABLE, TABLE.half()], "ngram_sizes": (1, 2)},
            r"tables\[1\]: expected dtype float32, got float16",
        ),
        (
            {"tables": [TABLE, TABLE[:, :1]], "ngram_sizes": (1, 2)},
            r"tables\[1\]: expected shape \(M, 2\), got \(5, 1\)",
        ),
        ({"tables": [TABLE.to("meta")]}, r"tables\[0\]: expected device cpu, got meta"),
        ({"ngram_sizes": 2}, "ngram_sizes: expected a sequence of ints, got int"),
        ({"ngram_sizes": (0,)}, r"ngram_sizes\[0\]: expected an int >= 1, got 0"),
        ({"ngram_sizes": (True,)}, r"ngram_sizes\[0\]: expected an int >= 1, got True"),
        ({"ngram_sizes": (2.0,)}, r"ngram_sizes\[0\]: expected an int >= 1, got 2.0"),
        ({"multipliers": 3}, "multipliers: expected None or a sequence of ints, got int"),
        ({"multipliers": ()}, r"multipliers: expected one int for each table \(1\), got 0"),
        ({"multipliers": (3, 5)}, r"multipliers: expected one int for each table \(1\), got 2"),
        (
            {"multipliers": (3.0,)},
            r"multipliers\[0\]: expected an int in \[-2\^63, 2\^63 - 1\], got 3.0",
        ),
        (
            {"multipliers": (True,)},
            r"multipliers\[0\]: expected an int in \[-2\^63, 2\^63 - 1\], got True",
        ),
        (
            {"multipliers": (None,)},
            r"multipliers\[0\]: expected an int in \[-2\^63, 2\^63 - 1\], got None",
        ),
        (
            {"multipliers": (2**63,)},
            r"multipliers\[0\]: expected an int in \[-2\^63, 2\^63 - 1\], got 9223372",
        ),
        (
            {"multipliers": (LEAST - 1,)},
            r"multipliers\[0\]: expected an int in \[-2\^63, 2\^63 - 1\], got -9223",
        ),
        (
            {"tables": [TABLE] * 2, "ngram_sizes": (1, 1), "multipliers": (3, "7")},
            r"multipliers\[1\]: expected an int in \[-2\^63, 2\^63 - 1\], got '7'",
        ),
        ({"cu_seqlens": IDS.long()}, "cu_seqlens: expected dtype int32, got int64"),
        ({"cu_seqlens": ints(1, 2)}, "cu_seqlens: expected first entry 0, got 1"),
        ({"cu_seqlens": ints(0, 3, 2)}, "cu_seqlens: expected non-decreasing entries, got 2"),
        ({"cu_seqlens": ints(0, 5)}, "cu_seqlens: expected last entry <= 4, got 5"),
        ({"impl": "gpu"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngram_embedding(**{"byte_ids": IDS, "tables": [TABLE], "ngram_sizes": (2,), **arguments})


def test_negative_ids() -> None:
    message = r"byte_ids: expected values in \[0, 9223372036854775807\], got -1 at position 2"
    with pytest.raises(IndexError, match=message):
        ngram_embedding(ints(0, 1, -1, 2), [TABLE], ngram_sizes=(1,))
    with pytest.raises(IndexError, match="got -1 at position 2"):
        ngram_embedding(ints(0, 1, -1, 2), [TABLE], ngram_sizes=(1,), cu_seqlens=ints(0, 3))


def test_a_refusal_lists_every_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"tensors are on cpu .*; .*float64"):
        ngram_embedding(IDS, [TABLE.double()], ngram_sizes=(2,), impl="triton")
    huge = torch.zeros(1, 1).expand(2**31, 1)
    reasons = explain(ngram_embedding, IDS, [huge], ngram_sizes=(2,))
    assert any("2147483648 rows" in reason for reason in reasons)
