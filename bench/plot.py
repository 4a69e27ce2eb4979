"""`python -m bench.plot FILE...`: one PNG of bars for each op of each benchmark JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Record


def plot_file(path: Path, folder: Path) -> list[Path]:
    """Draw every op of one file: a panel for each case, passes side by side, a bar per entry."""
    results = json.loads(path.read_text())
    about = results["machine_info"]["stlm"]
    by_op: dict[str, dict[str, list[Record]]] = {}
    for record in results["benchmarks"]:
        info = record["extra_info"]
        by_op.setdefault(info["op"], {}).setdefault(info["case"], []).append(record)
    title = f"{about['device']}, torch {about['torch']}, {about['commit']}, {about['date']}"
    return [
        _draw(op, cases, title, folder / f"{path.stem}-{op}.png") for op, cases in by_op.items()
    ]


def _draw(op: str, cases: dict[str, list[Record]], title: str, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(11, 3.2 * len(cases) + 1), squeeze=False, layout="constrained"
    )
    entries = list(dict.fromkeys(x["extra_info"]["entry"] for rs in cases.values() for x in rs))
    for axes, (case, records) in zip(panels[:, 0], cases.items(), strict=True):
        _bars(axes, records, entries)
        axes.set_title(case, fontsize=9, loc="left")
    handles = {
        label: handle
        for axes in panels[:, 0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(f"{op}: median time, spread (IQR), log scale\n{title}", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(axes: Any, records: list[Record], entries: Sequence[str]) -> None:
    passes = list(dict.fromkeys(x["extra_info"]["pass"] for x in records))
    width = 0.85 / len(entries)
    for k, entry in enumerate(entries):
        mine = [x for x in records if x["extra_info"]["entry"] == entry]
        if not mine:
            continue
        places = [passes.index(x["extra_info"]["pass"]) + k * width for x in mine]
        medians = [x["stats"]["median"] * 1e6 for x in mine]
        spreads = [
            [max(0.0, (x["stats"]["median"] - x["stats"]["q1"]) * 1e6) for x in mine],
            [max(0.0, (x["stats"]["q3"] - x["stats"]["median"]) * 1e6) for x in mine],
        ]
        axes.bar(places, medians, width, yerr=spreads, color=f"C{k % 10}", label=entry)
    axes.set_xticks([k + 0.425 - width / 2 for k in range(len(passes))], passes)
    axes.set_yscale("log")
    axes.set_ylabel("us")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON of `pytest bench/`")
    parser.add_argument("--out", type=Path, help="folder of the PNGs (default: beside each file)")
    options = parser.parse_args(arguments)
    for path in options.files:
        for picture in plot_file(path, options.out or path.parent):
            print(picture)


if __name__ == "__main__":
    main()
