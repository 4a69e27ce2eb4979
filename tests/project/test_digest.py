"""The last screen of a long run: counts, reasons, failures that are alike as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.digest import NO_TIME, digest, file_of


def results(folder: Path, *tests: str) -> Path:
    file = folder / f"{len(list(folder.iterdir()))}.xml"
    cases = "".join(
        f'<testcase classname="tests.kernels.test_a" name="t{k}" time="1.5">{inside}</testcase>'
        for k, inside in enumerate(tests)
    )
    file.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return file


FAILED = '<failure message="out: RMS error {} &gt; 1e-3&#10;a long comparison">text</failure>'
SKIPPED = '<skipped message="{}"/>'


def test_counts_and_failures_that_are_alike(tmp_path: Path) -> None:
    first = results(tmp_path, "", FAILED.format("1.5e-02"), SKIPPED.format("about the kernels"))
    second = results(tmp_path, FAILED.format("7.5e-01"), '<error message="CUDA"/>')
    text, good = digest([first, second])
    assert not good
    lines = text.splitlines()
    assert lines[1].split() == ["test_a", "1", "3", "1", "8"]
    assert lines[2].split() == ["all", "1", "3", "1", "8"]
    assert "    1 skipped: about the kernels" in lines
    assert "    2 failed: out: RMS error # > 1e-3 a long comparison" in lines
    assert "    1 failed: CUDA" in lines
    assert "        as in test_a::t1" in lines


@pytest.mark.parametrize(
    ("classname", "file"),
    [
        ("tests.models.test_words.TestEncode", "test_words"),
        ("bench.bench_ops", "bench_ops"),
        ("test_a", "test_a"),
        ("tests.models.broken", "tests.models.broken"),
    ],
)
def test_a_line_is_named_after_its_file(classname: str, file: str) -> None:
    assert file_of(classname) == file


def test_good_is_that_all_was_begun_and_nothing_failed(tmp_path: Path) -> None:
    passed = results(tmp_path, "", SKIPPED.format("about the kernels"))
    assert digest([passed])[1]
    assert not digest([results(tmp_path, "", SKIPPED.format(NO_TIME))])[1]
    assert not digest([results(tmp_path, SKIPPED.format("the gpu lane needs a CUDA device"))])[1]
    text, good = digest([passed, tmp_path / "cut.xml"])
    assert not good
    assert "no results" in text


def test_a_run_in_which_all_fails_fits_the_screen(tmp_path: Path) -> None:
    many = [FAILED.format(f"of kind {chr(97 + k % 26)}{k}: " + 300 * "x") for k in range(500)]
    text, _ = digest([results(tmp_path, *many)])
    assert len(text) < 12_000
