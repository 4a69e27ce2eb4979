"""Nsight Compute on one kernel: the command, its CSV, and a digest of its figures.

Which metric belongs to what follows the Speed Of Light, Compute Workload and Warp State sections
of Nsight Compute's Profiling Guide.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RANGE = "stlm_profile"
"""The NVTX range around what is profiled."""

ELAPSED, ACTIVE = ".avg.pct_of_peak_sustained_elapsed", ".avg.pct_of_peak_sustained_active"
TIME = "gpu__time_duration.sum"
WAVES = "launch__waves_per_multiprocessor"
OCCUPANCY = "sm__warps_active" + ACTIVE
MEMORY = {"DRAM": "dram__throughput" + ELAPSED, "L2": "lts__throughput" + ELAPSED}
COMPUTE = {
    "tensor pipe": "sm__pipe_tensor_cycles_active" + ELAPSED,
    "FMA pipe": "sm__inst_executed_pipe_fma" + ELAPSED,
    "ALU pipe": "sm__inst_executed_pipe_alu" + ELAPSED,
    "issue slots": "sm__inst_issued" + ELAPSED,
}
EXP = {"MUFU": "sm__inst_executed_pipe_xu" + ELAPSED}
STALLS = {
    reason: f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in (
        "long_scoreboard",
        "short_scoreboard",
        "math_pipe_throttle",
        "mio_throttle",
        "lg_throttle",
        "barrier",
        "wait",
    )
}
METRICS = (
    TIME,
    *MEMORY.values(),
    *COMPUTE.values(),
    *EXP.values(),
    OCCUPANCY,
    WAVES,
    "dram__bytes.sum",
    "launch__registers_per_thread",
    *STALLS.values(),
)

BOUND = 60.0
"""Percent of its peak from which a unit counts as what limits a kernel."""

LAUNCH_SECONDS = 5e-6
"""Typical cost of a launch: a kernel that takes no longer is not limited by its work."""


def command(kernel: str, csv_path: Path, workload: Sequence[str]) -> str:
    """Return the shell line that measures one launch of a kernel within the range of `workload`."""
    words = [
        "ncu",
        "--nvtx",
        "--nvtx-include",
        f"{RANGE}/",
        "--kernel-name",
        f"regex:^{kernel}$",
        "--launch-count",
        "1",
        "--metrics",
        ",".join(METRICS),
        "--print-units",
        "base",
        "--csv",
        "--log-file",
        str(csv_path),
        *workload,
    ]
    return shlex.join(words)


def read_csv(lines: Iterable[str]) -> tuple[str, dict[str, float]]:
    """Read kernel and value by metric of the one launch in ncu's CSV, its messages left out.

    Raises:
        ValueError: for no launch or more than one, or a metric in another unit than the base.
    """
    table = (line for line in lines if line.startswith('"'))
    rows = list(csv.DictReader(table))
    launches = {(row.get("ID"), row.get("Kernel Name")) for row in rows}
    if len(launches) != 1 or "Metric Name" not in rows[0]:
        raise ValueError(f"CSV: expected one launch of one kernel by ncu, got {len(launches)}")
    values = {}
    for row in rows:
        if row["Metric Name"] == TIME and row["Metric Unit"] not in ("ns", "nsecond"):
            raise ValueError(f"{TIME}: expected nanoseconds, got {row['Metric Unit']}")
        try:
            values[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            continue  # n/a: this device does not count it
    if TIME not in values:
        raise ValueError(f"CSV: expected {TIME} in it, got {sorted(values)}")
    return rows[0]["Kernel Name"], values


@dataclass(frozen=True)
class Digest:
    """Limits of a kernel.

    Args:
        kernel: its name.
        seconds: on the device, under ncu's clocks and with cold caches.
        bound: "memory", "compute", "exp" or "launch"; "latency" where no unit is near its peak.
        unit: the busiest unit, and its percent of peak.
        stalls: reasons why warps wait, the worst first: warps for each issued instruction.
        floor_seconds: the least that its bytes and FLOPs take; None where nothing is known.
        values: all that ncu measured.
    """

    kernel: str
    seconds: float
    bound: str
    unit: tuple[str, float]
    stalls: tuple[tuple[str, float], ...]
    floor_seconds: float | None
    values: dict[str, float]


def digest(kernel: str, values: dict[str, float], floor_seconds: float | None) -> Digest:
    """Classify one launch: by the busiest unit if it is near its peak, else by its stalls."""
    kinds = {"memory": MEMORY, "compute": COMPUTE, "exp": EXP}
    busy = {
        (kind, unit): values[metric]
        for kind, units in kinds.items()
        for unit, metric in units.items()
        if metric in values
    }
    if not busy:
        raise ValueError(f"CSV: expected a unit's throughput in it, got {sorted(values)}")
    (bound, unit), percent = max(busy.items(), key=lambda item: item[1])
    seconds = values[TIME] * 1e-9
    if percent < BOUND:
        small = values.get(WAVES, 1.0) < 1 or seconds <= LAUNCH_SECONDS
        bound = "launch" if small else "latency"
    stalls = {name: values[metric] for name, metric in STALLS.items() if metric in values}
    worst = sorted(stalls.items(), key=lambda item: -item[1])
    return Digest(kernel, seconds, bound, (unit, percent), tuple(worst), floor_seconds, values)


def lines(found: Digest) -> list[str]:
    """Format a digest as lines."""
    unit, percent = found.unit
    text = [f"{found.kernel}: {found.bound}-bound, {found.seconds * 1e6:.2f} us"]
    text.append(f"  busiest: {unit} at {percent:.0f}% of its peak")
    if found.bound == "launch":
        waves = found.values.get(WAVES)
        size = "" if waves is None else f", {waves:.2f} waves of programs"
        text.append(f"  too little work for this device{size}: batch it, or capture a graph")
    if found.floor_seconds:
        over = found.seconds / found.floor_seconds
        text.append(
            f"  {over:.2f} times the floor of the whole pass, {found.floor_seconds * 1e6:.2f} us"
        )
    if OCCUPANCY in found.values:
        text.append(f"  achieved occupancy {found.values[OCCUPANCY]:.0f}%")
    if found.stalls:
        worst = ", ".join(f"{name} {value:.2f}" for name, value in found.stalls[:3])
        text.append(f"  warps stalled per issued instruction: {worst}")
    return text
