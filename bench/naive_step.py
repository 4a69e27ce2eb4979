"""Time a training step beside the same step by naive ops.

Two processes build the same model and train it on the same windows; in one of them every op of the
library is replaced by a naive one in plain PyTorch (`bench/harness/naive_ops.py`). They take turns,
so that a drifting machine slows both alike, and each has its own peak of memory.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection

import torch

from stlm_kernels import terminal
from stlm_models.config import ModelConfig
from stlm_models.data.corpus import load_corpus
from stlm_models.presets import preset
from stlm_models.training.precision import faster_precision
from stlm_models.training.process import prepare_process
from stlm_models.training.trainer import PRECISIONS, Trainer, TrainOptions

from .harness import environment
from .harness.baseline_ops import ops_replaced
from .harness.commandline import positive
from .harness.naive_ops import NAIVE_OPS
from .harness.results import Result, add_result_options, command_line, result_path

WAYS = ("ours", "naive")


@dataclass(frozen=True)
class Settings:
    """Training of both processes: windows of `context` bytes, `batch_size` of them in a step."""

    preset: str
    batch_size: int
    context: int | None
    precision: str
    threads: int


@dataclass(frozen=True)
class Measurement:
    """Times and peak memory of one set of ops."""

    seconds: list[float]
    bytes_per_second: float
    peak_bytes: int
    losses: list[float]


def measure(settings: Settings, steps: int) -> dict[str, Measurement]:
    """Train in turns; the first step of each, which warms up, is not timed."""
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for way in WAYS:
        here, there = spawn.Pipe()
        spawn.Process(target=_serve, args=(there, way, settings), daemon=True).start()
        pipes[way] = here
    answers: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    for _ in range(steps + 1):
        for way, pipe in pipes.items():
            pipe.send("step")
            answers[way].append(pipe.recv())
    peaks = {way: _ask(pipe, "peak") for way, pipe in pipes.items()}
    return {
        way: Measurement(
            [seconds for seconds, _, _ in found[1:]],
            found[0][2] / statistics.median(seconds for seconds, _, _ in found[1:]),
            peaks[way],
            [loss for _, loss, _ in found],
        )
        for way, found in answers.items()
    }


def _ask(pipe: Connection, question: str) -> int:
    pipe.send(question)
    return int(pipe.recv())


def _serve(pipe: Connection, way: str, settings: Settings) -> None:
    """Run one process: a step when asked, until its peak of memory is asked for."""
    torch.set_num_threads(settings.threads)
    prepare_process()
    trainer = _trainer(settings)
    with ops_replaced(NAIVE_OPS) if way == "naive" else nullcontext():
        while pipe.recv() == "step":
            began = time.perf_counter()
            result = trainer.train_step()
            loss = float(result.loss)
            pipe.send((time.perf_counter() - began, loss, result.n_bytes))
    pipe.send(_peak_bytes(trainer.device))


def _peak_bytes(device: torch.device) -> int:
    """Return peak memory: all that the process had on a CPU, torch's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lines(results: dict[str, Measurement]) -> Iterator[str]:
    """Format a line for each set of ops, then our gain."""
    for way, x in results.items():
        yield (
            f"  {way:<6} {statistics.median(x.seconds):8.2f} s"
            f" {x.bytes_per_second:9,.0f} bytes/s {x.peak_bytes / 2**20:8,.0f} MiB"
        )
    ours, naive = results["ours"], results["naive"]
    faster = ours.bytes_per_second / naive.bytes_per_second
    smaller = ours.peak_bytes / naive.peak_bytes
    yield f"  ours: {faster:.2f} times the speed, {smaller:.2f} of the peak"


def _config_and_options(settings: Settings) -> tuple[ModelConfig, TrainOptions]:
    """Return what both processes train, and the options.

    Raises:
        ValueError: for an unknown preset, or a value out of range.
    """
    config = preset(settings.preset)
    if settings.context is not None:
        config = replace(config, context=settings.context)
    # The rates never change here: a budget of many steps keeps the schedule at its peak.
    options = TrainOptions(
        steps=1 << 30, batch_size=settings.batch_size, precision=settings.precision
    )
    return config, options


def _trainer(settings: Settings) -> Trainer:
    config, options = _config_and_options(settings)
    return Trainer(config, load_corpus(None), options)


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.naive_step", __doc__)
    parser.add_argument("preset", nargs="?", default="50m", help="the model (default: 50m)")
    parser.add_argument(
        "--batch-size", type=positive, default=1, help="windows in a step (default: 1)"
    )
    parser.add_argument(
        "--context", type=positive, help="bytes in a window (default: the preset's)"
    )
    parser.add_argument("--steps", type=positive, default=5, help="timed steps (default: 5)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        help="threads of torch (default: its own choice)",
    )
    parser.add_argument(
        "--precision", choices=sorted(PRECISIONS), help="default: bf16 where the device has it"
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    precision = options.precision or faster_precision().name
    settings = Settings(
        options.preset, options.batch_size, options.context, precision, options.threads
    )
    try:
        _config_and_options(settings)
    except ValueError as error:
        parser.error(str(error))
    path = result_path(options.json, "naive-step", parser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment.describe(device, options.commit)
    print(environment.header(about, None))
    results = measure(settings, options.steps)
    said = ", ".join(f"{key} {value}" for key, value in asdict(settings).items())
    summary = [said, *lines(results)]
    print(*summary, sep="\n")
    rows = [{"ops": way, **asdict(result)} for way, result in results.items()]
    command = command_line("bench.naive_step", arguments)
    Result(command, about, rows, summary, asdict(settings)).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
