"""Compile the kernels for GPUs that are not here, and report what they need.

    python -m stlm_kernels.inspect [op ...] [--arch 80 90 100] [--dtype bfloat16] [--dump ptx|sass]

The op's own launcher runs with its own arguments; a recorder takes the place of the device and
compiles each launch to a cubin. What comes out are the compiler's facts (registers, spills, shared
memory, matrix instructions), not speed.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import _launch
from .registry import OPS
from .spec import Case, OpSpec
from .terminal import argument_parser, command, note

ARCHS = (80, 90, 100)
MMA = re.compile(r"\b(UTC[A-Z]*MMA|HGMMA|QGMMA|IGMMA|HMMA|IMMA|DMMA)\b")


@dataclass(frozen=True)
class Limits:
    """Hardware limits of an architecture, from the CUDA programming guide's tables."""

    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int


LIMITS = {
    80: Limits(163 * 1024, 164 * 1024, 64, 32),
    86: Limits(99 * 1024, 100 * 1024, 48, 16),
    89: Limits(99 * 1024, 100 * 1024, 48, 24),
    90: Limits(227 * 1024, 228 * 1024, 64, 32),
    100: Limits(227 * 1024, 228 * 1024, 64, 32),
    120: Limits(99 * 1024, 100 * 1024, 48, 24),
}


def gpu_for(arch: int) -> _launch.Gpu:
    """The GPU of an architecture, as launch configurations know it."""
    return _launch.Gpu(arch, LIMITS[arch].shared_per_block)


@dataclass(frozen=True)
class Report:
    """Resources of one kernel, compiled for one architecture with one configuration."""

    kernel: str
    ops: tuple[str, ...]
    case: str
    arch: int
    config: str
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    mma: str
    mma_count: int
    warps: int
    ptx: str
    sass: str

    @property
    def occupancy(self) -> float:
        """Resident warps over the most the SM can hold, as registers and shared memory allow."""
        limits = LIMITS[self.arch]
        registers_per_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        by_registers = 65_536 // (registers_per_warp * self.warps)
        by_shared = limits.shared_per_sm // (self.shared_bytes + 1024)
        by_warps = limits.warps_per_sm // self.warps
        blocks = min(by_registers, by_shared, by_warps, limits.blocks_per_sm)
        return blocks * self.warps / limits.warps_per_sm


class NoCompiler(RuntimeError):
    """Raised where nothing can be compiled in this process."""


@contextmanager
def target(arch: int) -> Iterator[None]:
    """Make triton compile for `arch` whatever this machine has."""
    import triton
    from triton.backends.compiler import GPUTarget

    class AbsentDevice:
        """Stand-in for a driver, with as much of one as compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch  # compiled kernels are cached by device, so each arch is its own

        def get_current_stream(self, device: int) -> int:
            return 0

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(AbsentDevice())
    try:
        yield
    finally:
        triton.runtime.driver._active = before


def inspect_op(
    spec: OpSpec,
    case: Case,
    arch: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    disassemble: bool = True,
) -> list[Report]:
    """Compile every kernel that the op launches for a case, forward and backward.

    Args:
        spec: a registered op that has kernels.
        case: shapes; only their specialisation matters, so small ones do.
        arch: compute capability without the dot, e.g. 90.
        dtype: of the float inputs.
        disassemble: False leaves `mma` and `sass` empty where nothing spills, in half the time.

    Returns:
        A report for each launch.

    Raises:
        NoCompiler: the kernels are interpreted in this process, or triton is missing.
    """
    from ._dispatch import has_triton, kernels_interpreted

    if not has_triton() or kernels_interpreted():
        raise NoCompiler("inspect needs triton, and a process without TRITON_INTERPRET")
    reports: list[Report] = []

    def compile_launch(
        kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        reports.append(_report(compiled, spec.name, case.name, arch, options, disassemble))

    with target(arch), _launch.recording(compile_launch, gpu_for(arch)):
        inputs = spec.make_inputs(case, dtype, torch.device("cpu"), 0)
        for name in spec.grad_args:
            if inputs.get(name) is not None:
                inputs[name].requires_grad_()
        out = spec.op(**inputs, impl="triton")
        heads = [x for x in ([out] if isinstance(out, torch.Tensor) else out) if x.requires_grad]
        if heads:
            torch.autograd.backward(heads, [torch.ones_like(x) for x in heads])
    return reports


def _report(
    compiled: Any, op: str, case: str, arch: int, options: dict[str, Any], disassemble: bool
) -> Report:
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump(cubin, "-res-usage")
    stack_bytes = _usage(usage, "STACK")
    # What spills lies on the stack; the disassembler takes half a second to start.
    sass = _cuobjdump(cubin, "-sass") if disassemble or stack_bytes else ""
    opcodes = MMA.findall(sass)
    shown = {k: v for k, v in options.items() if k.isupper() or k in ("num_warps", "num_stages")}
    return Report(
        kernel=compiled.metadata.name,
        ops=(op,),
        case=case,
        arch=arch,
        config=" ".join(f"{k}={v}" for k, v in shown.items()),
        registers=_usage(usage, "REG"),
        stack_bytes=stack_bytes,
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=compiled.metadata.shared,
        mma="+".join(sorted(set(opcodes))) or ("-" if sass else ""),
        mma_count=len(opcodes),
        warps=compiled.metadata.num_warps,
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


@functools.lru_cache(maxsize=256)
def _cuobjdump(cubin: bytes, option: str) -> str:
    """Return what the tool prints; many cases launch the same kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump_path()), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(text: str, what: str) -> int:
    found = re.search(rf"\b{what}:(\d+)", text)
    assert found is not None, f"cuobjdump reports no {what}"
    return int(found[1])


@functools.cache
def _cuobjdump_path() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def merged(reports: Iterable[Report]) -> list[Report]:
    """One row for a kernel and configuration that several ops launch, naming them all."""
    rows: dict[tuple[Any, ...], Report] = {}
    for report in reports:
        key = (report.kernel, report.arch, report.config, report.registers)
        if key in rows:
            ops = tuple(sorted({*rows[key].ops, *report.ops}))
            rows[key] = replace(rows[key], ops=ops)
        else:
            rows[key] = report
    return list(rows.values())


def table(reports: Sequence[Report]) -> str:
    """Plain-text table of reports."""
    head = ("kernel", "ops", "sm", "regs", "stack B", "spills", "shared B", "mma", "n", "occ")
    rows = [
        (
            r.kernel,
            ",".join(r.ops),
            str(r.arch),
            str(r.registers),
            str(r.stack_bytes),
            str(r.spill_instructions),
            str(r.shared_bytes),
            r.mma,
            str(r.mma_count),
            f"{r.occupancy:.0%}",
        )
        for r in reports
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(head, widths, strict=True)) + "  config"]
    for row, report in zip(rows, reports, strict=True):
        cells = "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        lines.append(f"{cells}  {report.config}")
    return "\n".join(lines)


@command()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser("stlm_kernels.inspect", __doc__)
    parser.add_argument("ops", nargs="*", help="public op names (default: all with kernels)")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHS), choices=sorted(LIMITS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--dump", choices=("ptx", "sass"), help="print the code as well")
    args = parser.parse_args(argv)
    with_kernels = [name for name, spec in OPS.items() if spec.kernels]
    unknown = sorted(set(args.ops) - set(with_kernels))
    if unknown:
        parser.error(f"no kernels for {', '.join(unknown)}; ops: {', '.join(with_kernels)}")
    try:
        reports = merged(
            report
            for name in args.ops or with_kernels
            for case in OPS[name].tagged("aot")
            for arch in args.arch
            for report in inspect_op(OPS[name], case, arch, getattr(torch, args.dtype))
        )
    except NoCompiler as error:
        note(f"error: {error}")
        return 1
    print(table(reports))
    for report in reports if args.dump else ():
        print(f"\n// {report.kernel} sm_{report.arch} {report.config}")
        print(getattr(report, args.dump))
    return 0


if __name__ == "__main__":
    sys.exit(main())
