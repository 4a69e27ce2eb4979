"""`python -m stlm_kernels.ptx OP`: run an op's compiled kernels here; checks, counts and bounds.

Nothing of this needs a GPU. Bounds are lower bounds of time, not times. Of a case as large as a
benchmark some blocks of each launch run, spread evenly, and counts are scaled to the grid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from .. import terminal
from ..inspect import LIMITS
from ..registry import OPS
from ..spec import Case, OpSpec
from .bounds import Device
from .parse import PtxError
from .reports import SAMPLE, case_report, execute_case, session_values

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


@terminal.command(on_closed_pipe=1)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    spec = OPS[options.op]
    if options.direction == "bwd" and not spec.grad_args:
        parser.error(f"--pass: {options.op} has no backward pass")
    try:
        case = _case(spec, options.case)
        device = Device.load(options.device) if options.device else Device.of_arch(options.arch)
    except ValueError as error:
        parser.error(str(error))
    is_large = bool({"bench", "bench_full"} & set(case.tags))
    sample = options.sample or (SAMPLE if is_large else None)
    try:
        session = execute_case(
            spec, case, arch=options.arch, dtype=DTYPES[options.dtype],
            direction=options.direction, sample=sample,
        )  # fmt: skip
    except PtxError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    passes = ("fwd", "bwd") if options.direction == "both" else (options.direction,)
    floor = sum(
        spec.bytes_moved(case, DTYPES[options.dtype], each)
        for each in passes
        if each == "fwd" or spec.grad_args
    ) / (device.dram_tb_per_s * 1e6)
    if options.json:
        print(json.dumps(session_values(session, device, floor), indent=1))
    else:
        print(
            f"{spec.name} {case.name}, {options.dtype}, sm_{options.arch}, rates of {device.name};"
            f" DRAM floor {floor:.2f} us"
        )
        print(case_report(session, device, options.source))
    return 1 if any(done.faults for done in session.executions) else 0


def _case(spec: OpSpec, name: str | None) -> Case:
    """The case of this name, or the first that has it as a part; without a name a smoke case.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return spec.tagged("smoke")[0]
    found = [case for case in spec.cases if name in case.name]
    if not found:
        known = ", ".join(case.name for case in spec.cases)
        raise ValueError(f"--case: expected part of a case's name, got {name!r}; cases: {known}")
    return next((case for case in found if case.name == name), found[0])


def _parser() -> argparse.ArgumentParser:
    parser = terminal.argument_parser("stlm_kernels.ptx", __doc__)
    with_kernels = [name for name, spec in OPS.items() if spec.kernels]
    parser.add_argument("op", choices=with_kernels)
    parser.add_argument("--case", help="part of a case's name (default: the first smoke case)")
    parser.add_argument("--arch", type=int, choices=sorted(LIMITS), default=90)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--pass", dest="direction", choices=("fwd", "bwd", "both"), default="both")
    parser.add_argument("--device", help="whose rates make the bounds (default: one of the --arch)")
    parser.add_argument(
        "--sample", type=_positive, metavar="N",
        help=f"execute N blocks of each launch (default: all; {SAMPLE} of a benchmark's case)",
    )  # fmt: skip
    parser.add_argument("--source", action="store_true", help="instructions by source line")
    parser.add_argument("--json", action="store_true", help="all counts as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
