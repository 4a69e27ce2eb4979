"""Generation: what is drawn, when it ends, what comes out as text, and what lies beyond context."""

from __future__ import annotations

import codecs
import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TINY, scrambled
from helpers.norms import assert_greedy
from torch import Tensor, nn

from stlm_models import STLM
from stlm_models.config import BOS_ID
from stlm_models.generate import _parser, main
from stlm_models.generation.engine import fit_context
from stlm_models.layers.embedding import TiedEmbedding


@pytest.fixture(scope="module", name="model")
def one_model() -> STLM:
    model = scrambled()
    nn.init.normal_(model.embedding.weight, std=0.3)  # flat enough for greedy writing that varies
    return model


@pytest.fixture(scope="module", name="exact")
def one_exact_model(model: STLM) -> STLM:
    """A model in fp64, where rounding decides nothing."""
    return copy.deepcopy(model).double()


class TestGenerate:
    def test_greedy_is_as_likely_as_anything(self, model: STLM) -> None:
        text = model.generate("ab c", max_new_bytes=12, temperature=0)
        logits = model(torch.tensor([*b"ab c", *text[:-1]])).detach()
        assert_greedy(list(text), logits[3:, :256])

    def test_greedy_is_the_argmax_of_a_full_run(self, exact: STLM) -> None:
        model, window = exact, [*b"ab c"]
        expected = bytearray()
        with torch.no_grad():
            for _ in range(12):
                logits = model(torch.tensor(window))[-1, :256]
                window.append(int(logits.argmax()))
                expected.append(window[-1])
        assert model.generate("ab c", max_new_bytes=12, temperature=0) == bytes(expected)
        assert model.generate(b"ab c", max_new_bytes=12, top_k=1, seed=5) == bytes(expected)
        assert model.generate(b"ab c", max_new_bytes=12, top_p=1e-9, seed=5) == bytes(expected)

    def test_seeds(self, model: STLM) -> None:
        texts = [model.generate(b"", max_new_bytes=16, seed=seed) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]
        assert len(texts[0]) == 16
        torch.manual_seed(3)
        first, second = (model.generate(b"", max_new_bytes=16) for _ in range(2))
        torch.manual_seed(3)
        assert first == model.generate(b"", max_new_bytes=16) != second

    def test_ragged_batches(self, exact: STLM) -> None:
        model = exact
        prompts = [b"", "Zoë", b"a longer prompt, with patches"]
        together = model.generate_batch(prompts, max_new_bytes=10, temperature=0)
        alone = [model.generate(prompt, max_new_bytes=10, temperature=0) for prompt in prompts]
        assert together == alone
        copies = model.generate_batch([b"same"] * 10, max_new_bytes=8, temperature=0)
        assert len(set(copies)) == 1
        assert len(set(model.generate_batch([b"same"] * 4, max_new_bytes=8, seed=1))) == 4
        assert model.generate_batch([], max_new_bytes=3) == []

    def test_a_row_does_not_depend_on_when_others_end(self, model: STLM) -> None:
        free = model.generate_batch([b"x", b"y"], max_new_bytes=12, seed=4)
        stopped = model.generate_batch([b"x", b"y"], max_new_bytes=12, seed=4, stop=free[1][3:4])
        end = free[0].find(free[1][3:4])
        assert stopped[0] == (free[0] if end < 0 else free[0][:end])
        assert model.generate(b"x", max_new_bytes=12, seed=4) == free[0]

    def test_special_ids_are_never_drawn(self, model: STLM) -> None:
        class Loving256(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return model.embedding.weight[BOS_ID].expand_as(x)

        model = scrambled()
        nn.init.constant_(model.embedding.weight[BOS_ID], 5.0)
        model.to_output = Loving256()  # type: ignore[assignment]
        assert model(torch.tensor([65]))[-1].argmax() == BOS_ID
        assert len(model.generate(b"", max_new_bytes=4, temperature=0)) == 4

    def test_stop(self, model: STLM) -> None:
        free = model.generate(b"q", max_new_bytes=20, seed=8)
        at = free.find(free[6:8])
        assert model.generate(b"q", max_new_bytes=20, seed=8, stop=free[6:8]) == free[:at]
        both = [b"\x00not there", free[6:8]]
        assert model.generate(b"q", max_new_bytes=20, seed=8, stop=both) == free[:at]
        # A stop inside the prompt ends nothing.
        assert model.generate(b"q", max_new_bytes=3, seed=8, stop=b"q" + free[:1]) == free[:3]

    def test_beyond_context(self, exact: STLM) -> None:
        model = exact
        context = TINY.context
        long = b"some words and more words " * 20
        out = model.generate(long, max_new_bytes=3 * context, temperature=0)
        assert len(out) == 3 * context
        # The end of the prompt decides, its beginning is forgotten.
        assert out[:5] == model.generate(b"xyz " + long, max_new_bytes=5, temperature=0)
        changed = [
            model.generate(long[:-n] + b"Q" + long[len(long) - n + 1 :], max_new_bytes=9, seed=1)
            for n in range(1, 6)
        ]
        assert any(text != model.generate(long, max_new_bytes=9, seed=1) for text in changed)

    def test_the_cut_is_at_a_patch_boundary_in_the_last_half(self, model: STLM) -> None:
        window = [BOS_ID, *b"some words and more words " * 3][: TINY.context + 1]
        cut = fit_context(model, window)
        assert cut == window[-len(cut) :]
        assert TINY.context // 4 < len(cut) <= TINY.context // 2
        starts = model.patcher(torch.tensor(window)).cu_patchlens.tolist()
        assert len(window) - len(cut) in starts
        assert fit_context(model, window[:-1]) == window[:-1]

    def test_a_cut_without_a_boundary(self) -> None:
        config = dataclasses.replace(TINY, patch_rule="fixed", patch_size=500, max_patch_len=None)
        window = list(range(TINY.context + 1))
        assert fit_context(scrambled(config), window) == window[-TINY.context // 2 :]

    def test_mode_is_put_back(self, model: STLM) -> None:
        model.train()
        model.generate(b"", max_new_bytes=1)
        assert model.training
        model.eval()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1.0"),
            ({"temperature": float("nan")}, "temperature: expected a finite number >= 0"),
            ({"top_k": 0}, "top_k: expected an int >= 1, got 0"),
            ({"top_p": 0.0}, r"top_p: expected None or a number in \(0, 1\], got 0.0"),
            ({"max_new_bytes": -1}, "max_new_bytes: expected an int of at least 0, got -1"),
            ({"stop": b""}, "stop: expected None, bytes or a list"),
            ({"stop": "x"}, "stop: expected None, bytes or a list"),
            ({"prompt": [65]}, "prompt: expected bytes or str, got list"),
            ({"prompt": "\udce9"}, "prompt: expected text of whole characters, got"),
        ],
    )
    def test_wrong_arguments(self, model: STLM, arguments: dict[str, Any], message: str) -> None:
        arguments = {"prompt": b"", "max_new_bytes": 1, **arguments}
        with pytest.raises(ValueError, match=message):
            model.generate(**arguments)
        with pytest.raises(ValueError, match=message):
            model.stream(**arguments)
        with pytest.raises(ValueError, match="prompts: expected a list of prompts"):
            model.generate_batch(b"single", max_new_bytes=1)


@pytest.fixture(name="scripted")
def saying_a_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that says what it is told to, whatever it is asked."""

    def build(script: bytes) -> STLM:
        model = STLM(TINY)
        steps = itertools.count()

        def sample(x: Tensor, **_: Any) -> Tensor:
            return torch.full((len(x),), script[next(steps) % len(script)])

        monkeypatch.setattr(model.embedding, "sample", sample)
        return model

    return build


class TestStream:
    def test_chunks_are_whole_characters(self, scripted: Any) -> None:
        script = "Zoë € 𝄞!".encode() + b"\xff\xc3"
        chunks = list(scripted(script).stream(b"", max_new_bytes=len(script)))
        assert chunks == [*"Zoë € 𝄞!", "\ufffd", "\ufffd"]

    def test_a_possible_stop_is_held_back(self, scripted: Any) -> None:
        script = b"one\n\ntwo\n\n\nthree"
        chunks = list(scripted(script).stream(b"", max_new_bytes=len(script), stop=b"\n\n\n"))
        assert chunks == ["o", "n", "e", "\n\nt", "w", "o"]
        told = scripted(script).generate(b"", max_new_bytes=len(script), stop=b"\n\n\n")
        assert told == b"one\n\ntwo"
        ends_open = list(scripted(script).stream(b"", max_new_bytes=4, stop=[b"\nx", b"z"]))
        assert ends_open == ["o", "n", "e", "\n"]

    def test_same_as_generate(self, model: STLM) -> None:
        text = model.generate(b"a", max_new_bytes=40, seed=2)
        chunks = model.stream(b"a", max_new_bytes=40, seed=2)
        assert "".join(chunks) == codecs.decode(text, "utf-8", "replace")


def sample_ids(logits: Tensor, **options: Any) -> Tensor:
    """Ids from hidden states that a table of unit vectors turns into these logits."""
    head = TiedEmbedding(logits.shape[-1], logits.shape[-1])
    head.weight.data = torch.eye(*head.weight.shape)
    return head.sample(logits, **options)


class TestSampling:
    def test_ties_go_to_the_lowest_id(self) -> None:
        logits = torch.tensor([1.0, 3.0, 3.0, 3.0])
        assert sample_ids(logits, temperature=0) == 1
        drawn = {int(sample_ids(logits, top_k=2, seed=seed)) for seed in range(60)}
        assert drawn == {1, 2}
        assert sample_ids(logits, top_k=100, seed=1).shape == ()

    def test_top_p_is_the_smallest_set_with_the_mass(self) -> None:
        logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        for top_p, expected in (
            (0.4, {0}),
            (0.51, {0, 1}),
            (0.8001, {0, 1, 2}),
            (1.0, {0, 1, 2, 3}),
        ):
            rows = logits.expand(4000, 4)
            assert set(sample_ids(rows, top_p=top_p, seed=1).tolist()) == expected

    def test_frequencies(self) -> None:
        logits = torch.randn(5, generator=torch.Generator().manual_seed(0))
        drawn = sample_ids(logits.expand(100_000, 5), temperature=0.7, seed=3)
        shares = torch.bincount(drawn, minlength=5) / 100_000
        expected = (logits / 0.7).softmax(-1)
        assert (shares - expected).abs().max() < 4 * (0.25 / 100_000) ** 0.5

    def test_first_rows_do_not_change_when_rows_are_appended(self) -> None:
        logits = torch.randn(7, 257)
        rows = sample_ids(logits, seed=9)
        assert torch.equal(sample_ids(logits[:1], seed=9), rows[:1])
        assert torch.equal(sample_ids(logits[:4], seed=9), rows[:4])


def test_command_refuses_a_folder_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(tmp_path / "none"), "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: checkpoint: expected one in")
    assert error.count("\n") == 1


def test_flags_for_stops_add_up() -> None:
    common = ["--run", "run"]
    given = _parser().parse_args([*common, "--stop", "a", "b", "--stop", "c", "--stop=-d"])
    assert given.stop == ["a", "b", "c", "-d"]
    assert _parser().parse_args(common).stop == []
