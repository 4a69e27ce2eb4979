"""Draw the JSON of `pytest bench/` as PNG.

Bars of every case for each op, and time over size where it has several; for a GPU's file the
roofline as well, under the ceilings that the same run measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stlm_kernels import terminal
from stlm_models.files import write_png

from .harness.results import Record, read_benchmarks

MOST_LINEAR = 10
"""Times the shortest bar that the longest may have before a panel is logarithmic."""

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_file(path: Path, folder: Path) -> list[Path]:
    """Draw one benchmark JSON into a folder; return the pictures' paths.

    Raises:
        ValueError: for a file that `pytest bench/` did not write.
    """
    results = read_benchmarks(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(results):
        written.append(folder / f"{path.stem}-{name}.png")
        write_png(written[-1], figure, dpi=110)
    return written


def figures(results: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) of everything that the results of one run can show."""
    about, records = results["machine_info"]["stlm"], results["benchmarks"]
    title = f"{about['device']}, torch {about['torch']}, {about['commit']}, {about['date']}"
    for op, group in _grouped(records, "op").items():
        yield op, bars(op, group, title)
        if sized := list(_of_several_sizes(group)):
            yield f"{op}-size", over_size(op, sized, title)
    counted = [x for x in records if x["extra_info"].get("bytes") and x["extra_info"].get("flops")]
    if about["gpu_state"] and about["ceilings"] and counted:
        yield "roofline", roofline(counted, about["ceilings"], title)


def _grouped(records: Sequence[Record], key: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["extra_info"][key], []).append(record)
    return groups


def _of_several_sizes(records: Sequence[Record]) -> Iterator[Record]:
    """Yield records of cases that differ in numbers only, so that a line can join them."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "bytes" in record["extra_info"]:
            groups.setdefault((record["extra_info"]["pass"], _kind(record)), []).append(record)
    for group in groups.values():
        if len({_bytes(x) for x in group}) > 1:
            yield from group


def _kind(record: Record) -> str:
    """Return the parts of a case that are not numbers: modes, kinds of text and boundaries."""
    sizes = record["extra_info"].get("sizes", {})
    return "-".join(str(x) for x in sizes.values() if not isinstance(x, int | float))


def _figure(rows: int, height: float) -> tuple[Figure, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height * rows + 1), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _legend(figure: Figure) -> None:
    """Add one legend for all panels, each label once."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)


# Bars


def bars(op: str, records: list[Record], title: str) -> Figure:
    """Draw a panel for each case, passes side by side, a bar per entry."""
    cases = _grouped(records, "case")
    figure, panels = _figure(len(cases), 3.2)
    entries = list(_grouped(records, "entry"))
    for axes, (case, group) in zip(panels, cases.items(), strict=True):
        _bars(axes, group, entries)
        axes.set_title(case, fontsize=9, loc="left")
    figure.suptitle(f"{op}: median time, spread (IQR)\n{title}", fontsize=9)
    _legend(figure)
    return figure


def _bars(axes: Any, records: list[Record], entries: Sequence[str]) -> None:
    passes = list(_grouped(records, "pass"))
    width = 0.85 / len(entries)
    for k, entry in enumerate(entries):
        group = [x for x in records if x["extra_info"]["entry"] == entry]
        if not group:
            continue
        offsets = [passes.index(x["extra_info"]["pass"]) + k * width for x in group]
        medians = [x["stats"]["median"] * 1e6 for x in group]
        spreads = [
            [max(0.0, (x["stats"]["median"] - x["stats"]["q1"]) * 1e6) for x in group],
            [max(0.0, (x["stats"]["q3"] - x["stats"]["median"]) * 1e6) for x in group],
        ]
        axes.bar(offsets, medians, width, yerr=spreads, color=f"C{k % 10}", label=entry)
    axes.set_xticks([k + 0.425 - width / 2 for k in range(len(passes))], passes)
    _scale(axes, [x["stats"]["median"] * 1e6 for x in records])
    axes.set_ylabel("us")


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Start at zero, or, where the short bars would vanish, use a log scale from a power of ten."""
    if max(values) > MOST_LINEAR * min(values):
        axes.set_yscale("log")
        axes.set_ylim(bottom=10.0 ** math.floor(math.log10(min(values) / 2)))
    else:
        axes.set_ylim(bottom=0)


# Time over size


def over_size(op: str, records: list[Record], title: str) -> Figure:
    """Draw a panel for each pass, a line per entry and kind over the bytes of the case."""
    passes = _grouped(records, "pass")
    figure, panels = _figure(len(passes), 3.2)
    colours = {entry: f"C{k % 10}" for k, entry in enumerate(_grouped(records, "entry"))}
    for axes, (direction, group) in zip(panels, passes.items(), strict=True):
        for entry, points in _grouped(group, "entry").items():
            style = "o-" if points[0]["extra_info"]["ours"] else "x--"
            for kind in dict.fromkeys(map(_kind, points)):
                some = sorted((x for x in points if _kind(x) == kind), key=_bytes)
                sizes, medians = map(_bytes, some), (x["stats"]["median"] * 1e6 for x in some)
                axes.loglog(list(sizes), list(medians), style, color=colours[entry], label=entry)
        axes.set_title(direction, fontsize=9, loc="left")
        axes.set_xlabel("bytes that the case must move")
        axes.set_ylabel("us")
    figure.suptitle(f"{op}: median time over size, log scales\n{title}", fontsize=9)
    _legend(figure)
    return figure


def _bytes(record: Record) -> int:
    return record["extra_info"]["bytes"]


# Roofline


def roofline(records: list[Record], ceilings: dict[str, float], title: str) -> Figure:
    """Draw achieved FLOP/s over FLOPs per byte."""
    copy, matmul = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    figure, (axes,) = _figure(1, 7)
    knee = matmul / copy
    reach = [*(_intensity(x) for x in records), knee]
    ends = [min(reach) / 2, knee, max(reach) * 2]
    axes.loglog(ends, [min(matmul, x * copy) / 1e12 for x in ends], "k-", label="ceilings")
    for k, (op, group) in enumerate(_grouped(records, "op").items()):
        for ours, style in ((True, "o"), (False, "x")):
            some = [x for x in group if x["extra_info"]["ours"] is ours]
            label = op if ours else f"{op}, peers"
            _points(axes, some, style, f"C{k % 10}", label)
    axes.set_xlabel("FLOPs per byte that the case must move")
    axes.set_ylabel("TFLOP/s")
    rates = f"copy {copy / 1e9:.0f} GB/s, matmul {matmul / 1e12:.0f} TFLOP/s of the same run"
    figure.suptitle(f"roofline: {rates}\n{title}", fontsize=9)
    _legend(figure)
    return figure


def _points(axes: Any, records: list[Record], style: str, colour: str, label: str) -> None:
    if records:
        rates = [x["extra_info"]["flops"] / x["stats"]["median"] / 1e12 for x in records]
        axes.loglog([*map(_intensity, records)], rates, style, color=colour, label=label)


def _intensity(record: Record) -> float:
    return record["extra_info"]["flops"] / record["extra_info"]["bytes"]


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.plot", __doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON of `pytest bench/`")
    parser.add_argument("--out", type=Path, help="folder of the PNGs (default: beside each file)")
    options = parser.parse_args(arguments)
    try:
        for path in options.files:
            for picture in plot_file(path, options.out or path.parent):
                print(picture)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    raise SystemExit(main())
