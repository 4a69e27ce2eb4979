"""Cached runs: attention, the model and what it writes agree with the full run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from helpers.cached import full_states, seen_ids, varied, write_greedily
from helpers.models import RULES, TEXT, TINY, ids_of, scrambled
from helpers.norms import assert_as_right, assert_same_rows
from torch import Tensor, nn

from stlm_models import STLM, Attention, KVCache
from stlm_models.config import BOS_ID
from stlm_models.generation.engine import CachedRun
from stlm_models.layers.transformer import PatchCore


def prefixes(texts: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Arguments of `Attention` for the beginnings of texts (B, T, D)."""
    x = torch.cat([text[:n] for text, n in zip(texts, lengths, strict=True)])
    return {"x": x, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}


class TestAttention:
    @pytest.mark.parametrize("window", [None, 1, 4, 5, 100])
    @pytest.mark.parametrize(("kv_heads", "qk_norm"), [(4, True), (2, False)])
    @torch.no_grad()
    def test_rows_that_grow(self, window: int | None, kv_heads: int, qk_norm: bool) -> None:
        torch.manual_seed(1)
        layer = Attention(16, 4, kv_heads=kv_heads, window=window, qk_norm=qk_norm, head_dim=6)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        texts = torch.randn(4, 90, 16)
        full = layer(texts)
        lengths = [3, 1, 0, 11]
        cache = layer.new_cache(4)
        layer(**prefixes(texts, lengths), cache=cache)
        for step in range(80):
            # Row 1 skips some steps; row 3 begins anew in between.
            rows = [r for r in range(4) if r != 1 or step % 3 == 0]
            if step == 9:
                lengths[3] = 6
                third = cache.at(torch.tensor([3]))
                layer(**prefixes(texts[3:], lengths[3:]), cache=third)
            x = torch.stack([texts[r, lengths[r]] for r in rows])[:, None]
            out = layer(x, cache=cache if len(rows) == 4 else cache.at(torch.tensor(rows)))
            expected = torch.stack([full[r, lengths[r]] for r in rows])[:, None]
            assert_same_rows(out, expected)
            for r in rows:
                lengths[r] += 1
            assert cache.lens.tolist() == lengths
        assert cache.longest == max(lengths)
        assert cache.k.shape[1] == {None: 128}.get(window, window)

    def test_memory_follows_the_longest_row(self) -> None:
        cache = KVCache(4, 2, 6)
        for step in range(160):
            cache.append(torch.ones(1, 2, 6), torch.ones(1, 2, 6), rows=torch.tensor([step % 4]))
        # 160 positions in all, but only 40 in a row.
        assert cache.lens.tolist() == [40] * 4
        assert cache.k.shape == (4, 64, 2, 6)

    def test_no_rows_begin_anew(self) -> None:
        cache = KVCache(2, 1, 6)
        for _ in range(2):
            cache.append(torch.ones(2, 1, 6), torch.ones(2, 1, 6))
        nothing, none = torch.zeros(0, 1, 6), torch.zeros(0, dtype=torch.int64)
        cache.at(none).fill(nothing, nothing, torch.zeros(1, dtype=torch.int32))
        keys, _, lens = cache.append(torch.ones(2, 1, 6), torch.ones(2, 1, 6))
        assert lens.tolist() == [3, 3]
        assert torch.equal(keys, torch.ones(2, 3, 1, 6))

    def test_packed_outputs_do_not_change_with_a_cache(self) -> None:
        layer = Attention(16, 2, window=4)
        x = torch.randn(12, 16)
        cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
        cache = layer.new_cache(3)
        out = layer(x, cu_seqlens=cu_seqlens, cache=cache)
        assert torch.equal(out, layer(x, cu_seqlens=cu_seqlens))
        assert cache.lens.tolist() == [4, 0, 5]
        one = layer.new_cache(1)
        assert torch.equal(layer(x, cache=one), layer(x))
        assert one.lens.tolist() == [12]
        layer(x[:0], cache=one)
        assert one.lens.tolist() == [0]

    def test_refusals(self) -> None:
        layer = Attention(16, 2)
        with pytest.raises(ValueError, match="cu_seqlens: expected 2 documents, got 1"):
            layer(torch.zeros(3, 16), cache=layer.new_cache(2))
        for shape in ((3, 1, 16), (2, 2, 16)):
            with pytest.raises(ValueError, match=r"x: expected shape \(2, 1, 16\) beside a cache"):
                layer(torch.zeros(shape), cache=layer.new_cache(2))


class Uncached(nn.Module):
    """A core as a user writes one: without caches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PatchCore(TINY)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.inner(x, cu_seqlens)


VARIANTS = {
    **RULES,
    "both limits": dataclasses.replace(TINY, patch_rule="fixed", patch_size=7, max_patch_len=3),
    "no layers": dataclasses.replace(TINY, core_layers=0, decoder_layers=0, ngram_sizes=(1,)),
    "a core without caches": TINY,
}


@pytest.fixture(params=VARIANTS, name="model")
def model_of_each_kind(request: pytest.FixtureRequest) -> Iterator[STLM]:
    own = Uncached() if request.param == "a core without caches" else None
    with torch.no_grad():
        yield varied(VARIANTS[request.param], own)


class TestRun:
    def test_hidden_states_of_ragged_rows(self, model: STLM) -> None:
        texts = [
            ids_of(text).tolist() for text in (TEXT, TEXT[7:] + TEXT, TEXT[::-1] * 2, TEXT * 2)
        ]
        shown = [1, 9, 30, 17]
        windows = [text[:n] for text, n in zip(texts, shown, strict=True)]
        run = CachedRun(model, windows)
        assert_same_rows(run.hidden, full_states(model, windows))
        for step in range(25):
            ids = torch.tensor([text[n] for text, n in zip(texts, shown, strict=True)])
            shown = [n + 1 for n in shown]
            # Row 2 ends, row 1 begins anew further on.
            rows = [r for r in range(4) if not (r == 2 and step > 5) and not (r == 1 and step == 8)]
            before = run.hidden.clone()
            run.step(ids, rows)
            if step == 8:
                texts[1] = texts[1][8:]
                shown[1] -= 8
                run.restart([1], [texts[1][: shown[1]]])
                rows = sorted([*rows, 1])
            windows = [text[:n] for text, n in zip(texts, shown, strict=True)]
            expected = full_states(model, [windows[r] for r in rows])
            assert_same_rows(run.hidden[rows], expected)
            if step > 5:
                assert torch.equal(run.hidden[2], before[2])

    def test_greedy_writing_is_that_of_full_runs(self, model: STLM) -> None:
        model.double()  # where rounding decides nothing
        prompts = [b"", b"ab c", TEXT, b"some words and more words " * 2]
        length = TINY.context
        expected = write_greedily(model, seen_ids(prompts), length)
        assert len(set(expected)) == 4
        written = model.generate_batch(prompts, max_new_bytes=length, temperature=0)
        assert written == expected
        copies = model.generate_batch([TEXT] * 10, max_new_bytes=length, temperature=0)
        assert copies == [expected[2]] * 10
        assert model.generate(TEXT, max_new_bytes=12, temperature=0) == expected[2][:12]
        stop = expected[1][5:7]
        stopped = model.generate_batch(prompts, max_new_bytes=length, temperature=0, stop=stop)
        ends = [text.find(stop) for text in expected]
        cut = [t if n < 0 else t[:n] for t, n in zip(expected, ends, strict=True)]
        assert stopped == cut


def test_noise_does_not_depend_on_finished_rows() -> None:
    model, prompts = varied().double(), [b"x", b"and y", b"z"]
    free = model.generate_batch(prompts, max_new_bytes=40, seed=4)
    stop = free[0][3:4]
    assert free[0].index(stop) == 3
    stopped = model.generate_batch(prompts, max_new_bytes=40, seed=4, stop=stop)
    assert stopped == [text.split(stop)[0] for text in free]


@dataclasses.dataclass
class Counted:
    """Count of the rows that a module was shown, by call."""

    rows: list[int]

    @classmethod
    def calls_of(cls, module: nn.Module) -> Counted:
        counted = cls([])
        module.register_forward_hook(lambda _, inputs, __: counted.rows.append(len(inputs[0])))
        return counted


class TestCost:
    @torch.no_grad()
    def test_the_core_runs_once_for_each_closed_patch(self) -> None:
        model = varied(dataclasses.replace(TINY, context=200))
        core = Counted.calls_of(model.core)
        decoder = Counted.calls_of(model.decoder[0])
        prompts = [TEXT, b"word", b""]
        written = model.generate_batch(prompts, max_new_bytes=60, seed=3)
        closing = torch.zeros(3, 60, dtype=torch.bool)
        already = 0
        for row, (prompt, text) in enumerate(zip(prompts, written, strict=True)):
            [seen] = seen_ids([prompt])
            patches = model.patcher(torch.tensor([*seen, *text]))
            closing[row] = (patches.read_ids == patches.patch_ids)[len(seen) :]
            already += int(model.patcher(torch.tensor(seen)).n_patches)
        # The last byte that is written is shown to no layer.
        per_step = closing[:, :-1].sum(0)
        assert core.rows == [already, *per_step[per_step > 0].tolist()]
        assert 0 < len(core.rows) < 60
        assert decoder.rows == [sum(map(len, seen_ids(prompts))), *[3] * 59]

    def test_finished_rows_cost_nothing(self) -> None:
        model, prompts = varied(), [b"x", b"and y", b"z"]
        free = model.generate_batch(prompts, max_new_bytes=12, seed=4)
        decoder = Counted.calls_of(model.decoder[0])
        stop = free[0][3:4]
        model.generate_batch(prompts, max_new_bytes=12, seed=4, stop=stop)
        ends = [text.find(stop) if stop in text else 12 for text in free]
        going = [sum(end >= step for end in ends) for step in range(1, max(ends) + 1)]
        assert decoder.rows[1:] == [n for n in going if n][:11]
        assert min(decoder.rows[1:]) < 3

    def test_rows_that_are_left_out_cost_nothing(self) -> None:
        model = scrambled()
        run = CachedRun(model, [[BOS_ID, 97]] * 3)
        core, decoder = Counted.calls_of(model.core), Counted.calls_of(model.decoder[0])
        run.step(torch.full((3,), 32), [0, 2])
        assert core.rows == decoder.rows == [2]

    @torch.no_grad()
    def test_only_rows_beyond_the_context_are_rebuilt(self) -> None:
        model = scrambled(dataclasses.replace(TINY, context=24))
        decoder = Counted.calls_of(model.decoder[0])
        model.generate_batch([b"x" * 20, b"y"], max_new_bytes=10, seed=3)
        # Row 0 begins with 20 ids; its fifth new byte is one too many.
        rebuilt = decoder.rows.pop(6)
        assert 24 // 4 < rebuilt <= 24 // 2
        assert decoder.rows == [21, 2, 2, 2, 2, 1, 2, 2, 2, 2]

    @torch.no_grad()
    def test_a_core_of_ones_own_runs_when_a_patch_closes(self) -> None:
        model = varied(dataclasses.replace(TINY, context=200), Uncached())
        core = Counted.calls_of(model.core)
        text = model.generate(TEXT, max_new_bytes=40, seed=3)
        patches = model.patcher(torch.tensor([*TEXT, *text]))
        closing = (patches.read_ids == patches.patch_ids)[len(TEXT) : -1]
        already = int(model.patcher(torch.tensor([*TEXT])).n_patches)
        assert len(core.rows) == 1 + int(closing.sum())
        assert core.rows[1:] == sorted(core.rows[1:])
        assert core.rows[0] == already


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_model_of_another_type(self, dtype: torch.dtype) -> None:
        model = scrambled().to(dtype)
        assert len(model.generate(TEXT, max_new_bytes=40, seed=1)) == 40
        if dtype == torch.float64:
            run = CachedRun(model, [ids_of(TEXT).tolist()])
            window = [*ids_of(TEXT).tolist(), 65]
            run.step(torch.tensor([65]), [0])
            with torch.no_grad():
                expected = full_states(model, [window])
            assert_same_rows(run.hidden, expected)

    def test_autocast(self) -> None:
        model = scrambled()
        windows = [ids_of(TEXT)[:n].tolist() for n in range(4, len(TEXT), 4)]
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            run = CachedRun(model, [window[:-1] for window in windows])
            run.step(torch.tensor([window[-1] for window in windows]), [*range(len(windows))])
            expected = full_states(model, windows)
        assert isinstance(run._rows.caches[0], KVCache)
        assert run._rows.caches[0].k.dtype == torch.bfloat16
        with torch.no_grad():
            exact = full_states(scrambled().double(), windows)
        assert_as_right({"states": run.hidden}, {"states": expected}, {"states": exact})

    def test_nothing_is_recorded(self) -> None:
        run = CachedRun(scrambled(), [[BOS_ID, 65]])
        run.step(torch.tensor([66]), [0])
        assert not run.hidden.requires_grad
        assert not run._rows.caches[0].k.requires_grad
