"""Shapes, inputs, bytes and FLOPs of ngram_embedding for tests, benchmarks and tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...spec import Case, Inputs, OpSpec, case
from ...spec_inputs import patch_boundaries, random_ids, text_bytes
from .op import ngram_embedding
from .reference import reference, yardstick

MILLION = 1 << 20
BLT = tuple((n, 50_000) for n in range(3, 9))
PRIMES = (1_000_000_007, 5_915_587_277, 1_500_450_271)
"""The multipliers of BLT's first hash functions: it has three by default."""
LARGE = (2**63 - 25, -(2**63), 2**63 - 1, 5_915_587_277)
NAMES = tuple(f"table{i}" for i in range(3 * len(BLT)))

CASES = (
    case("smoke", T=90, D=20, tables=((2, 64), (3, 61)), S=3, boundaries="tail"),
    case("smoke", T=70, D=20, tables=((3, 61), (2, 61)), hashes=2, S=3, boundaries="ragged"),
    case("edge", T=300, D=32, tables=((1, 7),), S=0, ids="int16"),
    case("edge", T=40, D=100, tables=((8, 37), (4, 1), (5, 30)), S=4, boundaries="ragged"),
    case("edge", T=30, D=1, tables=((2, 16),), S=30, boundaries="even", ids="int64"),
    case("edge", T=9, D=1024, tables=((3, 16),), S=0, ids="int32", boundaries="even"),
    case("edge", T=17, D=8, tables=((2, 16),), S=3, boundaries="hollow"),
    case("edge", T=0, D=8, tables=((2, 16),), S=0),
    case(
        "edge",
        T=50,
        D=8,
        tables=((9, 37), (3, 64), (3, 30), (3, 37)),
        multipliers=LARGE,
        S=3,
        boundaries="tail",
        ids="int64",
    ),
    case("smoke", T=41, D=16, tables=((4, 61),), multipliers=LARGE[:1], S=0, ids="int16"),
    case("long", T=5003, D=32, tables=((2, 100), (3, 20_000)), S=4, boundaries="tail"),
    case("aot", T=4096, D=128, tables=((2, 4096), (3, 4096)), S=4, boundaries="ragged"),
    case("aot", T=4096, D=128, tables=((2, 4096), (3, 4096)), hashes=2, S=4, boundaries="ragged"),
    case(
        "huge", T=3 * MILLION, D=768, tables=((2, 8192),), S=128, boundaries="even", text="english"
    ),
    *(
        case(
            "bench" if (width, text) == (128, "english") else "bench_full",
            T=MILLION,
            D=width,
            tables=tables,
            S=128,
            boundaries="even",
            text=text,
        )
        for width, tables in ((32, ((2, 4096),)), (128, BLT), (512, ((3, 500_000),)))
        for text in ("english", "equal")
    ),
    case(
        "bench",
        T=MILLION,
        D=128,
        tables=BLT,
        hashes=3,
        S=128,
        boundaries="even",
        text="english",
    ),
    case(
        "bench_cpu",
        T=8192,
        D=64,
        tables=((3, 4096), (4, 4096)),
        hashes=2,
        S=8,
        boundaries="even",
        text="english",
    ),
    *(
        case("bench_cpu", T=total, D=width, tables=tables, S=8, boundaries="even", text="english")
        for total, width, tables in (
            (65_536, 32, ((2, 4096),)),
            (8192, 64, ((3, 4096), (4, 5000), (5, 5000))),
        )
    ),
)


def _tables(case: Case) -> tuple[tuple[int, int], ...]:
    """Size and rows of each table, in BLT's order: all of the first hash function come first."""
    tables: tuple[tuple[int, int], ...] = case["tables"]
    return tables * case.get("hashes", 1)


def _multipliers(case: Case) -> tuple[int, ...] | None:
    if "hashes" in case.sizes:
        return tuple(prime for prime in PRIMES[: case["hashes"]] for _ in case["tables"])
    multipliers: tuple[int, ...] | None = case.get("multipliers")
    return multipliers


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Arguments of ngram_embedding, its tables by name; on the CPU first, the same everywhere."""
    rng = torch.Generator().manual_seed(seed)
    total = case["T"]
    id_dtype = getattr(torch, case.get("ids", "uint8"))
    if "text" in case.sizes:
        ids = text_bytes(case["text"], total, rng).to(id_dtype)
    else:
        # Few different ids, so that n-grams recur.
        ids = random_ids(total, 6, id_dtype, rng)
    inputs: Inputs = {
        "byte_ids": ids.to(device),
        "ngram_sizes": tuple(n for n, _ in _tables(case)),
    }
    multipliers = _multipliers(case)
    if multipliers is not None:
        inputs["multipliers"] = multipliers
    for i, (_, rows) in enumerate(_tables(case)):
        inputs[f"table{i}"] = torch.randn(rows, case["D"], generator=rng).to(device, dtype)
    if case["S"]:
        inputs["cu_seqlens"] = patch_boundaries(case["boundaries"], total, case["S"], rng).to(
            device
        )
    return inputs


def arguments(inputs: Inputs) -> Inputs:
    """The tables as the sequence that the op takes: tests and benchmarks know tensors by name."""
    names = [name for name in NAMES if name in inputs]
    others = {name: value for name, value in inputs.items() if name not in names}
    return others | {"tables": [inputs[name] for name in names]}


def _by_name(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(**inputs: Any) -> Tensor:
        return function(**arguments(inputs))

    return call


def bytes_moved(case: Case, dtype: torch.dtype, direction: str) -> int:
    """The ids, one (T, D) and the tables once each, those no larger than what is read of them."""
    total, width, size = case["T"], case["D"], dtype.itemsize
    tables = sum(rows if direction != "fwd" else min(rows, total) for _, rows in _tables(case))
    return total + size * width * (total + tables)


def flops(case: Case, direction: str) -> int:
    """One addition for each byte, table and column."""
    return case["T"] * case["D"] * len(_tables(case))


SPEC = OpSpec(
    name="ngram_embedding",
    op=_by_name(ngram_embedding),
    reference=_by_name(reference),
    yardstick=_by_name(yardstick),
    make_inputs=make_inputs,
    cases=CASES,
    bytes_moved=bytes_moved,
    flops=flops,
    grad_args=NAMES,
    row_args=NAMES,
    exact=lambda case: frozenset({"out"} if len(_tables(case)) == 1 else ()),
    kernels=(
        "ngram_embedding_fwd",
        "ngram_embedding_keys",
        "ngram_embedding_bwd_heads",
        "ngram_embedding_bwd",
    ),
    arguments=arguments,
)
