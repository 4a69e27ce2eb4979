"""`python -m bench.bounds [op...]`: lower bounds of ops at the shapes that count; needs no GPU.

The compiled kernels of each case run on the CPU, some blocks of each launch, spread evenly; counts
are extrapolated to the grid. A bound is no time: see `stlm_kernels.ptx.bounds`. The table of an
earlier commit (`--against FILE`) is shown beside it as a ratio.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stlm_kernels import terminal
from stlm_kernels.ptx.bounds import Device, bounds_of, bounds_of_torch_op, ratio
from stlm_kernels.ptx.reports import SAMPLE, execute_case
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

from .harness import environment
from .harness.commandline import positive
from .harness.results import Result, add_result_options, command_line, result_path
from .peers import PEERS
from .peers.entry import Entry
from .peers.installed import on_gpu

Record = dict[str, Any]
Key = tuple[str, str, str, str]
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One pass of one case, and the bound in microseconds that it should come down to (or None)."""

    op: str
    case: str
    direction: str
    reach: float | None = None


def _row(op: str, case: str, **reach: float | None) -> Iterator[Row]:
    for direction, us in reach.items():
        yield Row(op, case, direction, us)


BYTES = "T1048576"
EVEN, WORDS = f"{BYTES}-P174763", f"{BYTES}-P120646"
NGRAMS = "D128-tables((3, 50000), (4, 50000), (5, 50000), (6, 50000), (7, 50000), (8, 50000))"
ROWS = (
    *_row("byte_pool", f"{WORDS}-V256-D768-mean-words-english", fwd=110, bwd=90),
    *_row("byte_pool", f"{EVEN}-V256-D768-mean-even-english", fwd=100, bwd=90),
    *_row("byte_pool", f"{EVEN}-V256-D768-mean-even-uniform", fwd=100, bwd=125),
    *_row("byte_pool", f"{EVEN}-V256-D768-mean-even-equal", fwd=100, bwd=125),
    *_row("byte_pool", f"{WORDS}-V256-D128-mean-words-english", fwd=21, bwd=15),
    *_row("byte_pool", f"{EVEN}-V256-D128-mean-even-english", fwd=19, bwd=15),
    *_row("byte_pool", f"{EVEN}-V256-D128-mean-even-uniform", fwd=19, bwd=20),
    *_row("byte_pool", f"{EVEN}-V256-D128-mean-even-equal", fwd=19, bwd=20),
    *_row("segment_pool", f"{WORDS}-D768-mean-words", fwd=None, bwd=250),
    *_row("segment_pool", f"{EVEN}-D768-mean-even", fwd=None, bwd=250),
    *_row("segment_pool", f"{EVEN}-D128-mean-even", fwd=None, bwd=60),
    *_row("attention_pool", f"{WORDS}-H8-KV8-K16-shared-words", fwd=None, bwd=None),
    *_row("attention_pool", f"{EVEN}-H8-KV8-K16-shared-ragged", fwd=None, bwd=None),
    *_row("ngram_embedding", f"{BYTES}-{NGRAMS}-S128-even-english", fwd=None, bwd=None),
    *_row("ngram_embedding", f"{BYTES}-{NGRAMS}-S128-even-equal", fwd=None, bwd=None),
    *_row("find_patches", f"{BYTES}-space-max16-S128-C524288-english", fwd=10),
    *_row("find_patches", f"{BYTES}-space-max16-S128-C524288-equal", fwd=10),
    *_row("unpool", f"{WORDS}-D768-S128-words-null+residual", fwd=None, bwd=None),
    *_row("unpool", f"{EVEN}-D768-S128-even-null+residual", fwd=None, bwd=None),
    *_row("unpool", f"{EVEN}-D128-S128-even-null+residual", fwd=None, bwd=None),
    *_row("ema_unpool", f"{WORDS}-D768-S128-words-router-residual", fwd=950, bwd=None),
    *_row("ema_unpool", f"{EVEN}-D768-S128-even-router-residual", fwd=950, bwd=None),
    *_row("ema_unpool", f"{EVEN}-D128-S128-even-router-residual", fwd=160, bwd=None),
    *_row("linear_cross_entropy", "N65536-D128-V256-mean", both=22),
    *_row("linear_cross_entropy", "N98304-D128-V258-mean", both=36),
    *_row("linear_cross_entropy", "N65536-D512-V256-mean", both=100),
    *_row("linear_cross_entropy", "N12288-D512-V50257-mean", both=3300),
    *_row("linear_sample", "N64-D512-V256-k1-p0.9-tensor", fwd=None),
    *_row("attention", "B24-T512-H16-KV4-K32", fwd=21, bwd=40),
    *_row("attention", "B8-T8192-H8-KV8-K64-W256", fwd=98, bwd=235),
    *_row("patch_attention", "T98304-P8192-H8-KV8-K16-even-causal0", fwd=22, bwd=48),
    *_row("patch_attention", "T98304-P8192-H8-KV8-K32-even-causal0", fwd=None, bwd=None),
    *_row("qk_norm_rope", "B24-T512-H16-KV4-K32-qk", fwd=None, bwd=None),
    *_row("qk_norm_rope", "T65536-H12-KV4-K64-qk-packed", fwd=None, bwd=None),
    *_row("decode_attention", "B64-C2048-H16-KV4-K64-full", fwd=None),
    *_row("decode_attention", "B64-C8192-H16-KV4-K64-ragged", fwd=None),
)
"""Shapes and aims as the project set them, from counts of its first kernels."""


def measure(row: Row, by: Entry, device: Device, arch: int, sample: int) -> Record:
    """Count a row's launches by one implementation, and add up the bounds of their limits."""
    spec = OPS[row.op]
    case = case_named(spec, row.case)
    session = execute_case(
        spec, case, arch=arch, dtype=DTYPE, direction=row.direction, sample=sample,
        function=by.function, convert=by.convert,
    )  # fmt: skip
    kernels = [bounds_of(done, device) for done in session.executions]
    others = [bounds_of_torch_op(op, device) for op in session.torch_ops]
    us: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    largest: defaultdict[str, float] = defaultdict(float)
    for bounds in (*kernels, *others):
        us.update(bounds.us)
        counts.update({name: x for name, x in bounds.counts.items() if name != "longest_chain"})
        largest[bounds.kernel] += bounds.largest
    floor_bytes = sum(
        spec.bytes_moved(case, DTYPE, each)
        for each in (("fwd", "bwd") if row.direction == "both" else (row.direction,))
    )
    return {
        "op": row.op,
        "case": row.case,
        "pass": row.direction,
        "by": by.name,
        "reach": row.reach,
        "kernels": len(kernels),
        "torch_ops": len(others),
        "sampled_1_in": round(max((bounds.factor for bounds in kernels), default=1.0), 2),
        "us": {name: round(x, 3) for name, x in us.items()},
        "bound": round(sum(largest.values()), 3),
        "dram_floor": round(floor_bytes / (device.dram_tb_per_s * 1e6), 3),
        "longest_chain": max((int(x.counts["longest_chain"]) for x in kernels), default=0),
        "sectors": round(ratio(counts, "sectors"), 3),
        "wavefronts": round(ratio(counts, "wavefronts"), 3),
        "instructions": round(counts["instructions"]),
        "dram_bytes": round(counts["dram_bytes"]),
        "l2_bytes": round(counts["l2_bytes"]),
        "bound_of": {
            name: round(x, 3) for name, x in sorted(largest.items(), key=lambda item: -item[1])
        },
        "faults": sorted({fault.kind for done in session.executions for fault in done.faults}),
    }


def entries(op: str, case: Case) -> list[Entry]:
    """Ours, then each library whose kernels triton compiles, where it is installed."""
    ours = Entry("stlm", partial(OPS[op].op, impl="triton"), ours=True)
    liger = [peer for peer in PEERS.get(op, ()) if peer.name.startswith("Liger")]
    return [ours, *(peer for peer in liger if peer.unsupported(case) in (None, on_gpu(case)))]


def case_named(spec: OpSpec, name: str) -> Case:
    """The case of this name.

    Raises:
        ValueError: the op has none.
    """
    for case in spec.cases:
        if case.name == name:
            return case
    raise ValueError(f"{spec.name}: expected a case's name, got {name!r}")


def line(record: Record, earlier: Mapping[Key, Record]) -> str:
    """A row of the table."""
    limits = sorted(record["us"].items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {us:.1f}" for name, us in limits)
    reach = "" if record["reach"] is None else f" of {record['reach']:g}"
    before = earlier.get(_key(record))
    change = "" if before is None else f"  {record['bound'] / before['bound']:.2f}x before"
    op, case, direction, by = _key(record)
    return (
        f"{op} {case} {direction} {by:<8}{record['bound']:9.1f} us{reach}"
        f"  floor {record['dram_floor']:.1f}  ({shown})"
        f"  {record['kernels']}+{record['torch_ops']} launches, chain {record['longest_chain']},"
        f" sectors {record['sectors']:.2f}, wavefronts {record['wavefronts']:.2f},"
        f" 1 block in {record['sampled_1_in']:g}{change}"
    )


def _key(record: Record) -> Key:
    return record["op"], record["case"], record["pass"], record["by"]


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("bench.bounds", __doc__)
    parser.add_argument(
        "ops", nargs="*", choices=[[], *sorted({row.op for row in ROWS})], metavar="op"
    )
    parser.add_argument("--device", default="h200", help="whose rates make the bounds")
    parser.add_argument("--sample", type=positive, default=SAMPLE, help="blocks of each launch")
    parser.add_argument("--against", type=Path, help="the table of another commit")
    parser.add_argument("--update", type=Path, help="a table whose rows of these ops to replace")
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
    records = {key: x for key, x in kept.items() if options.ops and key[0] not in options.ops}
    for row in ROWS:
        if options.ops and row.op not in options.ops:
            continue
        for by in entries(row.op, case_named(OPS[row.op], row.case)):
            began = time.process_time()
            found = measure(row, by, device, device.arch, options.sample)
            found["commit"] = about["commit"]
            records[_key(found)] = found
            print(line(found, earlier), f" [{time.process_time() - began:.0f} s]", flush=True)
            # After each row, so that what is interrupted keeps what it has.
            _write(path, command, about, settings, [head], records, earlier)
    print(path)
    return 0


def _write(
    path: Path,
    command: str,
    about: Record,
    settings: Record,
    head: list[str],
    records: Mapping[Key, Record],
    earlier: Mapping[Key, Record],
) -> None:
    """Write the table in the order of `ROWS`."""
    order = {(row.op, row.case, row.direction): i for i, row in enumerate(ROWS)}
    rows = sorted(records.values(), key=lambda x: order.get(_key(x)[:3], len(order)))
    lines = [*head, *(line(x, earlier) for x in rows)]
    Result(command, about, rows, lines, settings).write(path)


def read(path: Path) -> dict[Key, Record]:
    """A table that this command wrote, by op, case, pass and implementation.

    Raises:
        ValueError: it holds something else.
    """
    found = Result.read(path)
    if "bounds_on" not in found.settings:
        raise ValueError(f"{path}: expected a table of bench.bounds, got {found.command}")
    return {_key(x): x for x in found.rows}


if __name__ == "__main__":
    sys.exit(main())
