"""bench.executor times both sides of a case; what it prints fits what it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import executor
from bench.harness.results import Result

pytestmark = pytest.mark.lanes("compiled")
LIMIT_MIB = 2048


def test_both_sides_of_each_smoke_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "executor.json"
    assert executor.main(["decode_attention", "--json", str(path), "--commit", "abc"]) == 0
    found = Result.read(path)
    assert [row["op"] for row in found.rows] == ["decode_attention"] * len(found.rows)
    for row in found.rows:
        assert len(row["compiled_s"]) == len(row["interpreted_s"]) == executor.TURNS
        assert min(row["compiled_s"]) > 0
        ratio = min(row["interpreted_s"]) / min(row["compiled_s"])
        assert row["times_faster"] == pytest.approx(ratio)
    shown = capsys.readouterr().out
    assert all(line in shown for line in found.summary)
    assert "times faster in the median" in shown
    assert 0 < found.settings["peak_mib"] < LIMIT_MIB


def test_the_conclusion_counts_what_falls_short() -> None:
    rows = [
        {"compiled_s": [0.3, 0.2], "interpreted_s": [0.8, 0.9], "times_faster": 4.0},
        {"compiled_s": [0.1], "interpreted_s": [0.6], "times_faster": 6.0},
    ]
    said = executor.conclusion(rows, 1500)
    assert said.startswith("median 0.150 s of a core a case, 5.0 times faster in the median")
    assert "4.7 in sum; 1 of 2 cases are less than 5 times faster" in said
    assert said.endswith("largest memory 1,500 MiB")


def test_a_side_that_ends_says_which_case(capfd: pytest.CaptureFixture[str]) -> None:
    message = "decode_attention: the run of smoke case 99"
    with executor.Side("interpreted") as side, pytest.raises(RuntimeError, match=message):
        side.seconds("decode_attention", 99)
    assert "IndexError" in capfd.readouterr().err
