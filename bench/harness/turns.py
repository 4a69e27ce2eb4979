"""Work of several processes by turns: speed by the clock and by CPU time, peak of memory."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from stlm_models.config import ModelConfig
from stlm_models.presets import PRESETS

Record = dict[str, Any]


class Asked(Protocol):
    """A process that answers, such as `commits.Side`."""

    def ask(self, line: str) -> Any: ...


# In the process that asks. CPU time is that of all threads.


def by_turns(sides: Sequence[Asked], steps: int) -> list[Record]:
    """Return a record for each side after as many steps by turns; a first one is not timed."""
    turns = [[side.ask("step") for side in sides] for _ in range(steps + 1)]
    return [
        {
            "bytes_per_second": done[0]["n_bytes"] / median(done, "seconds"),
            "bytes_per_cpu_second": done[0]["n_bytes"] / median(done, "cpu_seconds"),
            "peak_bytes": side.ask("peak"),
            **{key: [step[key] for step in done] for key in done[0] if key != "n_bytes"},
        }
        for side, done in zip(sides, zip(*turns, strict=True), strict=True)
    ]


def median(steps: Sequence[Record], key: str) -> float:
    return statistics.median(step[key] for step in steps[1:])


def line(row: Record) -> str:
    return (
        f"  {row['commit']:<12} {row['bytes_per_second']:9,.0f} bytes/s"
        f" {row['bytes_per_cpu_second']:9,.0f} bytes/s of CPU time"
        f" {row['peak_bytes'] / 2**20:8,.0f} MiB"
    )


def gain(other: Record, here: Record) -> str:
    ratios = (here[key] / other[key] for key in ("bytes_per_second", "bytes_per_cpu_second"))
    faster, faster_cpu = ratios
    smaller = here["peak_bytes"] / other["peak_bytes"]
    return (
        f"  {faster:.2f} times the speed, {faster_cpu:.2f} by CPU time, {smaller:.2f} of the peak"
    )


# In a process that answers, beside any checkout of the library.


def begin() -> tuple[Record, ModelConfig]:
    """Read the line that says what to do; answer with the config, or the preset's."""
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    config = ModelConfig(**known(settings["config"] or asdict(PRESETS[settings["preset"]])))
    print(json.dumps(asdict(config)), flush=True)
    return settings, config


def answer(step: Callable[[], Record]) -> None:
    """Answer lines of input, each of which asks for a step or for the peak of memory."""
    for asked in sys.stdin:
        print(json.dumps(step() if asked.strip() == "step" else peak_bytes()), flush=True)


def timed(work: Callable[[], Record]) -> Record:
    """Return the record of some work with its seconds: on the clock, and of all threads."""
    began, cpu_began = time.perf_counter(), time.process_time()
    record = work()
    return record | {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def known(values: Record) -> Record:
    """Return the fields of a config that this commit knows.

    Raises:
        ValueError: for another that is not None.
    """
    names = set(ModelConfig.__dataclass_fields__)
    wrong = sorted(name for name, x in values.items() if name not in names and x is not None)
    if wrong:
        raise ValueError(f"config: expected fields that both commits have, got also {wrong}")
    return {name: x for name, x in values.items() if name in names}
