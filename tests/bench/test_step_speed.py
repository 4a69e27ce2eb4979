"""bench.step_speed trains one model with the library of two commits, by turns."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.models import TINY

import stlm_models.presets
from bench import step_speed
from bench.harness import commits, step_calls, turns
from bench.harness.results import Result
from stlm_models.data.corpus import Corpus

SETTINGS = {"preset": "demo", "batch_size": 2, "precision": "fp32", "threads": 1}


def test_a_process_imports_the_library_of_its_folder(tmp_path: Path) -> None:
    """Another folder's package than that of the folder that the command was started in."""
    (tmp_path / "stlm_kernels").mkdir()
    (tmp_path / "stlm_kernels" / "__init__.py").write_text("raise SystemExit('the other one')")
    with (
        commits.Side(tmp_path, "host_calls") as side,
        pytest.raises(RuntimeError, match="process: expected an answer to 'turn'"),
    ):
        side.ask("turn")


def test_a_process_finds_nothing_that_its_folder_lacks(tmp_path: Path) -> None:
    """An editable installation would fill in what is new since the other commit."""
    for name, code in (
        ("stlm_kernels", "import stlm_models"),
        (
            "stlm_models",
            "import importlib.util\n"
            "found = importlib.util.find_spec('stlm_models.training')\n"
            "print(int(found is None), flush=True)\n",
        ),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    with commits.Side(tmp_path, "host_calls") as side:
        assert side.ask("anything") == 1


def answers_of(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    corpus = Corpus("texts", [b"a text to train on. " * 99], [b"none"])
    monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)
    monkeypatch.setattr(step_calls, "load_corpus", lambda paths: corpus)
    monkeypatch.setattr(turns.torch, "set_num_threads", lambda n: None)
    said = io.StringIO()
    monkeypatch.setattr(turns.sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setattr(turns.sys, "stdout", said)
    step_calls.main()
    return [json.loads(line) for line in said.getvalue().splitlines()]


def test_steps_of_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    config, *steps, peak = answers_of(
        [json.dumps({**SETTINGS, "config": None}), "step", "step", "peak"], monkeypatch
    )
    assert config == json.loads(json.dumps(TINY.to_dict()))
    assert isinstance(peak, int)
    assert peak > 2**20
    for step in steps:
        assert isinstance(step, dict)
        assert step["n_bytes"] == 2 * TINY.context
        assert step["cpu_seconds"] > 0
    # A config that another commit gave is trained, without fields that mean nothing here.
    given = {**TINY.to_dict(), "context": 16, "patch_capacity": None}
    _, step = answers_of([json.dumps({**SETTINGS, "config": given}), "step"], monkeypatch)
    assert isinstance(step, dict)
    assert step["n_bytes"] == 2 * 16


def test_a_config_that_is_not_known_here() -> None:
    with pytest.raises(ValueError, match=r"config: .* got also \['patch_capacity'\]"):
        turns.known({"patch_capacity": 7, "byte_dim": 8})


class Answers:
    """A side of which every step takes one CPU second more than the last, and half that here."""

    asked: ClassVar[list[tuple[bool, str]]] = []

    def __init__(self, folder: Path, calls: str) -> None:
        assert calls == "step_calls"
        self.is_here, self.steps = folder == commits.ROOT, 0

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def ask(self, line: str) -> object:
        self.asked.append((self.is_here, line))
        if line == "peak":
            return (3 if self.is_here else 4) * 2**20
        if line != "step":
            return {"byte_dim": 8}
        self.steps += 1
        seconds = self.steps / (2 if self.is_here else 1)
        return {"n_bytes": 60, "loss": 1.0, "seconds": 2 * seconds, "cpu_seconds": seconds}


def test_the_command_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_speed, "Side", Answers)
    path = tmp_path / "speed.json"
    arguments = ["--steps", "2", "--precision", "fp32", "--threads", "1", "--commit", "abc"]
    assert step_speed.main([*arguments, "--json", str(path)]) == 0
    settings, given = (json.loads(line) for _, line in Answers.asked[:2])
    assert (settings["config"], given["config"]) == (None, {"byte_dim": 8})
    assert [here for here, line in Answers.asked if line == "step"] == [False, True] * 3
    other, here = Result.read(path).rows
    assert (other["commit"], here["commit"]) == ("HEAD", "here")
    # Steps of 2 and 3 seconds count: the first one warms up.
    assert (other["bytes_per_cpu_second"], here["bytes_per_second"]) == (24, 24)
    said = capsys.readouterr().out
    assert "2.00 times the speed, 2.00 by CPU time, 0.75 of the peak" in said
