"""bench.trial: validation text from the training split, changes by name, a line and a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.models import TINY

import stlm_models.presets
from bench import trial
from bench.harness.results import Result
from stlm_models.data.corpus import Corpus

DOCUMENTS = [b"document %03d of the text. " % n * 20 for n in range(60)]
CORPUS = Corpus("texts", [*DOCUMENTS, b"long " * 20_000], [b"never read"])


@pytest.fixture(autouse=True)
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)


def test_the_training_split_is_cut_in_two() -> None:
    found = trial.with_validation(CORPUS, 5_000)
    assert 5_000 <= sum(map(len, found.held_out)) < 6_000
    assert sorted([*found.train, *found.held_out]) == sorted(CORPUS.train)
    assert b"never read" not in found.held_out
    assert all(len(document) < trial.LONGEST_DOCUMENT for document in found.held_out)
    assert trial.with_validation(CORPUS, 5_000).held_out == found.held_out


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match=r"data: expected 40000 bytes .* got 31200"):
        trial.with_validation(CORPUS, 40_000)


def test_changes_of_a_preset() -> None:
    changed = trial.config_with("demo", ["match_sizes=(3, 6)", "unpooling=ema", "context=64"])
    wanted = {"match_sizes": (3, 6), "unpooling": "ema", "context": 64}
    assert changed == dataclasses.replace(TINY, **wanted)
    with pytest.raises(ValueError, match=r"set: expected FIELD=VALUE, got 'context'"):
        trial.config_with("demo", ["context"])
    with pytest.raises(ValueError, match=r"config: .* \['contexts'\]"):
        trial.config_with("demo", ["contexts=64"])


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "load_corpus", lambda data: CORPUS)
    monkeypatch.setattr(trial, "VALIDATION_BYTES", 5_000)
    path = tmp_path / "trial.json"
    arguments = ["--steps", "2", "--set", "context=64", "--options", '{"batch_size": 3}']
    trial.main([*arguments, "--precision", "fp32", "--json", str(path), "--commit", "abc"])
    row = Result.read(path).rows[0]
    assert (row["steps"], row["bytes_read"]) == (2, 2 * 3 * 64)
    assert 0 < row["bits_per_byte"] < 12
    line = f"| {row['bits_per_byte']:.4f} | abc |"
    assert line in capsys.readouterr().out
    for wrong in (["--set", "context"], ["--options", '{"minute": 3}'], ["--options", "{"]):
        with pytest.raises(SystemExit):
            trial.main([*wrong, "--json", str(path), "--commit", "abc"])
