"""Time the Python of a call before its first launch, beside another commit of the library.

No GPU is needed: launches reach no device. Two processes take turns, one with the library of each
commit, and measure CPU time of their thread, so that a busy machine disturbs little; the least of
each turn counts. What triton needs to bind a launch's arguments comes on top.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from stlm_kernels import terminal

from .harness import environment
from .harness.commandline import positive
from .harness.results import Result, add_result_options, command_line, result_path

AIM_US = 30.0
"""What a call may take before its first launch on a quiet machine."""
ROOT = Path(__file__).resolve().parents[1]
HARNESS = Path(__file__).parent / "harness"
CALLS = "import sys; sys.path.append(sys.argv[1]); import host_calls; host_calls.main()"

Turn = dict[str, list[int]]


@contextmanager
def library_of(commit: str) -> Iterator[Path]:
    """Unpack the library of a commit into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "library.tar"
        command = ["git", "-C", str(ROOT), "archive", "-o", str(archive), commit, "stlm_kernels"]
        subprocess.run(command, check=True)
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        yield Path(folder)


class Side:
    """A process that times calls of the library in a folder, turn by turn."""

    def __init__(self, folder: Path) -> None:
        variables = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CALLS, str(HARNESS)], env=variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def turn(self) -> Turn:
        """Return nanoseconds of each call, by op."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("turn", file=self._process.stdin, flush=True)
        found: Turn = json.loads(self._process.stdout.readline())
        return found


def measure(sides: Sequence[Side], turns: int) -> list[dict[str, list[float]]]:
    """Return of each side and op the least microseconds of each turn; sides take turns."""
    found: list[dict[str, list[float]]] = [{} for _ in sides]
    for _ in range(turns):
        for side, least in zip(sides, found, strict=True):
            for op, nanoseconds in side.turn().items():
                least.setdefault(op, []).append(min(nanoseconds) / 1e3)
    return found


def row(op: str, ours: list[float], other: list[float]) -> dict[str, object]:
    """Join both sides of an op; medians over the turns."""
    us, other_us = statistics.median(ours), statistics.median(other)
    return {"op": op, "us": us, "other_us": other_us, "ratio": us / other_us}


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.host", __doc__)
    parser.add_argument("--against", default="HEAD", help="commit to compare with (default: HEAD)")
    parser.add_argument("--turns", type=positive, default=9, help="turns of each (default: 9)")
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "host", parser)
    about = environment.describe(torch.device("cpu"), options.commit)
    with ExitStack() as stack:
        other = stack.enter_context(library_of(options.against))
        sides = [stack.enter_context(Side(folder)) for folder in (ROOT, other)]
        ours, others = measure(sides, options.turns)
    rows = [row(op, ours[op], others[op]) for op in ours]
    summary = [
        f"{x['op']:<22} {x['us']:6.1f} us, {options.against} {x['other_us']:6.1f} us,"
        f" {x['ratio']:5.2f}x"
        for x in rows
    ]
    print(*summary, sep="\n")
    command = command_line("bench.host", arguments)
    Result(command, about, rows, summary, {"aim_us": AIM_US}).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
