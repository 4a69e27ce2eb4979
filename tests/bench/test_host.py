"""bench.host times calls up to their first launch, here and at another commit, by turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import host
from bench.harness.results import Result

OPS = {"byte_pool", "attention", "decode_attention", "linear_cross_entropy"}


def test_a_turn_times_every_op_of_the_library_in_a_folder() -> None:
    with host.Side(host.ROOT, "host_calls") as side:
        found = side.ask("turn")
    assert set(found) == OPS
    for times in found.values():
        assert len(times) >= 100
        # Below zero where no launch ended the time.
        assert all(0 < x < 1e9 for x in times)


def test_the_library_of_a_commit_is_unpacked(tmp_path: Path) -> None:
    with host.library_of("HEAD", "stlm_kernels") as folder:
        assert (folder / "stlm_kernels" / "_launch.py").is_file()
        assert not (folder / "bench").exists()
    assert not folder.exists()


def test_the_command_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [iter([{"attention": [5000, 3000]}, {"attention": [4000, 9000]}]) for _ in range(2)]

    class Answers:
        def __init__(self, folder: Path, calls: str) -> None:
            self.turns, self.factor = turns.pop(), 1 if folder == host.ROOT else 2

        def __enter__(self) -> Answers:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def ask(self, line: str) -> host.Turn:
            return {op: [x * self.factor for x in times] for op, times in next(self.turns).items()}

    monkeypatch.setattr(host, "Side", Answers)
    path = tmp_path / "host.json"
    assert host.main(["--turns", "2", "--json", str(path), "--commit", "abc"]) == 0
    (row,) = Result.read(path).rows
    assert row == {"op": "attention", "us": 3.5, "other_us": 7.0, "ratio": 0.5}
    assert "attention                 3.5 us, HEAD    7.0 us,  0.50x" in capsys.readouterr().out
