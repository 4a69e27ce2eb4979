"""bench.executor times both sides of a case; what it prints fits what it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import executor
from bench.harness.results import Result

pytestmark = pytest.mark.lanes("compiled")


def test_both_sides_of_each_smoke_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "executor.json"
    assert executor.main(["decode_attention", "--json", str(path), "--commit", "abc"]) == 0
    found = Result.read(path)
    assert [row["op"] for row in found.rows] == ["decode_attention"] * len(found.rows)
    for row in found.rows:
        assert len(row["compiled_s"]) == len(row["interpreted_s"]) == executor.RUNS
        assert min(row["compiled_s"]) > 0
        ratio = min(row["interpreted_s"]) / min(row["compiled_s"])
        assert row["times_faster"] == pytest.approx(ratio)
    shown = capsys.readouterr().out
    assert all(line in shown for line in found.summary)
    assert "times faster in the median" in shown
