"""What the commands share: checks of what they are told, and where a result goes."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from stlm_models.files import replace_file, require_writable


def positive(text: str) -> int:
    """A type of argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def result_path(wanted: Path | None, name: str, parser: argparse.ArgumentParser) -> Path:
    """Where the result will be written; tried before the work, which would be lost otherwise."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = wanted or Path("out/bench") / f"{name}-{stamp}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_writable(path)
    except OSError as error:
        parser.error(f"cannot write the result: {error}")
    return path


def write_json(path: Path, values: Any) -> None:
    """Write a result so that the file holds all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(values, indent=1) + "\n").encode())
