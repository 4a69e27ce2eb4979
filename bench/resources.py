"""Record registers, spills and shared memory of every kernel.

Compiles all kernels at their default configurations for a GPU that need not be here, and writes
`bench/results/kernels-sm90.json`. That takes minutes, so a benchmark run without a GPU shows what
the file holds, with its stamp, and says so where kernels changed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from pathlib import Path

import torch

import stlm_kernels
from stlm_kernels import terminal
from stlm_kernels.inspect import LIMITS, Report, inspect_op, merged, table
from stlm_kernels.registry import OPS

from . import report
from .harness import environment
from .harness.results import Record, Result, add_result_options, command_line

PACKAGE = Path(stlm_kernels.__file__).parent
DTYPE = torch.bfloat16
CODE = ("ptx", "sass")
"""Fields of a report that are no figures."""


def path_of(arch: int) -> Path:
    return report.RESULTS / f"kernels-sm{arch}.json"


def sources_sha256(package: Path = PACKAGE) -> str:
    """Hash every file that holds kernels or their configurations."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        if path.stem in ("config", "_launch") or "@triton.jit" in text:
            digest.update(f"{path.relative_to(package)}\n{text}".encode())
    return digest.hexdigest()


def compiled(ops: Sequence[str], arch: int) -> Iterator[Report]:
    """Compile every launch of the ops' ahead-of-time cases."""
    for name in ops:
        for case in OPS[name].tagged("aot"):
            yield from inspect_op(OPS[name], case, arch, DTYPE)


def rows_of(reports: Sequence[Report]) -> list[Record]:
    return [
        {key: value for key, value in asdict(x).items() if key not in CODE} for x in merged(reports)
    ]


def reports_of(rows: Sequence[Record]) -> list[Report]:
    """Make reports of a file's rows, without the code."""
    return [Report(**row, ptx="", sass="") for row in rows]


def lines(found: Result, sources: str, ops: AbstractSet[str] = OPS.keys()) -> list[str]:
    """Format the table of a file, below its stamp.

    Args:
        found: what the file holds.
        sources: `sources_sha256` of the kernels here.
        ops: whose kernels to show.
    """
    about, rows = found.machine, reports_of(found.rows)
    stamp = (
        f"compiled ahead of time for sm_{rows[0].arch}, bfloat16, triton {about['triton']}, "
        f"commit {about['commit']}, {about['date']}"
    )
    changed = [] if sources == found.settings["sources"] else [CHANGED]
    wanted = [row for row in rows if ops & set(row.ops)]
    return [f"kernels: {stamp}", *changed, *(["", table(wanted)] if wanted else [])]


CHANGED = "KERNELS OR CONFIGURATIONS CHANGED SINCE: run  python -m bench.resources"


def summary(ops: AbstractSet[str] = OPS.keys(), arch: int = 90) -> str:
    """Return the table of the ops' kernels for a run without a GPU."""
    path = path_of(arch)
    if not path.exists():
        return "kernels: not compiled yet: python -m bench.resources"
    return "\n".join(lines(Result.read(path), sources_sha256(), ops))


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.resources", __doc__)
    parser.add_argument(
        "--arch", type=int, default=90, choices=sorted(LIMITS), help="(default: 90)"
    )
    add_result_options(parser, "bench/results/")
    options = parser.parse_args(arguments)
    about = environment.software(torch.device("cpu"), options.commit)
    with_kernels = [name for name, spec in OPS.items() if spec.kernels]
    rows = rows_of(list(compiled(with_kernels, options.arch)))
    sources = sources_sha256()
    found = Result(
        command_line("bench.resources", arguments),
        about,
        rows,
        table(reports_of(rows)).splitlines(),
        {"sources": sources},
    )
    path = options.json or path_of(options.arch)
    found.write(path)
    print("\n".join(lines(found, sources)))
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
