"""Baselines at equal minutes: each is charged its own steps, all are compared per real byte."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import pytest
import torch
from helpers.models import TINY

import stlm_models.presets
from bench import baselines, report
from bench.harness.results import Result
from stlm_models import ModelConfig, bits_per_byte
from stlm_models.checkpoint import load_checkpoint
from stlm_models.data.corpus import Corpus, load_corpus
from stlm_models.training.trainer import StepResult, Trainer, TrainOptions

TEXT = b"the cat sat on the mat, and the dog sat by the door: it was wet. " * 40
CORPUS = Corpus("sentences", [TEXT, b"a rat ran off. "], [b"the dog sat on the cat. " * 9])
FLAT = dataclasses.replace(
    TINY, patch_rule="none", core_layers=0, ngram_sizes=(), decoder_window=None
)
WORD = dataclasses.replace(FLAT, tokens="words", vocab_size=300)
TINIES = {"demo": TINY, "demo-flat": FLAT, "demo-word": WORD}


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in TINIES.items():
        monkeypatch.setitem(stlm_models.presets.PRESETS, name, config)


def contender(name: str, config: ModelConfig = TINY, minutes: float = 1.0) -> baselines.Contender:
    return baselines.Contender(
        name, Trainer(config, CORPUS, TrainOptions(minutes=minutes, batch_size=2))
    )


class FakeSteps:
    """Steps that take a fixed time on a clock of their own, and do nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[ModelConfig, float]) -> None:
        self.now, self.seconds = 100.0, seconds
        self.order: list[ModelConfig] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        fake = self

        def train_step(trainer: Trainer) -> StepResult:
            fake.now += fake.seconds[trainer.config]
            fake.order.append(trainer.config)
            trainer.step += 1
            return StepResult(torch.tensor(trainer.step * math.log(2)), 10)

        monkeypatch.setattr(Trainer, "train_step", train_step)


class TestEqualMinutes:
    def test_each_is_charged_its_own_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        FakeSteps(monkeypatch, {TINY: 0.5, FLAT: 2.0, WORD: 7.0})
        all_three = [contender(name, config) for name, config in TINIES.items()]
        baselines.compete(all_three, turn_seconds=5.0)
        seconds = [each.trainer.seconds for each in all_three]
        assert seconds == [60.0, 60.0, 63.0]  # the step that crosses the line is the last
        assert [each.trainer.step for each in all_three] == [120, 30, 9]
        assert [each.n_bytes for each in all_three] == [1200, 300, 90]

    def test_all_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeSteps(monkeypatch, {TINY: 1.0, FLAT: 2.0})
        both = [contender("a", TINY, 0.1), contender("b", FLAT, 0.1)]
        baselines.compete(both, turn_seconds=3.0)
        assert fake.order == [TINY] * 3 + [FLAT] * 2 + [TINY] * 3 + [FLAT]

    def test_what_happens_between_turns_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeSteps(monkeypatch, {TINY: 1.0})
        each = contender("a")
        for turn in range(1, 4):
            each.turn(5.0)
            fake.now += 1000.0
            assert each.trainer.seconds == 5.0 * turn

    @pytest.mark.parametrize("seconds", [0.0, 1e-9])
    def test_a_turn_makes_a_step(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        FakeSteps(monkeypatch, {TINY: 1.0})
        each = contender("a")
        each.turn(seconds)
        assert each.trainer.step == 1

    def test_the_curve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        FakeSteps(monkeypatch, {TINY: 1.0})
        each = contender("a")
        each.turn(2.0)
        each.turn(3.0)
        assert each.curve == [
            {"step": 2, "seconds": 2.0, "bytes": 20, "bits_per_byte": 1.5},
            {"step": 5, "seconds": 5.0, "bytes": 50, "bits_per_byte": 4.0},
        ]


class TestWordTrainer:
    def test_steps_count_real_bytes(self) -> None:
        trainer = Trainer(WORD, CORPUS, TrainOptions(steps=400, batch_size=2))
        assert trainer.words is not None
        read = sum(trainer.train_step().n_bytes for _ in range(40))
        batches = [trainer.windows.batch(step).byte_ids.numpy() for step in range(40)]
        ids = [x for batch in batches for x in batch.tolist() if x != 256]
        real = sum(1 if x < 256 else len(trainer.words.words[x - 257]) for x in ids)
        assert read == pytest.approx(real, rel=0.05)
        assert real > 3 * len(ids)

    def test_losses_are_per_byte(self) -> None:
        """The first step costs ln V for each id, since the model knows nothing."""
        trainer = Trainer(WORD, CORPUS, TrainOptions(steps=400, batch_size=2))
        assert trainer.words is not None
        n_ids = sum(len(trainer.words.encode(document)) for document in CORPUS.train)
        n_bytes = sum(map(len, CORPUS.train))
        loss = float(trainer.train_step().loss)
        assert loss == pytest.approx(math.log(WORD.vocab_size) * n_ids / n_bytes, rel=1e-4)

    def test_bits_need_the_words(self) -> None:
        trainer = Trainer(WORD, CORPUS, TrainOptions(steps=400, batch_size=2))
        with pytest.raises(ValueError, match="vocabulary: expected the words of a word model"):
            bits_per_byte(trainer.model, TEXT)
        assert trainer.words is not None
        with pytest.raises(ValueError, match="vocabulary: expected None"):
            bits_per_byte(contender("a").trainer.model, TEXT, vocabulary=trainer.words)

    def test_a_run_goes_on_with_its_words(self, tmp_path: Path) -> None:
        options = TrainOptions(steps=4, batch_size=2)
        trainer, straight = (Trainer(WORD, CORPUS, options) for _ in range(2))
        trainer.train_step()
        trainer.save(tmp_path)
        resumed = Trainer.resume(load_checkpoint(tmp_path), CORPUS, options)
        assert resumed.words == trainer.words
        for _ in range(2):
            straight.train_step()
        resumed.train_step()
        a, b = resumed.model.state_dict(), straight.model.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)
        foreign = dataclasses.replace(load_checkpoint(tmp_path), words=None)
        with pytest.raises(ValueError, match="checkpoint: expected the words that its data makes"):
            Trainer.resume(foreign, CORPUS, options)


def test_rows_of_words_hold_as_many_bytes() -> None:
    config = baselines.config_of("demo-word", CORPUS, window_bytes=64)
    trainer = Trainer(config, CORPUS, TrainOptions(steps=1, batch_size=2))
    assert config.context * trainer.bytes_per_id == pytest.approx(64, rel=0.05)
    assert baselines.config_of("demo-flat", CORPUS, window_bytes=64) == FLAT


def test_rates_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "load_corpus", lambda data, **_: CORPUS)
    words = ["--rates", "0.02/0.004", "0.1/1", "--precision", "fp32"]
    _, found = baselines.contenders_of(baselines._parser().parse_args(words))
    rates = [(each.trainer.options.muon_lr, each.trainer.options.adamw_lr) for each in found]
    assert rates == 3 * [(0.02, 0.004), (0.1, 1.0)]
    assert found[-1].name == "demo-word@0.1/1"


def test_first_bytes() -> None:
    assert baselines.first_bytes([b"abc", b"defg", b"h"], 5) == [b"abc", b"de"]
    assert baselines.first_bytes([b"abc"], 9) == [b"abc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "preset: expected one of"),
        (["--minutes", "0"], "minutes: expected more than 0"),
        (["--judge-bytes", "0"], "judge-bytes: expected at least 1, got 0"),
        (["--rates", "0.02"], "argument --rates: expected MUON/ADAMW, got '0.02'"),
        (["--data", "/nowhere/at/all"], "data: expected a file"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        baselines, "load_corpus", lambda data, **_: load_corpus(data) if data else CORPUS
    )
    with pytest.raises(SystemExit):
        baselines.main([*arguments, "--precision", "fp32", "--commit", "abc"])
    assert message in capsys.readouterr().err


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT)
    out = tmp_path / "results" / "baselines.json"
    arguments = ["--minutes", "0.005", "--turn", "0.1", "--batch-size", "2", "--precision", "fp32"]
    baselines.main([*arguments, "--data", str(text), "--json", str(out), "--commit", "abc"])
    result = Result.read(out)
    assert [row["model"] for row in result.rows] == [*TINIES]
    for found in result.rows:
        assert found["seconds"] >= 0.3
        assert 0 < found["bits_per_byte"] < 9
        assert found["bytes_read"] == found["curve"][-1]["bytes"] > 0
        assert found["held_out_bytes"] == len(TEXT) // 10
        assert (found["muon_lr"], found["adamw_lr"]) == baselines.RATES[
            found["model"].removeprefix("demo")
        ]
    assert result.machine["commit"] == "abc"
    shown = capsys.readouterr().out
    assert "bits per byte of training: demo " in shown
    for line in baselines.table(result.rows):
        assert line in shown
        assert line in report.page(out.parent)
