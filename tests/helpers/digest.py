"""`python tests/helpers/digest.py RESULTS.xml...`: what a long run found, on one screen.

A line per test file, then why tests were skipped, then the failures, by their messages: a broken
kernel fails in many tests, and a user of a lent GPU sees the end of the output first.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

KINDS = {"failure": "failed", "error": "failed", "skipped": "skipped"}
ROW = "{:<28}{:>8}{:>8}{:>8}{:>10}"
MOST_MESSAGES = 30
WIDTH = 150
NO_TIME = "no minutes are left"


def outcomes(file: Path) -> Iterator[tuple[str, str, str, str, float]]:
    """(test file, test, kind, message, seconds) of each test; one that errs twice comes twice."""
    for test in ElementTree.parse(file).iter("testcase"):
        place = file_of(test.get("classname") or "?")
        name, seconds = test.get("name") or "?", float(test.get("time") or 0)
        found = [(KINDS[x.tag], x.get("message") or "") for x in test if x.tag in KINDS]
        for kind, message in found or [("passed", "")]:
            yield place, name, kind, one_line(message), seconds


def file_of(classname: str) -> str:
    """The test file in "folders.file.Class": its name is unique and fits the column."""
    parts = classname.split(".")
    return next((part for part in parts if part.startswith(("test_", "bench_"))), classname)


def one_line(message: str) -> str:
    """Addresses, figures, processes and names differ between tests that fail alike."""
    text = " ".join(message.split())
    return re.sub(r"0x[0-9a-f]+|\d+\.\d+(e[-+]\d+)?|gw\d+|'tests/.*'", "#", text)[:WIDTH]


def grouped(kind: str, found: dict[str, list[str]]) -> Iterable[str]:
    by_size = sorted(found.items(), key=lambda item: -len(item[1]))
    for message, tests in by_size[:MOST_MESSAGES]:
        yield f"{len(tests):>5} {kind}: {message}\n        as in {tests[0][:WIDTH]}"
    if len(by_size) > MOST_MESSAGES:
        yield f"      {kind}: {len(by_size) - MOST_MESSAGES} messages more"


def digest(files: Sequence[Path]) -> tuple[str, bool]:
    """The text, and whether every test was begun, some passed and none failed."""
    missing = [file for file in files if not file.exists()]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds = Counter[str]()
    messages: dict[str, dict[str, list[str]]] = {"skipped": {}, "failed": {}}
    for file in [file for file in files if file not in missing]:
        for place, name, kind, message, took in outcomes(file):
            counts[place][kind] += 1
            seconds[place] += took
            if kind in messages:
                messages[kind].setdefault(message, []).append(f"{place}::{name}")
    total = sum(counts.values(), Counter[str]())
    columns = ("passed", "failed", "skipped")
    lines = [ROW.format("file", *columns, "seconds")]
    for place, found in [*sorted(counts.items()), ("all", total)]:
        took = sum(seconds.values()) if place == "all" else seconds[place]
        lines.append(ROW.format(place, *(found[x] for x in columns), f"{took:.0f}"))
    for kind, by_message in messages.items():
        lines += grouped(kind, by_message)
    lines += [f"no results: {file}" for file in missing]
    good = total["passed"] > 0 and not total["failed"] and not missing
    return "\n".join(lines), good and NO_TIME not in messages["skipped"]


if __name__ == "__main__":
    text, good = digest([Path(argument) for argument in sys.argv[1:]])
    print(text)
    sys.exit(not good)
