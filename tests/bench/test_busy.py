"""bench.busy measures quiet and busy intervals in turns, and says whether enough is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import busy
from bench.harness.results import Result


def test_the_command_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "quiet_chosen": [90.0],
        "busy_chosen": [50.0],
        "quiet_fixed": [100.0],
        "busy_fixed": [9.0],
    }
    monkeypatch.setattr(busy, "measure", lambda *arguments: found)
    path = tmp_path / "busy.json"
    assert busy.main(["demo", "--json", str(path), "--commit", "abc"]) == 0
    result = Result.read(path)
    assert result.command == f"python -m bench.busy demo --json {path} --commit abc"
    assert {row["interval"]: row["share_of_quiet"] for row in result.rows}["busy_chosen"] == 0.5
    assert "busy_fixed             9 bytes/s    9% of quiet" in capsys.readouterr().out
    found["busy_chosen"] = [39.0]
    assert busy.main(["demo", "--json", str(path), "--commit", "abc"]) == 1
    assert "MISSED: at least 40%" in capsys.readouterr().out


def test_intervals_of_both_loads_and_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every interval is there, and the other processes end with theirs."""
    alive: list[int] = []

    class Spinner:
        def __init__(self, command: list[str]) -> None:
            alive.append(1)

        def kill(self) -> None:
            alive.pop()

        def wait(self) -> None:
            pass

    seen: list[tuple[int, bool]] = []

    def interval(trainer: object, seconds: float, threads: object) -> float:
        seen.append((len(alive), threads is not None))
        return 1.0

    monkeypatch.setattr(busy.subprocess, "Popen", Spinner)
    monkeypatch.setattr(busy, "interval", interval)
    rates = busy.measure(_NoTrainer(), turns=2, seconds=0.0, taken=1)  # type: ignore[arg-type]
    assert seen == [(0, True), (1, True), (0, False), (1, False)] * 2
    assert {name: len(each) for name, each in rates.items()} == dict.fromkeys(rates, 2)


class _NoTrainer:
    loader = type("Loader", (), {"close": lambda self: None})()

    def train_step(self) -> None:
        pass
