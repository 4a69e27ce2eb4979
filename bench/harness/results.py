"""Result files: every command writes the same form, which one reader reads."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stlm_models.files import replace_file, require_writable

Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Measurements of one run of a command.

    Args:
        command: the command line.
        machine: device, versions, commit and date, from `environment.describe`.
        rows: one flat record for each thing that was measured; a series is a list in its record.
        summary: the lines that the command printed about its rows.
        settings: whatever else decides the figures, such as the corpus.
    """

    command: str
    machine: Record
    rows: list[Record]
    summary: list[str]
    settings: Record = field(default_factory=dict)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what `write` wrote.

        Raises:
            ValueError: the file cannot be read, or holds something else.
        """
        values = read_json(path)
        try:
            return cls(**values)
        except TypeError:
            raise ValueError(
                f"{path}: expected a result of a command of this repository, got another file"
            ) from None


def read_benchmarks(path: Path) -> Record:
    """Read the JSON of `pytest bench/`.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    values = read_json(path)
    if is_of_benchmarks(values):
        found: Record = values
        return found
    raise ValueError(f"{path}: expected JSON of `pytest bench/`, got another file")


def is_of_benchmarks(values: Any) -> bool:
    """Return True for what `pytest bench/` writes."""
    return (
        isinstance(values, dict)
        and "benchmarks" in values
        and "stlm" in values.get("machine_info", ())
    )


def read_json(path: Path) -> Any:
    """Read a file.

    Raises:
        ValueError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON, got {error!r}") from None


def write_json(path: Path, values: Any) -> None:
    """Write values; the file holds all of them or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(values, indent=1) + "\n").encode())


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """Return the line that started a command; None stands for the arguments of the process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def add_result_options(parser: argparse.ArgumentParser, folder: str = "out/bench/") -> None:
    """Add --json and --commit, which every command that writes a result has."""
    parser.add_argument("--json", type=Path, help=f"where the result goes (default: {folder})")
    parser.add_argument("--commit", help="what to record as the commit, where git is not there")


def result_path(wanted: Path | None, name: str, parser: argparse.ArgumentParser) -> Path:
    """Return the path of a result, tried before the work, which would be lost otherwise."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = wanted or Path("out/bench") / f"{name}-{stamp}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_writable(path)
    except OSError as error:
        parser.error(f"cannot write the result: {error}")
    return path
