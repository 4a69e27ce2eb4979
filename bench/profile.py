"""`python -m bench.profile OP [--case C] [--pass fwd|bwd]`: what limits the kernels of one pass.

Prints the pass's floor, what the compiler made of its kernels, and for each the `ncu` command that
measures exactly one launch of it. On a GPU the pass runs under Proton too. `--digest FILE` reads
what ncu wrote. Without a GPU the compiled kernels run on the CPU, some blocks of each launch: their
checks, counters and lower bounds take the place of times.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stlm_kernels import _launch, terminal
from stlm_kernels.inspect import LIMITS, inspect_op, merged, table
from stlm_kernels.ptx.bounds import Device
from stlm_kernels.ptx.reports import SAMPLE, case_report, execute_case
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

from .harness.jobs import CaseData, Job, Task, our_entries, roots_of, task_of
from .harness.targets import TARGETS
from .harness.timing import Ceilings, Gpu
from .profiling import ncu
from .profiling.proton import under_proton

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Pass:
    """One pass of one case."""

    spec: OpSpec
    case: Case
    direction: str

    @property
    def bytes(self) -> int:
        return self.spec.bytes_moved(self.case, DTYPE, self.direction)

    @property
    def flops(self) -> int:
        return self.spec.flops(self.case, self.direction)

    @property
    def compiled_case(self) -> Case:
        """The case of the ahead-of-time lane that has most in common with this one."""
        sizes = self.case.sizes.items()
        return max(
            self.spec.tagged("aot"), key=lambda x: sum(x.get(key) == value for key, value in sizes)
        )

    @property
    def label(self) -> str:
        return f"{self.spec.name}-{self.case.name}-{self.direction}"


def launched(what: Pass) -> list[str]:
    """The kernels that the pass launches, in their order; none of them runs here."""
    names: list[str] = []
    spec = what.spec
    with _launch.recording(lambda kernel, *_: names.append(kernel.__name__)):
        inputs = spec.make_inputs(what.compiled_case, DTYPE, torch.device("cpu"), 0)
        for name in spec.grad_args:
            if inputs.get(name) is not None:
                inputs[name].requires_grad_()
        heads = roots_of(spec.op(**inputs, impl="triton"))
        if what.direction == "bwd":
            names.clear()
            torch.autograd.backward(heads, [torch.ones_like(x) for x in heads])
    return list(dict.fromkeys(names))


def resources(what: Pass, arch: int) -> str:
    """Registers, spills and shared memory of the pass's kernels, from the compiler."""
    wanted = launched(what)
    reports = merged(inspect_op(what.spec, what.compiled_case, arch, DTYPE))
    return table([report for report in reports if report.kernel in wanted])


def counted(what: Pass, arch: int) -> str:
    """Checks, counters and bounds of the pass's launches, from executing some of their blocks."""
    device = Device.of_arch(arch)
    session = execute_case(
        what.spec, what.case, arch=arch, dtype=DTYPE, direction=what.direction, sample=SAMPLE
    )
    floor = what.bytes / (device.dram_tb_per_s * 1e6)
    reach = [
        row.reach
        for row in TARGETS
        if (row.op, row.case, row.direction) == (what.spec.name, what.case.name, what.direction)
    ]
    aim = f"; to reach {reach[0]:g} us (bench.bounds)" if reach and reach[0] is not None else ""
    return f"rates of {device.name}, DRAM floor {floor:.2f} us{aim}\n{case_report(session, device)}"


def floor_lines(what: Pass, ceilings: Ceilings | None) -> list[str]:
    intensity = what.flops / what.bytes
    text = f"floor: {what.bytes:,} bytes, {what.flops:,} FLOPs, {intensity:.1f} FLOPs per byte"
    if ceilings is None:
        return [text, "  in seconds: give --copy-gb-s and --matmul-tflop-s of the device"]
    by_bytes = what.bytes / ceilings.copy_bytes_per_s
    by_flops = what.flops / ceilings.matmul_flops_per_s
    return [text, f"  {by_bytes * 1e6:.2f} us to move, {by_flops * 1e6:.2f} us to multiply"]


def ncu_commands(what: Pass, out: Path) -> dict[str, str]:
    """The shell line for each kernel of the pass."""
    workload = ["python3", "-m", "bench.profile", what.spec.name]
    workload += ["--case", what.case.name, "--pass", what.direction, "--once"]
    return {
        kernel: ncu.command(kernel, out / f"{what.label}-{kernel}.csv", workload)
        for kernel in launched(what)
    }


# On a GPU


def judged_task(what: Pass, gpu: Gpu) -> Task:
    """The pass by our kernels, whose result was found right."""
    data = CaseData(what.spec, what.case, gpu.dtype, gpu.device)
    entry = our_entries(what.spec, ["triton"])[0]
    data.errors_of(entry, entry.function)
    job = Job(what.spec, what.case, what.direction, entry)
    return task_of(job, [data.first], entry.function)


def run_in_range(
    task: Task, in_range: Callable[[str], contextlib.AbstractContextManager[Any]]
) -> None:
    """Once to warm up, then once within the range that ncu looks at."""
    # A range belongs to its thread, so a backward pass must not move to a thread of autograd's.
    with torch.autograd.set_multithreading_enabled(False):
        task.run(task.prepare(task.samples[0]))
        prepared = task.prepare(task.samples[0])
        with in_range(ncu.RANGE):
            task.run(prepared)


def flops_by_kernel(what: Pass) -> dict[str, int]:
    """The pass's FLOPs where one kernel does them all; several share them in no known way."""
    names = launched(what)
    products = [name for name in names if name.removeprefix("stlm_") in what.spec.mma_kernels]
    does_it = products or names
    return {does_it[0]: what.flops} if len(does_it) == 1 else {}


# The command


def _parser() -> argparse.ArgumentParser:
    parser = terminal.argument_parser("bench.profile", __doc__)
    parser.add_argument("op", help="public name of an op that has kernels")
    parser.add_argument("--case", help="name of one of its cases (default: its first on a GPU)")
    parser.add_argument("--pass", dest="direction", choices=("fwd", "bwd"), default="fwd")
    parser.add_argument("--once", action="store_true", help="run it once in a range: ncu's target")
    parser.add_argument("--digest", type=Path, metavar="CSV", help="judge what ncu wrote")
    parser.add_argument("--copy-gb-s", type=float, help="the device's rate of large copies")
    parser.add_argument("--matmul-tflop-s", type=float, help="and of large products")
    parser.add_argument("--arch", type=int, choices=sorted(LIMITS), help="default: this GPU, or 90")
    parser.add_argument("--out", type=Path, default=Path("out/profile"), help="of ncu and Proton")
    return parser


def _pass_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Pass:
    spec = OPS.get(options.op)
    if spec is None or not spec.kernels:
        known = ", ".join(name for name, x in OPS.items() if x.kernels)
        parser.error(f"op: expected one that has kernels ({known}), got {options.op}")
    if options.direction == "bwd" and not spec.grad_args:
        parser.error(f"--pass: {options.op} has no backward pass")
    rates = [options.copy_gb_s, options.matmul_tflop_s]
    if rates != [None, None] and not all(rate is not None and rate > 0 for rate in rates):
        parser.error(f"--copy-gb-s, --matmul-tflop-s: expected both above 0, or none, got {rates}")
    cases = {case.name: case for case in spec.cases}
    name = options.case or spec.tagged("bench", "bench_full")[0].name
    if name not in cases:
        known = "\n  ".join(cases)
        parser.error(f"--case: expected one of\n  {known}\ngot {name}")
    return Pass(spec, cases[name], options.direction)


def _ceilings(options: argparse.Namespace, gpu: Gpu | None) -> Ceilings | None:
    if options.copy_gb_s is not None:
        return Ceilings(options.copy_gb_s * 1e9, options.matmul_tflop_s * 1e12)
    return None if gpu is None else gpu.ceilings()


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    what = _pass_of(options, parser)
    gpu = Gpu() if torch.cuda.is_available() else None
    if options.once:
        if gpu is None:
            parser.exit(2, "bench.profile: --once needs a CUDA device\n")
        run_in_range(judged_task(what, gpu), torch.cuda.nvtx.range)
        torch.cuda.synchronize()
        return 0
    ceilings = _ceilings(options, gpu)
    if options.digest is not None:
        try:
            kernel, values = ncu.read_csv(options.digest.read_text().splitlines())
            floor = None if ceilings is None else ceilings.floor_seconds(what.bytes, what.flops)
            print("\n".join(ncu.lines(ncu.digest(kernel, values, floor))))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    _show(what, options, gpu, ceilings)
    return 0


def known_arch(arch: int) -> int:
    """The newest architecture up to this one of which the limits are known."""
    return max((known for known in LIMITS if known <= arch), default=min(LIMITS))


def _show(
    what: Pass, options: argparse.Namespace, gpu: Gpu | None, ceilings: Ceilings | None
) -> None:
    arch = options.arch
    if arch is None and gpu is not None:
        major, minor = torch.cuda.get_device_capability(gpu.device)
        arch = known_arch(10 * major + minor)
    print(f"{what.spec.name} {what.case.name}, {what.direction}, bfloat16")
    print("\n".join(floor_lines(what, ceilings)))
    print(f"compiled for sm_{arch or 90} on {what.compiled_case.name}:", flush=True)
    print(resources(what, arch or 90))
    options.out.mkdir(parents=True, exist_ok=True)
    print("what ncu measures, one launch of one kernel each:")
    for line in ncu_commands(what, options.out).values():
        print(f"  {line}")
    again = ["python3", "-m", "bench.profile", what.spec.name, "--case", what.case.name]
    print(f"then: {shlex.join([*again, '--pass', what.direction, '--digest', 'CSV'])}")
    if gpu is None:
        print("no CUDA device here, so no time is known. Executed on the CPU instead:", flush=True)
        print(counted(what, arch or 90))
    else:
        print("under Proton:")
        task, work = judged_task(what, gpu), {"bytes": what.bytes, "flops": what.flops}
        print(under_proton(task, options.out / what.label, work, flops_by_kernel(what)))


if __name__ == "__main__":
    raise SystemExit(main())
