"""Write `bench/RESULTS.md` from the JSON files under `bench/results/`.

The summary of `pytest bench/` is made of the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stlm_kernels import terminal
from stlm_models.files import replace_file

from .harness import targets
from .harness.environment import busy_warning
from .harness.results import Record, Result, is_of_benchmarks, read_json

NAME_WIDTH = 38
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"


def tables(records: Sequence[Record], about: dict[str, Any]) -> Iterator[str]:
    """Yield a table for each op, from the entries of pytest-benchmark's JSON; then the targets.

    Args:
        records: entries of the JSON.
        about: facts of the run; below each table stand the peers that were left out (pairs of op
            and sentence), and those that could not be timed.
    """
    sentences = [(op, f"left out: {sentence}") for op, sentence in about.get("left_out", ())]
    failed = about.get("not_timed", ())
    sentences += [(x["op"], f"not timed: {_name(x)}: {x['reason']}") for x in failed]
    by_op: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        info = record["extra_info"]
        by_op.setdefault(info["op"], {}).setdefault(info["case"], []).append(record)
    for op in dict.fromkeys([*by_op, *(x["op"] for x in failed)]):
        blocks = [f"{op}: median us, spread (IQR), time over our first row's, peak extra MiB"]
        blocks += [
            "\n".join(_case_lines(case, group, {(x["entry"], x["pass"]) for x in failed
                                                if (x["op"], x["case"]) == (op, case)}))
            for case, group in by_op.get(op, {}).items()
        ]  # fmt: skip
        own = [sentence for name, sentence in sentences if name == op]
        yield "\n\n".join([*blocks, *(["\n".join(own)] if own else [])])
    if judged := list(targets.lines(records, about["device"], bool(about.get("gpu_state")))):
        yield "\n".join(judged)


def _name(failed: dict[str, str]) -> str:
    return f"{failed['entry']}, {failed['case']} {failed['pass']}"


def _case_lines(case: str, records: list[Record], failed: set[tuple[str, str]]) -> Iterator[str]:
    passes = list(dict.fromkeys(x["extra_info"]["pass"] for x in records))
    entries = dict.fromkeys([x["extra_info"]["entry"] for x in records] + [x for x, _ in failed])
    found = {(x["extra_info"]["entry"], x["extra_info"]["pass"]): x for x in records}
    ours = next((x["extra_info"]["entry"] for x in records if x["extra_info"]["ours"]), None)
    first = {p: found[ours, p] for p in passes if ours is not None and (ours, p) in found}
    yield f"{case} ({records[0]['extra_info']['dtype']})"
    yield "".join([" " * NAME_WIDTH, *(f"{p:>26}" for p in passes)])
    for entry in entries:
        cells = [
            f"{'failed':>26}"
            if (entry, p) in failed
            else _cell(found.get((entry, p)), first.get(p))
            for p in passes
        ]
        rates = [_bytes_per_s(found.get((entry, p))) for p in passes]
        yield "".join([f"  {entry:<{NAME_WIDTH - 2}}", *cells, *rates])
    shares = [_share(first.get(p)) for p in passes]
    yield "".join([f"  {f'roofline share of {ours}':<{NAME_WIDTH - 2}}", *shares])


def _cell(record: Record | None, ours: Record | None) -> str:
    if record is None:
        return f"{'-':>26}"
    median = record["stats"]["median"]
    spread = f"±{record['stats']['iqr'] / median:.0%}" if median else ""
    ratio = f"{median / ours['stats']['median']:.2f}x" if ours is not None else ""
    mib = record["extra_info"]["peak_bytes"] / 2**20
    return f"{median * 1e6:>9.0f} {spread:>4} {ratio:>5} {mib:>5.0f}"


def _bytes_per_s(record: Record | None) -> str:
    """Format the throughput of a model; ops have none."""
    rate = None if record is None else record["extra_info"].get("bytes_per_s")
    return "" if rate is None else f" {rate:>12,.0f} bytes/s"


def _share(record: Record | None) -> str:
    share = None if record is None else record["extra_info"].get("roofline_share")
    return f"{'-' if share is None else f'{share:.0%}':>26}"


# The page of committed results


def page(folder: Path) -> str:
    """Return Markdown of every JSON file of the folder, the newest first.

    Raises:
        ValueError: for a file that no command of this repository wrote, or a folder without any.
    """
    sections = [_section(path) for path in folder.glob("*.json")]
    if not sections:
        raise ValueError(f"{folder}: expected JSON files in it, got none")
    sections.sort(reverse=True)  # each begins with its date
    head = (
        "# Results\n\nWritten by `python -m bench.report` from the files in `bench/results/`; "
        "edit nothing here.\nEach result names the device that it was measured on."
    )
    return "\n\n".join([head, *(text for _, text in sections)]) + "\n"


def _section(path: Path) -> tuple[str, str]:
    """Return the date of a file and its part of the page."""
    values = read_json(path)
    if is_of_benchmarks(values):
        about, command = values["machine_info"]["stlm"], "pytest bench/ --benchmark-only"
        lines = "\n\n".join(tables(values["benchmarks"], about))
    else:
        result = Result.read(path)
        about, command, lines = result.machine, result.command, "\n".join(result.summary)
    facts = ", ".join(
        f"{key} {about[key]}" for key in ("threads", "torch", "triton", "python") if key in about
    )
    head = f"## `{command}`, {about['date']}\n\n{about['device']}; {facts}; "
    head += f"commit {about['commit']}. Raw: [{path.name}](results/{path.name})"
    return about["date"], "\n\n".join([head, *busy_warning(about), f"```\n{lines}\n```"])


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.report", __doc__)
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of the JSON files (default: bench/results/)",
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="the page to write (default: bench/RESULTS.md)"
    )
    options = parser.parse_args(arguments)
    try:
        replace_file(options.out, page(options.results).encode())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(options.out)


if __name__ == "__main__":
    raise SystemExit(main())
