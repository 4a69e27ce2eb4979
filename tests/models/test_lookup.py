"""Gradients of tables whose rows are used often: accumulated in float32, cast once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TINY, scrambled
from torch import Tensor

from stlm_kernels import find_patches
from stlm_models import TiedEmbedding
from stlm_models.layers.embedding import UntiedEmbedding, lookup
from stlm_models.layers.ngrams import NgramPooling
from stlm_models.layers.pooling import ByteUnpooling

USES, LETTERS, WIDTH = 8192, 10, 8
NARROW = [torch.bfloat16, torch.float16]
IDS = torch.randint(0, LETTERS, (USES,), generator=torch.Generator().manual_seed(0))
ONE_EACH = find_patches(IDS, rule="fixed", patch_size=1)
BOUNDARIES = torch.tensor([0, USES], dtype=torch.int32)
Read = Callable[[Tensor], Tensor]


def embeds(table: TiedEmbedding) -> tuple[Tensor, Read]:
    return table.weight, lambda weight: table.embed(IDS)


def calls() -> tuple[Tensor, Read]:
    table = TiedEmbedding(LETTERS, WIDTH)
    return table.weight, lambda weight: table(IDS)


def embeds_untied() -> tuple[Tensor, Read]:
    return embeds(UntiedEmbedding(LETTERS, WIDTH))


def embeds_words() -> tuple[Tensor, Read]:
    return embeds(TiedEmbedding(50_257, WIDTH))


def pools() -> tuple[Tensor, Read]:
    table = TiedEmbedding(LETTERS, WIDTH)
    return table.weight, lambda weight: table.pool(IDS, ONE_EACH, mode="sum")


def reads_ngrams() -> tuple[Tensor, Read]:
    ngrams = NgramPooling((1,), LETTERS, WIDTH, WIDTH)
    return ngrams.tables[0], lambda table: ngrams.rows(IDS, BOUNDARIES)


def embeds_ngrams() -> tuple[Tensor, Read]:
    ngrams = NgramPooling((1,), LETTERS, WIDTH, WIDTH)
    return ngrams.tables[0], lambda table: ngrams.embed(IDS[:, None])


def reads_rows() -> tuple[Tensor, Read]:
    return torch.zeros(LETTERS, WIDTH, requires_grad=True), lambda table: lookup(table, IDS)


TABLES = [calls, embeds_untied, embeds_words, pools, reads_ngrams, embeds_ngrams, reads_rows]


def upstream_of(dtype: torch.dtype) -> Tensor:
    """Eighths, whose sums float32 holds; of one sign, for 16-bit sums of mixed ones stay small."""
    return (torch.randint(0, 9, (USES, WIDTH)) / 8).to(dtype)


def assert_cast_once(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("of_module", TABLES)
def test_of_each_table(
    of_module: Callable[[], tuple[Tensor, Read]], dtype: torch.dtype, autocast: bool
) -> None:
    weight, read = of_module()
    weight.data = weight.data.to(dtype)
    upstream = upstream_of(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = read(weight)
    assert out.dtype == dtype
    (got,) = torch.autograd.grad(out, weight, upstream)
    assert got.dtype == dtype
    want = torch.zeros(weight.shape, dtype=torch.float64).index_add(0, IDS, upstream.double())
    assert_cast_once(got, want)


@pytest.mark.parametrize("dtype", NARROW)
def test_ones_are_counted(dtype: torch.dtype) -> None:
    """An upstream gradient that is one number, expanded; ids that are (B, T) and int16."""
    table = TiedEmbedding(LETTERS, WIDTH).to(dtype)
    table.embed(IDS.view(8, -1).short()).sum().backward()
    counts = IDS.bincount().to(dtype)[:, None].expand(-1, WIDTH)
    assert table.weight.grad is not None
    assert torch.equal(table.weight.grad[:LETTERS], counts)
    assert not table.weight.grad[LETTERS:].any()


@pytest.mark.parametrize("dtype", NARROW)
def test_of_rows_that_modules_share(dtype: torch.dtype) -> None:
    """The null state that many bytes read, and a patch that many bytes read."""
    unpooling = ByteUnpooling(WIDTH).to(dtype)
    open_patch = find_patches(IDS, rule="fixed", patch_size=USES + 1)
    upstream = upstream_of(dtype)
    out = unpooling(torch.zeros(1, WIDTH, dtype=dtype), open_patch)
    (got,) = torch.autograd.grad(out, unpooling.null_state, upstream)
    assert_cast_once(got, upstream.double().sum(0))
    states = torch.zeros(2, WIDTH, dtype=dtype, requires_grad=True)
    patches = find_patches(IDS, rule="fixed", patch_size=USES // 2)
    (got,) = torch.autograd.grad(unpooling(states, patches), states, upstream)
    assert_cast_once(got[0], upstream[USES // 2 - 1 : USES - 1].double().sum(0))


@pytest.mark.parametrize("dtype", NARROW)
def test_of_the_parallel_output(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read the row of the null state until a document's first patch is complete."""
    config = dataclasses.replace(TINY, output="parallel", decoder_window=None)
    model, ids = scrambled(config).to(dtype), torch.tensor([*b"ab"] * 600)
    boundaries = torch.arange(0, len(ids) + 1, 2, dtype=torch.int32)
    decode_slots, kept = model.decode_slots, []

    def decode_and_keep(states: Tensor) -> Tensor:
        kept.append(decode_slots(states).detach().requires_grad_())
        return kept[0]

    monkeypatch.setattr(model, "decode_slots", decode_and_keep)
    monkeypatch.setattr(model, "output_states", lambda rows: rows)
    model.hidden(ids, cu_seqlens=boundaries).sum().backward()
    (slots,) = kept
    assert slots.grad[-1, 1].tolist() == [600] * TINY.byte_dim


class TestTransforms:
    TABLE = torch.randn(LETTERS, WIDTH).bfloat16().requires_grad_()

    def counts(self) -> Tensor:
        return IDS.bincount().bfloat16()[:, None].expand(-1, WIDTH)

    def test_compiled_whole(self) -> None:
        compiled = torch.compile(lookup, fullgraph=True, backend="aot_eager")
        out = compiled(self.TABLE, IDS)
        assert torch.equal(out, F.embedding(IDS, self.TABLE))
        (got,) = torch.autograd.grad(out.sum(), self.TABLE)
        assert torch.equal(got, self.counts())

    def test_differentiated_twice(self) -> None:
        squares = lookup(self.TABLE, IDS).float().square().sum()
        (once,) = torch.autograd.grad(squares, self.TABLE, create_graph=True)
        (twice,) = torch.autograd.grad(once.float().sum(), self.TABLE)
        assert torch.equal(twice, 2 * self.counts())
        table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        ids = torch.tensor([[0, 3, 3], [1, 3, 0]])
        assert torch.autograd.gradcheck(lambda table: lookup(table, ids), table)
        assert torch.autograd.gradgradcheck(lambda table: lookup(table, ids), table)

    @pytest.mark.parametrize("grad_mode", [False, True])
    def test_in_torch_func(self, grad_mode: bool) -> None:
        with torch.set_grad_enabled(grad_mode):
            got = torch.func.grad(lambda table: lookup(table, IDS).float().sum())(self.TABLE)
        assert torch.equal(got, self.counts())
        each = torch.func.vmap(lookup, in_dims=(None, 0))(self.TABLE, IDS.view(8, -1))
        assert torch.equal(each.flatten(0, 1), F.embedding(IDS, self.TABLE))
        tangent = torch.randn_like(self.TABLE)
        _, moved = torch.func.jvp(lambda table: lookup(table, IDS), (self.TABLE,), (tangent,))
        assert torch.equal(moved, F.embedding(IDS, tangent))

    def test_without_gradients_the_table_is_not_copied(self) -> None:
        with torch.no_grad(), torch.profiler.profile() as seen:
            assert torch.equal(lookup(self.TABLE, IDS), F.embedding(IDS, self.TABLE))
        assert "aten::_to_copy" not in {event.key for event in seen.key_averages()}
