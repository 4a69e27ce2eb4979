"""Train an `STLM` on a corpus for so many minutes or steps, from the start or from a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, load_tensors, save_checkpoint
from .config import ModelConfig
from .data import Corpus, Loader, Patcher, TrainingWindows, patcher_of, sha256_of
from .model import STLM
from .optim import Optimizers, lr_scale
from .parallel import Ranks, mean_loss

ALONE = Ranks()
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainOptions:
    """How to train; exactly one of minutes and steps ends it.

    Args:
        minutes: of training, over all resumed parts together.
        steps: optimiser steps.
        rows: windows of `context` bytes in a step, over all processes.
        seed: of the initial parameters and the order of the windows.
        muon_lr, adamw_lr: peak learning rates.
        precision: "bf16" computes under autocast; parameters are fp32 either way.

    Raises:
        ValueError: for a value out of range.
    """

    minutes: float | None = None
    steps: int | None = None
    rows: int = 8
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 0.004
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            got = f"minutes {self.minutes} and steps {self.steps}"
            raise ValueError(f"minutes, steps: expected exactly one of them, got {got}")
        for name in ("minutes", "steps", "rows", "muon_lr", "adamw_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        if self.precision not in PRECISIONS:
            expected = f"one of {sorted(PRECISIONS)}"
            raise ValueError(f"precision: expected {expected}, got {self.precision!r}")


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all processes. Who reads a value of its tensors waits for the step.

    Args:
        loss: 0-d, mean nats per valid byte.
        n_bytes: read.
        lost_patches: 0-d, patches that found no slot; None where patches have no capacity.
    """

    loss: Tensor
    n_bytes: int
    lost_patches: Tensor | None = None


class Trainer:
    """A model in training and all that its next step depends on.

    Args:
        config: the model's shape.
        corpus: of which the `train` split is used.
        options: see `TrainOptions`.
        ranks: the processes that train together, each with the same other arguments.
        patcher: finds the patches by a rule of your own; None is that of the config.

    Raises:
        ValueError: where the corpus is shorter than a window, or rows cannot be shared evenly.
    """

    def __init__(
        self,
        config: ModelConfig,
        corpus: Corpus,
        options: TrainOptions,
        ranks: Ranks = ALONE,
        patcher: Patcher | None = None,
    ) -> None:
        patcher = patcher_of(config) if patcher is None else patcher
        self.patch_capacity: int | None = getattr(patcher, "capacity", None)
        self.windows = TrainingWindows(
            corpus.train,
            context=config.context,
            rows=options.rows,
            seed=options.seed,
            patcher=patcher,
            rank=ranks.rank,
            world=ranks.world,
        )
        self.config, self.corpus, self.options, self.ranks = config, corpus, options, ranks
        self.step, self.seconds = 0, 0.0
        self.device = ranks.device
        self.loader = Loader(self.windows.batch, self.device)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self.model = STLM(config)
        self.model.to(self.device)
        self.wrapped = ranks.wrap(self.model)
        self.optimizers = Optimizers(self.model, muon_lr=options.muon_lr, adamw_lr=options.adamw_lr)

    @property
    def progress(self) -> float:
        """The part of the budget that is used, from 0 to 1 and a little beyond."""
        if self.options.steps is not None:
            return self.step / self.options.steps
        assert self.options.minutes is not None
        return self.seconds / (60 * self.options.minutes)

    def train_step(self) -> StepResult:
        """Read a batch, move the parameters."""
        batch = self.loader.batch(self.step)
        self.model.train()
        with self.autocast():
            loss_sum, n_valid = self.wrapped(
                batch.byte_ids,
                batch.targets,
                cu_seqlens=batch.cu_seqlens,
                patches=batch.patches,
            )
        loss, mean = mean_loss(loss_sum, n_valid)
        loss.backward()
        self.optimizers.step(lr_scale(self.progress))
        self.step += 1
        lost = None if self.patch_capacity is None else self.ranks.total(batch.lost_patches)
        return StepResult(mean, batch.n_bytes * self.ranks.world, lost)

    def run(
        self,
        report: Callable[[StepResult], None] = lambda result: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Step until the budget is used, or until should_stop.

        `report` runs after each step, and its time counts: the budget is what a user waits for.

        Returns:
            True where the budget is used.
        """
        started = time.monotonic() - self.seconds
        self.seconds, stop = self.ranks.agree(self.seconds, should_stop())
        try:
            while self.progress < 1 and not stop:
                result = self.train_step()
                self.seconds = time.monotonic() - started
                report(result)
                self.seconds, stop = self.ranks.agree(time.monotonic() - started, should_stop())
        finally:
            self.loader.close()
        return self.progress >= 1

    def autocast(self) -> torch.autocast:
        """The context in which the model computes in the chosen precision."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"
        )

    def save(self, run: Path) -> Path:
        """Write a checkpoint into the run folder."""
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "options": dataclasses.asdict(self.options),
            "train_sha256": sha256_of(self.corpus.train),
        }
        tensors = self.optimizers.state_tensors()
        return save_checkpoint(
            run, Checkpoint(self.config, self.model.state_dict(), tensors, state)
        )

    @classmethod
    def resume(
        cls, checkpoint: Checkpoint, corpus: Corpus, options: TrainOptions, ranks: Ranks = ALONE
    ) -> Trainer:
        """A trainer that goes on where the checkpoint was written.

        Raises:
            ValueError: where the corpus is another one, or tensors do not fit.
        """
        state = checkpoint.state
        if sha256_of(corpus.train) != state["train_sha256"]:
            raise ValueError(
                f"data: expected the bytes that the run began with, sha256 {state['train_sha256']},"
                f" got {sha256_of(corpus.train)}"
            )
        trainer = cls(checkpoint.config, corpus, options, ranks)
        load_tensors(trainer.model, checkpoint.model)
        trainer.optimizers.load_state_tensors(checkpoint.optimizer)
        trainer.step, trainer.seconds = int(state["step"]), float(state["seconds"])
        return trainer


def fastest_precision() -> str:
    """ "bf16" where this machine multiplies such matrices clearly faster than fp32 ones."""
    if torch.cuda.is_available():
        return "bf16"
    return (
        "bf16" if 1.3 * _matmul_seconds(torch.bfloat16) < _matmul_seconds(torch.float32) else "fp32"
    )


def _matmul_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return min(times)
