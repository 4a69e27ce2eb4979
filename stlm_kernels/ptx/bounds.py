"""Lower bounds of a launch's time on a device, one for each thing it cannot do without.

Each is a count over a rate: a kernel takes at least the largest of them. They are bounds, not
times: waiting, cache misses beyond the first, clocks below boost and partial waves come on top.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .count import KINDS, class_of
from .disassembly import MachineCounts, machine_counts
from .launch import Execution
from .torch_ops import TorchOp

DEVICES = Path(__file__).parent / "devices"
LANES = 32


@dataclass(frozen=True)
class Device:
    """Rates of a GPU, from `devices/<name>.json`, which names their sources."""

    name: str
    arch: int
    sms: int
    clock_ghz: float
    issue_per_clock: float
    alu_per_clock: float
    mufu_per_clock: float
    lsu_bytes_per_clock: float
    matrix_tflops: dict[str, float]
    dram_tb_per_s: float
    l2_tb_per_s: float | None

    @classmethod
    def load(cls, name: str) -> Device:
        """The device of this name.

        Raises:
            ValueError: there is none.
        """
        path = DEVICES / f"{name}.json"
        if not path.exists():
            known = sorted(each.stem for each in DEVICES.glob("*.json"))
            raise ValueError(f"device: expected one of {known}, got {name!r}")
        values = json.loads(path.read_text())
        del values["sources"]
        return cls(**values)

    @classmethod
    def of_arch(cls, arch: int) -> Device:
        """The device of an architecture; where there is none, the H200."""
        devices = (cls.load(path.stem) for path in sorted(DEVICES.glob("*.json")))
        return next((device for device in devices if device.arch == arch), cls.load("h200"))

    @property
    def clocks_per_us(self) -> float:
        """Clocks of all SMs together in a microsecond."""
        return self.sms * self.clock_ghz * 1e3


@dataclass(frozen=True)
class Bounds:
    """Costs of a launch.

    Args:
        kernel: its name.
        us: lower bound of each limit, in microseconds.
        counts: of the whole grid, extrapolated where blocks were sampled.
        machine: warp instructions of the machine code; None where it was not at hand.
        factor: of the extrapolation: blocks of the grid over blocks executed.
    """

    kernel: str
    us: dict[str, float]
    counts: dict[str, float]
    machine: MachineCounts | None
    factor: float

    @property
    def binding(self) -> str:
        """The limit with the largest bound."""
        return max(self.us, key=lambda name: self.us[name])

    @property
    def largest(self) -> float:
        """Microseconds that the launch takes at least."""
        return self.us[self.binding]


def bounds_of(done: Execution, device: Device) -> Bounds:
    """Bounds of an execution whose costs were counted.

    Raises:
        ValueError: the execution was run without `costs=True`.
    """
    costs = done.counts.costs
    if costs is None:
        raise ValueError("bounds_of: expected an execution with costs=True, got one without")
    factor = done.counts.blocks / max(1, done.counts.executed_blocks)
    classes = classes_of(done)
    machine = machine_counts(done) if done.cubin else None
    issued = machine.issued if machine else sum(classes.values())
    counts: dict[str, float] = {
        **{f"class_{name}": count * factor for name, count in classes.items()},
        **{name: count * factor for name, count in costs.counts.items()},
        "ptx_instructions": sum(classes.values()) * factor,
        "instructions": issued * factor,
        "divergent_instructions": int(done.counts.partial.sum()) * factor,
        "longest_chain": costs.longest_chain,
        "dram_bytes": costs.dram_bytes(factor),
        "l2_bytes": costs.l2_bytes * factor,
    }
    return Bounds(done.kernel, _microseconds(counts, device), counts, machine, factor)


def bounds_of_torch_op(op: TorchOp, device: Device) -> Bounds:
    """Bounds of an operator of torch: its product's FLOPs and its tensors' bytes."""
    us = {"dram": op.nbytes / (device.dram_tb_per_s * 1e6)}
    if device.l2_tb_per_s is not None:
        us["l2"] = op.nbytes / (device.l2_tb_per_s * 1e6)
    if op.flops and op.kind in device.matrix_tflops:
        us["matrix"] = op.flops / (device.matrix_tflops[op.kind] * 1e6)
    counts = {"dram_bytes": op.nbytes, "l2_bytes": op.nbytes, "matrix_flops": op.flops}
    return Bounds(op.name, us, {name: float(x) for name, x in counts.items()}, None, 1.0)


def classes_of(done: Execution) -> Counter[str]:
    """Warp instructions of the PTX by class."""
    classes: Counter[str] = Counter()
    for instruction, count in zip(done.program.instructions, done.counts.issued, strict=False):
        classes[class_of(instruction.opcode)] += int(count)
    return classes


def _microseconds(counts: dict[str, Any], device: Device) -> dict[str, float]:
    clocks = device.clocks_per_us
    moved = sum(counts.get(f"global_{kind}_cycles", 0) for kind in KINDS)
    passes = sum(counts.get(f"shared_{kind}_wavefronts", 0) for kind in KINDS)
    matrix = sum(
        counts.get(f"matrix_flops_{kind}", 0) / (rate * 1e6)
        for kind, rate in device.matrix_tflops.items()
    )
    us = {
        "issue": counts["instructions"] / (clocks * device.issue_per_clock),
        "alu": counts.get("class_integer", 0) / (clocks * device.alu_per_clock),
        "mufu": counts.get("class_mufu", 0) / (clocks * device.mufu_per_clock),
        "lsu": (moved + passes) / clocks,
        "matrix": matrix,
        "dram": counts["dram_bytes"] / (device.dram_tb_per_s * 1e6),
    }
    if device.l2_tb_per_s is not None:
        us["l2"] = counts["l2_bytes"] / (device.l2_tb_per_s * 1e6)
    return us


WORK = ("float", "mufu", "matrix")
"""Classes of instructions that compute results; all others move, count, compare and wait."""


def work_share(counts: Mapping[str, float]) -> float:
    """Part of the PTX's warp instructions that compute floating-point results."""
    done = sum(counts.get(f"class_{name}", 0) for name in WORK)
    return done / counts["ptx_instructions"] if counts["ptx_instructions"] else 0.0


def requests(counts: Mapping[str, float], space: str) -> float:
    """Warp-wide accesses of "global" or "shared" memory."""
    return sum(counts.get(f"{space}_{kind}_requests", 0) for kind in KINDS)


def ratio(counts: Mapping[str, float], what: str) -> float:
    """Needed over ideal "sectors" (global) or "wavefronts" (shared); 1 where there are none."""
    space = "global" if what == "sectors" else "shared"
    needed = sum(counts.get(f"{space}_{kind}_{what}", 0) for kind in KINDS)
    ideal = sum(counts.get(f"{space}_{kind}_ideal_{what}", 0) for kind in KINDS)
    return needed / ideal if ideal else 1.0
