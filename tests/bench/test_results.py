"""Published figures: the page of results, and the figures of the pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.harness.results import Result

ROOT = Path(__file__).parents[2]
RAW = re.compile(r"bench/results/[\w.-]+\.json")
FIGURE = re.compile(  # an option such as median:5% is none
    r"(?<![\w.:])(\d[\d,]*(?:\.\d+)?)\s*"
    r"(?:x\b|%|us\b|ms\b|[MG]iB\b|GB/s|TFLOP/s|bits per byte|bytes/s|times|held-out bytes)"
)
DECIMAL = re.compile(
    r"(?<![\w.])(\d{1,3}\.\d{3,})(?!\w)"
)  # as of bits per byte, named once a sentence


# The page


def test_the_page_is_what_the_files_say() -> None:
    assert report.PAGE.read_text() == report.page(report.RESULTS), "run  python -m bench.report"


def test_both_kinds_of_files_have_their_lines(tmp_path: Path) -> None:
    machine = {"device": "A", "date": "2026-01-02", "commit": "abc", "threads": 1}
    rows = [{"name": "core", "seconds": 0.25}]
    Result("python -m bench.step demo", machine, rows, ["core 250.00 ms"]).write(
        tmp_path / "step.json"
    )
    run = {"machine_info": {"stlm": machine | {"date": "2026-01-03"}}, "benchmarks": []}
    (tmp_path / "bench.json").write_text(json.dumps(run))
    text = report.page(tmp_path)
    first = text.index("## `pytest bench/ --benchmark-only`, 2026-01-03")
    assert first < text.index("## `python -m bench.step demo`, 2026-01-02")
    assert "core 250.00 ms" in text
    assert "commit abc" in text


@pytest.mark.parametrize("values", [{"fast": True}, {"command": "x", "rows": []}, [1], 3])
def test_a_foreign_file_is_refused(tmp_path: Path, values: Any) -> None:
    (tmp_path / "notes.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"notes\.json: expected a result of a command"):
        report.page(tmp_path)


@pytest.mark.parametrize("text", [None, "no json"])
def test_nothing_to_show_leaves_the_page_as_it_was(
    text: str | None, tmp_path: Path, capsys: Any
) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    out = tmp_path / "page.md"
    with pytest.raises(SystemExit, match="2"):
        report.main(["--results", str(tmp_path), "--out", str(out)])
    assert "expected JSON" in capsys.readouterr().err
    assert not out.exists()


# Figures of the pages


def paragraphs(text: str) -> list[str]:
    """Split at empty lines, code left out."""
    return re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def numbers(values: Any) -> Iterator[float]:
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from numbers(value)
    elif isinstance(values, int | float):
        yield float(values)
    elif isinstance(values, str):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?", values))


def unfounded(text: str, root: Path) -> list[str]:
    """Figures of a text that no file named in their paragraph holds."""
    found = []
    for paragraph in paragraphs(text):
        quoted = [*FIGURE.findall(paragraph), *DECIMAL.findall(RAW.sub("", paragraph))]
        measured = [
            x
            for name in RAW.findall(paragraph)
            for x in numbers(json.loads((root / name).read_text()))
        ]
        for figure in quoted:
            digits = len(figure.partition(".")[2])
            value = float(figure.replace(",", ""))
            if not any(round(x, digits) == value for x in measured):
                found.append(figure)
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_every_figure_of_a_page_is_in_a_file_that_it_names(page: str) -> None:
    assert unfounded((ROOT / page).read_text(), ROOT) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("2.50x faster, see bench/results/a.json", []),
        ("peak 1,024 MiB, see bench/results/a.json", []),
        ("2.51x faster, see bench/results/a.json", ["2.51"]),
        ("2.50x faster.\n\nRaw data in bench/results/a.json", ["2.50"]),
        ("takes 12 us", ["12"]),
        ("models of 10M parameters, V = 257, 64 rows", []),
    ],
)
def test_a_figure_without_a_run_is_found(tmp_path: Path, text: str, wrong: list[str]) -> None:
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/a.json").write_text(json.dumps({"x": [2.4999], "mib": 1024}))
    assert sorted(set(unfounded(text, tmp_path))) == wrong
