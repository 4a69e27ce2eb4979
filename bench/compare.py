"""`python -m bench.compare OLD NEW`: fails where a median of ours grew.

Both files are JSON of `pytest bench/`, of the same device. Grown means by more than 5% and by more
than three interquartile ranges of the noisier run: either alone is noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stlm_kernels import terminal

from .report import Record

GROWTH, SPREADS = 1.05, 3


@dataclass(frozen=True)
class Change:
    """One measurement of ours in both files, in seconds."""

    name: str
    old_s: float
    new_s: float
    spread_s: float

    @property
    def grown(self) -> bool:
        return (
            self.new_s > GROWTH * self.old_s and self.new_s - self.old_s > SPREADS * self.spread_s
        )


def changes(old: Path, new: Path) -> tuple[list[Change], list[str]]:
    """What both files measured, and the names of what is gone from the new one.

    Raises:
        ValueError: for a file that is not of `pytest bench/`, or files of two devices.
    """
    before, after = load(old), load(new)
    devices = [found["machine_info"]["stlm"]["device"] for found in (before, after)]
    if devices[0] != devices[1]:
        raise ValueError(f"NEW: expected a file of {devices[0]}, got one of {devices[1]}")
    was, now = dict(_ours(before)), dict(_ours(after))
    found = [_change(name, was[name], now[name]) for name in was if name in now]
    return found, [name for name in was if name not in now]


def load(path: Path) -> dict[str, Any]:
    """What `pytest bench/` wrote.

    Raises:
        ValueError: for a file that it did not write, or that cannot be read.
    """
    try:
        values = json.loads(path.read_text())
        if "stlm" in values["machine_info"] and "benchmarks" in values:
            return values
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON of `pytest bench/`, got {error!r}") from None
    raise ValueError(f"{path}: expected JSON of `pytest bench/`, got another file")


def _ours(results: dict[str, Any]) -> Iterator[tuple[str, Record]]:
    for record in results["benchmarks"]:
        info = record["extra_info"]
        if info["ours"]:
            yield " ".join(info[key] for key in ("op", "case", "dtype", "pass", "entry")), record


def _change(name: str, old: Record, new: Record) -> Change:
    spread = max(old["stats"]["iqr"], new["stats"]["iqr"])
    return Change(name, old["stats"]["median"], new["stats"]["median"], spread)


@terminal.command(on_closed_pipe=1)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("bench.compare", __doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        found, gone = changes(options.old, options.new)
    except ValueError as error:
        parser.error(str(error))
    for change in sorted(found, key=lambda x: x.old_s / x.new_s):
        verdict = "GREW" if change.grown else "ok"
        times = f"{change.old_s * 1e6:9.0f} us -> {change.new_s * 1e6:9.0f} us"
        print(f"{verdict:>4}  {change.new_s / change.old_s:5.2f}x  {times}  {change.name}")
    for name in gone:
        print(f"GONE  {name}")
    grown = sum(change.grown for change in found)
    print(f"{grown} grew, {len(found) - grown} did not, {len(gone)} are gone")
    return 1 if grown or gone or not found else 0


if __name__ == "__main__":
    raise SystemExit(main())
