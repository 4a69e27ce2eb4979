"""Time training beside a process that takes one of the cores.

Quiet and busy intervals take turns in one run: with the number of threads that `train` chooses by
the times of its steps, and with that number fixed, as torch sets it. A busy interval counts from
the moment that the other process begins, so what finding the number costs is part of it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from stlm_kernels import terminal
from stlm_models.data.corpus import load_corpus
from stlm_models.presets import preset
from stlm_models.training.threads import ThreadCount
from stlm_models.training.trainer import Trainer, TrainOptions

from .harness import environment
from .harness.commandline import positive
from .harness.results import Result, add_result_options, command_line, result_path

ENOUGH = 0.4
"""The least share of the quiet throughput that a busy core may leave."""


@contextmanager
def taken_cores(count: int) -> Iterator[None]:
    """Start so many processes that compute all the time, and end them at exit."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def interval(trainer: Trainer, seconds: float, threads: ThreadCount | None) -> float:
    """Train for so long; return bytes per second."""
    began, n_bytes = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        step_began = time.monotonic()
        n_bytes += trainer.train_step().n_bytes
        if threads is not None:
            threads.after_step(time.monotonic() - step_began)
    return n_bytes / (time.monotonic() - began)


def measure(trainer: Trainer, turns: int, seconds: float, taken: int) -> dict[str, list[float]]:
    """Return bytes per second of each interval, by name."""
    rates: dict[str, list[float]] = {
        f"{load}_{way}": [] for way in ("chosen", "fixed") for load in ("quiet", "busy")
    }
    trainer.train_step()
    for _ in range(turns):
        for way in ("chosen", "fixed"):
            threads = ThreadCount() if way == "chosen" else None
            rates[f"quiet_{way}"].append(interval(trainer, seconds, threads))
            with taken_cores(taken):
                rates[f"busy_{way}"].append(interval(trainer, seconds, threads))
            if threads is not None:
                threads.close()
    trainer.loader.close()
    return rates


def shares(rates: dict[str, list[float]]) -> dict[str, float]:
    """Return the share of the quiet throughput (threads fixed, all cores free) that each keeps."""
    quiet = statistics.median(rates["quiet_fixed"])
    return {name: statistics.median(found) / quiet for name, found in rates.items()}


@terminal.command(on_closed_pipe=1)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("bench.busy", __doc__)
    parser.add_argument("preset", nargs="?", default="demo", help="the model (default: demo)")
    parser.add_argument("--turns", type=positive, default=3, help="(default: 3)")
    parser.add_argument(
        "--seconds", type=positive, default=25, help="of each interval (default: 25)"
    )
    parser.add_argument(
        "--taken", type=positive, default=1, help="processes beside the training (default: 1)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)"
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "busy", parser)
    about = environment.describe(torch.device("cpu"), options.commit)
    print(environment.header(about, None))
    # The rates never change here: a budget of many steps keeps the schedule at its peak.
    budget = TrainOptions(steps=1 << 30, precision=options.precision)
    trainer = Trainer(preset(options.preset), load_corpus(None), budget)
    rates = measure(trainer, options.turns, options.seconds, options.taken)
    kept = shares(rates)
    is_enough = kept["busy_chosen"] >= ENOUGH
    summary = [
        *(
            f"{name:<14} {statistics.median(rates[name]):9,.0f} bytes/s {share:5.0%} of quiet"
            for name, share in kept.items()
        ),
        f"{'met' if is_enough else 'MISSED'}: at least {ENOUGH:.0%} beside a busy core",
    ]
    print(*summary, sep="\n")
    rows = [
        {"interval": name, "share_of_quiet": round(kept[name], 3), "bytes_per_second": found}
        for name, found in rates.items()
    ]
    Result(command_line("bench.busy", arguments), about, rows, summary).write(path)
    print(path)
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main())
