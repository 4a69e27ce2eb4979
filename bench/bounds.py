"""`python -m bench.bounds [op...]`: lower bounds of ops at the shapes that count; needs no GPU.

The compiled kernels of each case run on the CPU, some blocks of each launch, spread evenly; counts
are extrapolated to the grid. A bound is no time: see `stlm_kernels.ptx.bounds`. The table of an
earlier commit (`--against FILE`) is shown beside it as a ratio; the table of this one is committed,
and a test fails where a bound has grown by more than 3% over it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stlm_kernels import terminal
from stlm_kernels.ptx.bounds import Device
from stlm_kernels.ptx.reports import SAMPLE
from stlm_kernels.registry import OPS

from .harness import environment
from .harness.commandline import positive
from .harness.counting import (
    COMPILED,
    MAKERS,
    OURS,
    Key,
    Record,
    case_named,
    entries,
    key_of,
    line,
    measure,
    read,
)
from .harness.results import Result, add_result_options, command_line, result_path
from .harness.targets import QUICK, TARGETS


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("bench.bounds", __doc__)
    parser.add_argument(
        "ops", nargs="*", choices=[[], *sorted({row.op for row in TARGETS})], metavar="op"
    )
    parser.add_argument("--quick", action="store_true", help="a case of nearly each op, in seconds")
    parser.add_argument("--device", default="h200", help="whose rates make the bounds")
    parser.add_argument("--sample", type=positive, default=SAMPLE, help="blocks of each launch")
    parser.add_argument("--against", type=Path, help="the table of another commit")
    parser.add_argument("--by", choices=MAKERS, help="count the kernels of one maker alone")
    parser.add_argument(
        "--update", type=Path, help="a table whose rows of these ops and this maker to replace"
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    try:
        device = Device.load(options.device)
        earlier = {} if options.against is None else read(options.against)
        kept = {} if options.update is None else read(options.update)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    path = result_path(options.update or options.json, "bounds", parser)
    about = environment.software(torch.device("cpu"), options.commit)
    head = f"lower bounds on {device.name}, bf16, sm_{device.arch}: counted, not timed"
    print(head)
    command = command_line("bench.bounds", arguments)
    settings = {"bounds_on": device.name, "sampled_blocks": options.sample}
    maker = options.by or ""
    records = {key: x for key, x in kept.items() if _stays(key, options.ops, maker)}
    for row in TARGETS:
        if (options.ops and row.op not in options.ops) or (options.quick and row.case not in QUICK):
            continue
        for by in entries(row.op, case_named(OPS[row.op], row.case)):
            if not by.name.startswith(maker):
                continue
            began = time.process_time()
            found = measure(row, by, device, device.arch, options.sample)
            found["commit"] = about["commit"]
            records[key_of(found)] = found
            print(line(found, earlier), f" [{time.process_time() - began:.0f} s]", flush=True)
            # After each row, so that what is interrupted keeps what it has.
            _write(path, command, about, settings, [head], records, earlier)
    print(path)
    return 0


def _stays(key: Key, ops: Sequence[str], maker: str) -> bool:
    """Whether a row of the table stays until its like is counted. Those of a library do, which
    may not be installed here."""
    op, _, _, by = key
    is_replaced = by.startswith((OURS, COMPILED)) and by.startswith(maker)
    return not is_replaced or bool(ops and op not in ops)


def _write(
    path: Path,
    command: str,
    about: Record,
    settings: Record,
    head: list[str],
    records: Mapping[Key, Record],
    earlier: Mapping[Key, Record],
) -> None:
    """Write the table in the order of `TARGETS`, ours first."""
    order = {(row.op, row.case, row.direction): i for i, row in enumerate(TARGETS)}
    rows = sorted(
        records.values(), key=lambda x: (order.get(key_of(x)[:3], len(order)), x["by"] != OURS)
    )
    lines = [*head, *(line(x, earlier) for x in rows)]
    Result(command, about, rows, lines, settings).write(path)


if __name__ == "__main__":
    sys.exit(main())
