"""Incremental results agree with the full run: boundaries, pooled states, cached attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.models import TEXT, packed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stlm_kernels import Patches, byte_pool, find_patches, ngram_embedding, segment_pool
from stlm_models import IncrementalNgrams, IncrementalPatcher, IncrementalPooling
from stlm_models.layers.ngrams import NgramPooling

RULES: list[dict[str, Any]] = [
    {"rule": "space"},
    {"rule": "space", "max_patch_len": 1},
    {"rule": "space", "max_patch_len": 3},
    {"rule": "fixed", "patch_size": 4},
    {"rule": "fixed", "patch_size": 5, "max_patch_len": 3},
    {"rule": "fixed", "patch_size": 1},
]
MODES = ("mean", "sum", "max", "min", "first", "last")
# Letters, spaces, halves of characters and id 256: all that a rule tells apart.
IDS = st.sampled_from([*b"aZ09 .\n", 0, 0x7F, 0x80, 0xBF, 0xC3, 0xFF, 256])
ROWS = st.lists(st.lists(IDS, min_size=1, max_size=14), min_size=1, max_size=4)


@dataclasses.dataclass
class Run:
    """A full run over ragged rows, and how many ids of each its prefix shows."""

    ids: Tensor
    cu_seqlens: Tensor
    patches: Patches
    rows: list[list[int]]

    @classmethod
    def over(cls, rows: list[list[int]], options: dict[str, Any]) -> Run:
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int16)
        cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
        return cls(ids, cu_seqlens, find_patches(ids, cu_seqlens=cu_seqlens, **options), rows)

    @property
    def closed(self) -> Tensor:
        return self.patches.read_ids == self.patches.patch_ids

    @property
    def last(self) -> Tensor:
        return self.cu_seqlens[1:].long() - 1

    @property
    def last_patches(self) -> Tensor:
        return self.patches.patch_ids[self.last].long()

    def steps(self, shown: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(ids (B,), their positions in the packed run (B,), rows that still go on (B,) bool)."""
        starts, found = self.cu_seqlens.tolist(), []
        for t in range(max(len(row) - n for row, n in zip(self.rows, shown, strict=True))):
            at = [n + t for n in shown]
            going = torch.tensor([i < len(row) for i, row in zip(at, self.rows, strict=True)])
            # Rows that have ended are fed anything: no other row may notice.
            at = [min(i, len(row) - 1) for i, row in zip(at, self.rows, strict=True)]
            positions = torch.tensor([s + i for s, i in zip(starts[:-1], at, strict=True)])
            found.append((self.ids[positions], positions, going))
        return found


def prefixes(rows: list[list[int]], shares: list[float]) -> list[int]:
    """Return the number of ids of each row, at least one, that a share shows."""
    return [max(1, int(s * len(row))) for row, s in zip(rows, shares, strict=False)]


def states(count: int, dim: int = 3) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(count))


def assert_pooled(actual: Tensor, expected: Tensor) -> None:
    """Compare within 1e-6 of the magnitude of what was pooled."""
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", RULES, ids=str)
@given(rows=ROWS, shares=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boundaries_and_pooled_states(
    options: dict[str, Any], rows: list[list[int]], shares: list[float]
) -> None:
    full, shown = Run.over(rows, options), prefixes(rows, shares)
    prefix = Run.over([row[:n] for row, n in zip(rows, shown, strict=True)], options)
    x = states(len(full.ids))
    inside = torch.cat([torch.arange(n) < m for n, m in zip(map(len, rows), shown, strict=True)])
    everyone = torch.arange(len(rows))
    patching = IncrementalPatcher(len(rows), **options)
    patching.resume(everyone, prefix.ids, prefix.cu_seqlens, prefix.patches)
    pools = {mode: IncrementalPooling(len(rows), 3, mode) for mode in MODES}
    for mode, pool in pools.items():
        pooled = segment_pool(x[inside], prefix.patches.cu_patchlens, mode=mode)
        pool.resume(everyone, pooled[prefix.last_patches], patching.lengths)
    expected = {mode: segment_pool(x, full.patches.cu_patchlens, mode=mode) for mode in MODES}
    for ids, positions, going in full.steps(shown):
        closed = patching.step(ids)
        assert torch.equal(closed[going], full.closed[positions][going])
        emitted = closed & going
        patch = full.patches.patch_ids[positions][emitted].long()
        for mode, pool in pools.items():
            assert_pooled(pool.step(x[positions], closed)[emitted], expected[mode][patch])


@given(row=st.lists(IDS, min_size=2, max_size=30), lengths=st.lists(st.integers(1, 6), min_size=30))
def test_documents_behind_each_other(row: list[int], lengths: list[int]) -> None:
    boundaries = [b for b in torch.tensor(lengths).cumsum(0).tolist() if b < len(row)]
    ids = torch.tensor(row, dtype=torch.int16)
    cu_seqlens = torch.tensor([0, *boundaries, len(row)], dtype=torch.int32)
    x = states(len(row))
    for options in RULES[:5]:
        patches = find_patches(ids, cu_seqlens=cu_seqlens, **options)
        whole = find_patches(ids, **options)
        means = segment_pool(x, patches.cu_patchlens)
        patching, pool = IncrementalPatcher(2, **options), IncrementalPooling(2, 3, "mean")
        ngrams, layer = (
            IncrementalNgrams(2, (2, 3)),
            NgramPooling((2, 3), 61, 4, 8).requires_grad_(False),
        )
        embedded = ngram_embedding(
            ids, list(layer.tables), ngram_sizes=(2, 3), cu_seqlens=cu_seqlens
        )
        for t in range(len(row)):
            # Row 1 is one document throughout: a boundary belongs to its row.
            begins = torch.tensor([t in boundaries, False])
            for state in (patching, pool, ngrams):
                state.begin_documents(begins)
            closed = patching.step(ids[t].expand(2))
            pooled = pool.step(x[t].expand(2, 3), closed)
            patch = int(patches.patch_ids[t])
            assert bool(closed[0]) == (int(patches.read_ids[t]) == patch)
            assert bool(closed[1]) == bool(whole.read_ids[t] == whole.patch_ids[t])
            assert torch.equal(layer.embed(ngrams.step(ids[t].expand(2)))[0], embedded[t])
            if closed[0]:
                assert_pooled(pooled[0], means[patch])


@pytest.mark.parametrize("mode", ["mean", "sum"])
@given(rows=ROWS, shares=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_ngrams_and_byte_embeddings(mode: str, rows: list[list[int]], shares: list[float]) -> None:
    options = RULES[2]
    full, shown = Run.over(rows, options), prefixes(rows, shares)
    prefix = Run.over([row[:n] for row, n in zip(rows, shown, strict=True)], options)
    torch.manual_seed(0)
    layer, table = NgramPooling((2, 5, 1), 61, 4, 8, hashes=3), torch.randn(257, 3)
    layer.requires_grad_(False)
    everyone = torch.arange(len(rows))
    patching = IncrementalPatcher(len(rows), **options)
    patching.resume(everyone, prefix.ids, prefix.cu_seqlens, prefix.patches)
    ngrams = IncrementalNgrams(len(rows), layer.sizes)
    ngrams.resume(everyone, prefix.ids, prefix.cu_seqlens)
    byte_pooling, ngram_pooling = (IncrementalPooling(len(rows), dim, mode) for dim in (3, 4))
    for pool, pooled in (
        (byte_pooling, byte_pool(prefix.ids, table, prefix.patches.cu_patchlens, mode=mode)),
        (ngram_pooling, layer.pool(prefix.ids, prefix.patches, prefix.cu_seqlens, mode=mode)),
    ):
        pool.resume(everyone, pooled[prefix.last_patches], patching.lengths)
    of_bytes = byte_pool(full.ids, table, full.patches.cu_patchlens, mode=mode)
    of_ngrams = layer.pool(full.ids, full.patches, full.cu_seqlens, mode=mode)
    for ids, positions, going in full.steps(shown):
        closed = patching.step(ids)
        emitted = closed & going
        patch = full.patches.patch_ids[positions][emitted].long()
        pooled = byte_pooling.step(table[ids.long()], closed)[emitted]
        assert_pooled(pooled, of_bytes[patch])
        pooled = ngram_pooling.step(layer.embed(ngrams.step(ids)), closed)[emitted]
        assert_pooled(pooled, of_ngrams[patch])


class TestPoolState:
    def test_a_long_patch_loses_nothing(self) -> None:
        x = torch.randn(4_000, 2) + 1
        for mode in ("mean", "sum"):
            pool = IncrementalPooling(1, 2, mode)
            for row in x:
                pooled = pool.step(row[None], torch.zeros(1, dtype=torch.bool))
            expected = x.double().sum(0) / (len(x) if mode == "mean" else 1)
            torch.testing.assert_close(pooled[0], expected.float(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_an_extreme_keeps_nan_until_the_patch_closes(self, mode: str) -> None:
        pool = IncrementalPooling(1, 1, mode)
        flags = [False, False, True, True]
        values = [
            pool.step(torch.tensor([[v]]), torch.tensor([closed]))
            for v, closed in zip([-3.0, torch.nan, 1.0, -5.0], flags, strict=True)
        ]
        assert [float(v) for v in values[::3]] == [-3.0, -5.0]
        assert values[1].isnan()
        assert values[2].isnan()

    def test_dtypes(self) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            pool = IncrementalPooling(2, 3, "mean")
            assert pool.step(torch.ones(2, 3, dtype=dtype), torch.ones(2).bool()).dtype == dtype


class Recorder(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_step_is_the_same_few_ops_for_any_batch(options: dict[str, Any]) -> None:
    recorded = []
    for batch in (1, 9):
        ids = torch.full((batch,), 32, dtype=torch.int16)
        patching, ngrams = IncrementalPatcher(batch, **options), IncrementalNgrams(batch, (2, 3))
        pools = [IncrementalPooling(batch, 4, mode) for mode in MODES]
        with Recorder() as recorder:
            closed = patching.step(ids)
            ngrams.step(ids)
            for pool in pools:
                pool.step(torch.ones(batch, 4), closed)
        recorded.append(recorder.ops)
    assert recorded[0] == recorded[1]
    # Each of these waits for the device.
    assert not any("_local_scalar_dense" in op or "nonzero" in op for op in recorded[0])


def test_ids_of_any_dtype() -> None:
    ids, _ = packed([TEXT])
    closed = []
    for dtype in (torch.int16, torch.int32, torch.int64):
        state = IncrementalPatcher(1, "space", max_patch_len=5)
        closed.append([bool(state.step(i[None].to(dtype))) for i in ids])
    assert closed[0] == closed[1] == closed[2]
    state = IncrementalPatcher(1, "space", max_patch_len=5)
    alone = find_patches(ids[1:].to(torch.uint8), rule="space", max_patch_len=5)
    shorter = [bool(state.step(i[None].to(torch.uint8))) for i in ids[1:]]
    assert shorter == (alone.read_ids == alone.patch_ids).tolist()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IncrementalPatcher(1, "entropy"), "rule: expected one of"),
        (lambda: IncrementalPatcher(1, "fixed"), "patch_size: expected"),
        (lambda: IncrementalPatcher(1, "space", patch_size=3), "patch_size: expected None"),
        (
            lambda: IncrementalPatcher(1, "space", max_patch_len=0),
            "max_patch_len: expected None or at",
        ),
        (lambda: IncrementalPooling(1, 2, "attention"), "mode: expected one of"),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
