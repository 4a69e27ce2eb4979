"""What the commands share: checks of what they are told, and where a result goes."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path


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
        path.open("a").close()
    except OSError as error:
        parser.error(f"cannot write the result: {error}")
    return path
