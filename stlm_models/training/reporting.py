"""Reports of a run while it trains and when it ends: metrics, samples, checkpoints, result."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.compressors import bits_per_byte_of, compressed_sizes
from ..evaluation import bits_per_byte
from .progress import Metrics, ProgressLine, lost_patches_text, progress_text
from .threads import ThreadCount
from .throughput import flops_per_byte, matmul_flops_per_second
from .trainer import PRECISIONS, StepResult, Trainer

STEPS_PER_RECORD = 10
SAMPLE_BYTES = 48
FINAL_SAMPLE_BYTES = 300
SAMPLE_TEMPERATURE = 0.7


class Reporter:
    """Shows and keeps how a run goes: progress line, metrics, samples, checkpoints."""

    def __init__(
        self, trainer: Trainer, run: Path, *, sample_every: float, save_every: float
    ) -> None:
        self.trainer, self.run = trainer, run
        self.sample_every, self.save_every = sample_every, save_every
        self.line = ProgressLine()
        self.metrics = Metrics(run, trainer.step)
        self._last_sample = self._last_save = self._last_record = trainer.seconds
        self._steps: list[StepResult] = []
        dtype = PRECISIONS[trainer.options.precision]
        self.rates = {
            "flops_per_byte": flops_per_byte(trainer),
            "matmul_flops_per_second": matmul_flops_per_second(trainer.device, dtype),
        }

    def __call__(self, result: StepResult) -> None:
        trainer = self.trainer
        self._steps.append(result)
        if len(self._steps) == STEPS_PER_RECORD:
            self._record()
        if trainer.seconds - self._last_sample >= self.sample_every:
            self._last_sample = trainer.seconds
            self.line.say(f"sample: {sample(trainer, SAMPLE_BYTES)!r}")
        if trainer.seconds - self._last_save >= self.save_every:
            self._last_save = trainer.seconds
            self.require_finite("loss", result.loss)
            self.save()

    def finish(self) -> None:
        """Write what is left of the metrics and leave the progress line."""
        if self._steps:
            self._record()
        self.line.close()

    def _record(self) -> None:
        trainer = self.trainer
        loss = float(torch.stack([step.loss for step in self._steps]).mean())
        self.require_finite("loss", loss)
        n_bytes = sum(step.n_bytes for step in self._steps)
        rate = n_bytes / max(1e-9, trainer.seconds - self._last_record)
        record: dict[str, Any] = {
            "step": trainer.step,
            "seconds": round(trainer.seconds, 3),
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "bytes_per_second": round(rate),
            "mfu": self._share_of_the_devices(rate),
        }
        lost = [step.lost_patches for step in self._steps if step.lost_patches is not None]
        if lost:
            record["lost_patches"] = int(torch.stack(lost).sum())
        self.metrics.write(record)
        self.line.update(trainer.progress, progress_text(record, trainer.progress))
        if record.get("lost_patches"):
            self.line.say(lost_patches_text(record["lost_patches"], trainer.max_patches))
        self._steps, self._last_record = [], trainer.seconds

    def save(self) -> None:
        """Write a checkpoint; a model that is lost must not take the place of the last good one."""
        for name, parameter in self.trainer.model.named_parameters():
            self.require_finite(name, parameter.detach())
        self.trainer.save(self.run)

    def require_finite(self, name: str, values: Tensor | float) -> None:
        """Raise a FloatingPointError, with what to do, where a value is NaN or infinite."""
        found = torch.as_tensor(values)
        wrong = found[~found.isfinite()]
        if wrong.numel():
            raise FloatingPointError(
                f"{name}: expected a finite number, got {float(wrong[0])} by step"
                f" {self.trainer.step}: lower --muon-lr and --adamw-lr, or set --max-grad-norm"
            )

    def _share_of_the_devices(self, bytes_per_second: float) -> float:
        """Model FLOPs utilisation: of what all processes' devices could multiply."""
        possible = self.rates["matmul_flops_per_second"] * self.trainer.ranks.world
        return bytes_per_second * self.rates["flops_per_byte"] / possible


def sample(trainer: Trainer, n_bytes: int) -> str:
    """Let the model write a text, with the same noise each time."""
    if trainer.words is not None:
        return "(a model of words writes no bytes)"
    try:
        data = trainer.model.generate(
            b"", max_new_bytes=n_bytes, temperature=SAMPLE_TEMPERATURE, seed=trainer.options.seed
        )
    except FloatingPointError as error:  # the loss will tell, with what to do about it
        return f"(none: {error})"
    return data.decode("utf-8", "replace")


def judge(trainer: Trainer) -> dict[str, Any]:
    """Held-out bits per byte of the model, and of the compressors that are installed."""
    held_out = trainer.corpus.held_out
    data = b"".join(held_out)
    sizes = compressed_sizes(data, trainer.corpus.train)
    with trainer.autocast():
        bits = bits_per_byte(trainer.model, held_out, vocabulary=trainer.words)
    return {
        "step": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "held_out_bytes": len(data),
        "bits_per_byte": bits,
        "compressors": bits_per_byte_of(sizes, len(data)),
    }


def run_reported(
    trainer: Trainer, reporter: Reporter, should_stop: Callable[[], bool], threads: int | None
) -> bool:
    """Train to the end of the budget, with a number of threads that fits the machine's load."""
    if threads is not None:
        torch.set_num_threads(threads)
    # torch.compile would compile anew for each number of threads; processes share the cores anyway.
    is_fixed = threads is not None or trainer.options.compile or trainer.ranks.world > 1
    if is_fixed or trainer.device.type != "cpu":
        return trainer.run(reporter, should_stop)
    count = ThreadCount()

    def after_step(seconds: float) -> None:
        changed = count.after_step(seconds)
        if changed is not None:
            reporter.line.say(changed)

    try:
        return trainer.run(reporter, should_stop, after_step)
    finally:
        count.close()
