"""Pictures of the benchmarks: every measurement is in them, and the axes say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plot

pytest.importorskip("matplotlib")

CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}


def record(
    entry: str, direction: str, case: str, median: float, nbytes: int | None, flops: int = 0
) -> dict[str, Any]:
    sizes = {} if nbytes is None else {"bytes": nbytes}
    info = {"op": "byte_pool", "case": case, "pass": direction, "entry": entry, "flops": flops,
            "ours": entry == "triton", **sizes}  # fmt: skip
    stats = {"median": median, "q1": median * 0.9, "q3": median * 1.1}
    return {"extra_info": info, "stats": stats}


RECORDS = [
    record("triton", "bwd", "T9", 2e-6, 1_000_000, 100_000_000),
    record("triton", "fwd", "T9", 1e-6, 1_000_000),
    record("EmbeddingBag", "fwd", "T9", 3e-6, 1_000_000, 50_000_000),
    record("triton", "fwd", "T4", 4e-7, 400_000),
    record("EmbeddingBag", "fwd", "T4", 2e-6, 400_000, 1_000),
]


def results(gpu_state: str, records: list[dict[str, Any]] = RECORDS) -> dict[str, Any]:
    about = {"device": "A GPU", "torch": "2", "commit": "abc", "date": "2026-01-02",
             "gpu_state": gpu_state, "ceilings": CEILINGS}  # fmt: skip
    return {"machine_info": {"stlm": about}, "benchmarks": records}


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(*(x.tolist() for x in line.get_data()), strict=True))
        for line in axes.get_lines()
    }


def test_bars_of_every_case_and_pass() -> None:
    figure = dict(plot.figures(results("")))["byte_pool"]
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("T9", "T4")
    heights = sorted(bar.get_height() for axes in figure.axes for bar in axes.patches)
    assert heights == pytest.approx([0.4, 1, 2, 2, 3])
    assert first.get_ylabel() == "us"
    assert "A GPU" in figure.get_suptitle()


def test_short_bars_do_not_look_longer_than_they_are() -> None:
    """The scale begins at zero, or at a power of ten well below the shortest."""

    def axes_of(*medians: float) -> Any:
        some = [record(f"e{k}", "fwd", "T9", x, 1) for k, x in enumerate(medians)]
        (axes,) = dict(plot.figures(results("", some)))["byte_pool"].axes
        return axes

    assert axes_of(1e-6, 9e-6).get_yscale() == "linear"
    assert axes_of(1e-6, 9e-6).get_ylim()[0] == 0
    assert axes_of(30e-6, 600e-6).get_yscale() == "log"
    assert axes_of(30e-6, 600e-6).get_ylim()[0] == pytest.approx(10)
    assert axes_of(11e-6, 600e-6).get_ylim()[0] == pytest.approx(1)


def test_lines_join_cases_of_one_kind_only() -> None:
    some = [record("triton", "fwd", f"T{n}", n * 1e-6, n) for n in (1, 2, 3, 4)]
    for x, mode in zip(some, ("mean", "max", "mean", "sum"), strict=True):
        x["extra_info"]["sizes"] = {"T": x["extra_info"]["bytes"], "mode": mode}
    (axes,) = dict(plot.figures(results("", some)))["byte_pool-size"].axes
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1, 3]]
    assert "byte_pool-size" not in dict(plot.figures(results("", some[:2])))


def test_time_over_size() -> None:
    forward = {axes.get_title(loc="left"): axes for axes in
               dict(plot.figures(results("")))["byte_pool-size"].axes}["fwd"]  # fmt: skip
    lines = lines_of(forward)
    assert lines["triton"] == [(400_000, pytest.approx(0.4)), (1_000_000, pytest.approx(1.0))]
    assert [x for x, _ in lines["EmbeddingBag"]] == [400_000, 1_000_000]
    assert forward.get_xlabel() == "bytes that the case must move"
    assert forward.get_ylabel() == "us"


def test_roofline_under_the_ceilings_of_the_run() -> None:
    figure = dict(plot.figures(results("550, 1980 MHz")))["roofline"]
    (axes,) = figure.axes
    lines = lines_of(axes)
    assert lines["byte_pool"] == [(100.0, pytest.approx(50.0))]
    assert len(lines["byte_pool, peers"]) == 2
    left, knee, right = lines["ceilings"]
    assert knee == (200.0, pytest.approx(800.0))
    assert left[1] == pytest.approx(left[0] * 4)  # 4 TB/s
    assert (right[0], right[1]) == (400.0, pytest.approx(800.0))
    assert "FLOPs per byte" in axes.get_xlabel()
    assert axes.get_ylabel() == "TFLOP/s"


def test_what_cannot_be_drawn_is_not() -> None:
    """No roofline of a CPU, no line over one size, and none of whole models."""
    assert list(dict(plot.figures(results("", RECORDS[:3])))) == ["byte_pool"]
    models = [record("ours", "step", case, 1e-3, None, 10) for case in ("demo", "10m")]
    assert list(dict(plot.figures(results("550", models)))) == ["byte_pool"]


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(results("550")))
    plot.main([str(path), "--out", str(tmp_path / "pictures")])
    shown = capsys.readouterr().out.split()
    expected = [f"run-{name}.png" for name in ("byte_pool", "byte_pool-size", "roofline")]
    assert [Path(name).name for name in shown] == expected
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected JSON of `pytest bench/`"),
        ('{"benchmarks": [], "machine_info": {}}', "expected JSON of `pytest bench/`"),
        ("[1]", "expected JSON of `pytest bench/`"),
        ("no json", "expected JSON, got"),
        (None, "expected JSON, got FileNotFoundError"),
    ],
)
def test_another_file_is_refused(
    text: str | None, message: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path)])
    assert message in capsys.readouterr().err
