"""bench.generation_speed writes with one model by the library of two commits, by turns."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.models import TINY

import stlm_models.presets
from bench import generation_speed
from bench.harness import commits, generation_calls, llama_calls, turns
from bench.harness.results import Result

SETTINGS = {"preset": "demo", "batch_size": 3, "new_bytes": 5, "threads": 1}


def answers_of(calls: object, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)
    monkeypatch.setattr(turns.torch, "set_num_threads", lambda n: None)
    said = io.StringIO()
    monkeypatch.setattr(turns.sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setattr(turns.sys, "stdout", said)
    calls.main()  # type: ignore[attr-defined]
    return [json.loads(line) for line in said.getvalue().splitlines()]


def test_turns_of_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    config, *steps, peak = answers_of(
        generation_calls,
        [json.dumps({**SETTINGS, "config": None}), "step", "step", "peak"],
        monkeypatch,
    )
    assert config == json.loads(json.dumps(TINY.to_dict()))
    assert isinstance(peak, int)
    assert peak > 2**20
    for step in steps:
        assert isinstance(step, dict)
        assert step["n_bytes"] == 3 * 5
        assert step["cpu_seconds"] > 0


def test_the_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    flat = {**TINY.to_dict(), "byte_dim": 16, "decoder_heads": 2, "decoder_kv_heads": 2}
    lines = [json.dumps({**SETTINGS, "config": flat}), "step"]
    n_parameters, step = answers_of(llama_calls, lines, monkeypatch)
    assert isinstance(n_parameters, int)
    assert n_parameters > 16 * 256
    assert isinstance(step, dict)
    assert step["n_bytes"] == 3 * 5


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = llama_calls.padded([b"ab", b"c"])
    assert ids.tolist() == [[97, 98], [0, 99]]
    assert mask.tolist() == [[1, 1], [0, 1]]


class Answers:
    """A side of which every turn takes one CPU second more than the last, and half that here."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, folder: Path, calls: str) -> None:
        here = "here" if folder == commits.ROOT else "other"
        self.name = "llama" if calls == "llama_calls" else here
        self.steps = 0

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def ask(self, line: str) -> object:
        self.asked.append((self.name, line))
        if line == "peak":
            return (3 if self.name == "here" else 4) * 2**20
        if line != "step":
            return {"byte_dim": 8}
        self.steps += 1
        seconds = self.steps / {"here": 3, "other": 1, "llama": 2}[self.name]
        return {"n_bytes": 60, "seconds": 2 * seconds, "cpu_seconds": seconds}


def test_the_command_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation_speed, "Side", Answers)
    monkeypatch.setattr(generation_speed, "has_transformers", lambda: True)
    path = tmp_path / "speed.json"
    arguments = ["--steps", "2", "--batch-size", "1", "4", "--llama", "--commit", "abc"]
    assert generation_speed.main([*arguments, "--json", str(path)]) == 0
    settings = [json.loads(line) for _, line in Answers.asked if line.startswith("{")]
    assert [each["batch_size"] for each in settings] == [1, 1, 1, 4, 4, 4]
    assert [each["config"] for each in settings[:2]] == [None, {"byte_dim": 8}]
    assert settings[2]["config"]["patch_rule"] == "none"
    names = [name for name, line in Answers.asked if line == "step"]
    assert names == ["other", "here", "llama"] * 6
    other, here, llama = Result.read(path).rows[:3]
    assert [row["commit"] for row in (other, here, llama)] == ["HEAD", "here", "Llama"]
    # Turns of 2 and 3 seconds count: the first one warms up.
    assert (other["bytes_per_cpu_second"], here["bytes_per_second"]) == (24, 36)
    said = capsys.readouterr().out
    assert "3.00 times the speed, 3.00 by CPU time, 0.75 of the peak" in said
    assert "and of the Llama:  1.50 times the speed" in said


def test_a_llama_needs_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation_speed, "has_transformers", lambda: False)
    with pytest.raises(SystemExit) as ended:
        generation_speed.main(["--llama"])
    assert ended.value.code == 2
    assert "--llama: expected transformers installed" in capsys.readouterr().err
