"""Train an `STLM` on a corpus for so many minutes or steps, from the start or from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import RUN, Checkpoint, load_tensors, save_checkpoint
from ..config import IGNORED, ModelConfig
from ..data.corpus import Corpus
from ..data.loader import Batch, Loader, Patcher, patcher_of
from ..data.windows import Document, TrainingWindows
from ..data.words import WordVocabulary
from ..model import STLM
from ..parallel import Ranks, mean_loss
from .optim import SCHEDULES, Optimizers, lr_scale
from .recall import Recall

ALONE = Ranks()
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


POSITIVE = (
    "minutes",
    "steps",
    "batch_size",
    "muon_lr",
    "adamw_lr",
    "grad_accum_steps",
    "max_grad_norm",
)
"""Options that are more than 0 where they are given."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of training; exactly one of minutes and steps ends it.

    Args:
        minutes: of training, over all resumed parts together.
        steps: optimiser steps.
        batch_size: windows of `context` bytes in a step, over all processes.
        seed: of the initial parameters and the order of the windows.
        muon_lr, adamw_lr: peak learning rates.
        precision: "bf16" computes under autocast, and Muon multiplies in it; parameters are fp32
            either way.
        grad_accum_steps: a step reads its windows in this many parts, one after the other, which
            needs less memory; each valid byte of the step counts the same.
        schedule: of the learning rates, see `stlm_models.training.optim.lr_scale`.
        max_grad_norm: the norm of all gradients together is at most this; None is no limit.
        compile: run the model through torch.compile. On a CPU give `max_patches`: attention
            is compiled there for each number of patches anew.
        checkpointing: as in `ModelConfig`, where the config does not say so already.

    Raises:
        ValueError: for a value out of range.

    >>> options = TrainOptions(steps=100, batch_size=4, precision="bf16")
    >>> options.schedule
    'wsd'
    """

    minutes: float | None = None
    steps: int | None = None
    batch_size: int = 8
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 0.004
    precision: str = "fp32"
    grad_accum_steps: int = 1
    schedule: str = "wsd"
    max_grad_norm: float | None = None
    compile: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            got = f"minutes {self.minutes} and steps {self.steps}"
            raise ValueError(f"minutes, steps: expected exactly one of them, got {got}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
            if value == math.inf and name != "max_grad_norm":  # schedules need an end
                raise ValueError(f"{name}: expected a finite number, got {value}")
        if not 0 <= self.seed < 2**64:  # what torch's generator takes
            raise ValueError(f"seed: expected 0 to 2**64 - 1, got {self.seed}")
        for name, choices in (("precision", sorted(PRECISIONS)), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class StepResult:
    """Result of a step, over all processes. Reading a value of its tensors waits for the step.

    Words count as bytes by the mean length of an id in the corpus.

    Args:
        loss: 0-d, mean nats per valid byte.
        n_bytes: read.
        lost_patches: 0-d, patches that found no slot; None where `max_patches` is None.
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
        ValueError: where the corpus is shorter than a window, or the batch cannot be shared evenly.

    >>> corpus = Corpus("a text", [b"to train on " * 9], [b"to judge by"])
    >>> config = ModelConfig(core_layers=1, decoder_layers=1, context=32)
    >>> Trainer(config, corpus, TrainOptions(steps=1, batch_size=1)).step
    0
    """

    def __init__(
        self,
        config: ModelConfig,
        corpus: Corpus,
        options: TrainOptions,
        ranks: Ranks = ALONE,
        patcher: Patcher | None = None,
    ) -> None:
        self.words: WordVocabulary | None = None
        documents: Sequence[Document] = corpus.train
        if config.tokens == "words":
            self.words = WordVocabulary.of(corpus.train, config.vocab_size)
            documents = [self.words.encode(document) for document in corpus.train]
        self.bytes_per_id = sum(map(len, corpus.train)) / max(1, sum(map(len, documents)))
        patcher = patcher_of(config) if patcher is None else patcher
        self.max_patches: int | None = getattr(patcher, "max_patches", None)
        recall = None
        if config.match_sizes or config.memory_sizes:
            recall = Recall(corpus.train, config)
        self.windows = TrainingWindows(
            documents,
            context=config.context,
            batch_size=_windows_at_once(options, ranks),
            seed=options.seed,
            patcher=patcher,
            recall=recall,
            rank=ranks.rank,
            world=ranks.world,
        )
        self.config, self.corpus, self.options, self.ranks = config, corpus, options, ranks
        self.step, self.seconds = 0, 0.0
        self.run_id: str | None = secrets.token_hex(8)
        """Id that checkpoints of this run are known by; None in one that 0.1.0 began."""
        self.device = ranks.device
        self.loader = Loader(self.windows.batch, self.device)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self.model = STLM(config)
        if self.model.memory is not None:
            self.model.memory.remember(corpus.train)
        if options.checkpointing:
            self.model.checkpointing = True
        self.model.to(self.device)
        self.wrapped = ranks.wrap(self.model)
        self.compute = torch.compile(self.wrapped) if options.compile else self.wrapped
        self.optimizers = Optimizers(
            self.model,
            muon_lr=options.muon_lr,
            adamw_lr=options.adamw_lr,
            muon_dtype=PRECISIONS[options.precision],
        )

    @property
    def progress(self) -> float:
        """The part of the budget that is used, from 0 to 1 and a little beyond."""
        if self.options.steps is not None:
            return self.step / self.options.steps
        assert self.options.minutes is not None
        return self.seconds / (60 * self.options.minutes)

    def train_step(self) -> StepResult:
        """Read the step's batches, move the parameters."""
        parts = self.options.grad_accum_steps
        batches = [self.loader.batch(self.step * parts + part) for part in range(parts)]
        if self.options.compile and self.max_patches is None:
            batches = [batch.with_open_sizes() for batch in batches]
        n_valid = _total([(batch.targets != IGNORED).sum() for batch in batches])
        self.model.train()
        means = [
            self._add_gradients(batch, n_valid, is_last=batch is batches[-1]) for batch in batches
        ]
        if self.options.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizers.step(lr_scale(self.progress, self.options.schedule))
        self.step += 1
        n_ids = sum(batch.n_bytes for batch in batches) * self.ranks.world
        loss = _total(means)
        return StepResult(
            loss if self.bytes_per_id == 1 else loss / self.bytes_per_id,
            round(n_ids * self.bytes_per_id),
            self._lost_patches(batches),
        )

    def _add_gradients(self, batch: Batch, n_valid: Tensor, *, is_last: bool) -> Tensor:
        """Backward of a part of a step of n_valid bytes; its share of the step's mean loss."""
        # Processes exchange gradients at every backward pass; once a step is enough.
        waiting: AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel) and not is_last:
            waiting = self.wrapped.no_sync()
        with waiting:
            with self.autocast():
                loss_sum, _ = self.compute(
                    batch.byte_ids,
                    batch.targets,
                    cu_seqlens=batch.cu_seqlens,
                    patches=batch.patches,
                    followers=batch.followers,
                )
            loss, mean = mean_loss(loss_sum, n_valid)
            loss.backward()
        return mean

    def _lost_patches(self, batches: list[Batch]) -> Tensor | None:
        if self.max_patches is None:
            return None
        return self.ranks.total(_total([batch.lost_patches for batch in batches]))

    def run(
        self,
        report: Callable[[StepResult], None] = lambda result: None,
        should_stop: Callable[[], bool] = lambda: False,
        after_step: Callable[[float], object] = lambda seconds: None,
    ) -> bool:
        """Step until the budget is used, or until should_stop.

        `report` runs after each step, and its time counts: the budget is what a user waits for.
        `after_step` gets the seconds of each step by itself.

        Returns:
            True where the budget is used.
        """
        started = time.monotonic() - self.seconds
        self.seconds, stop = self.ranks.agree(self.seconds, should_stop())
        try:
            while self.progress < 1 and not stop:
                began = time.monotonic()
                result = self.train_step()
                after_step(time.monotonic() - began)
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
        """Write a checkpoint into the run folder, which must not be another run's."""
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "options": dataclasses.asdict(self.options),
            "train_sha256": self.corpus.train_sha256,
        }
        if self.run_id is not None:
            state[RUN] = self.run_id
        tensors = self.optimizers.state_tensors()
        return save_checkpoint(
            run, Checkpoint(self.config, self.model.state_dict(), tensors, state, self.words)
        )

    @classmethod
    def resume(
        cls,
        checkpoint: Checkpoint,
        corpus: Corpus,
        options: TrainOptions,
        ranks: Ranks = ALONE,
        patcher: Patcher | None = None,
    ) -> Trainer:
        """A trainer that goes on where the checkpoint was written, with the patcher it had.

        Raises:
            ValueError: where the corpus is another one, or tensors do not fit.
        """
        state = checkpoint.state
        if corpus.train_sha256 != state["train_sha256"]:
            raise ValueError(
                f"data: expected the bytes that the run began with, sha256 {state['train_sha256']},"
                f" got {corpus.train_sha256}"
            )
        trainer = cls(checkpoint.config, corpus, options, ranks, patcher)
        if trainer.words != checkpoint.words:
            raise ValueError("checkpoint: expected the words that its data makes, got others")
        load_tensors(trainer.model, checkpoint.model)
        trainer.optimizers.load_state_tensors(checkpoint.optimizer)
        trainer.step, trainer.seconds = int(state["step"]), float(state["seconds"])
        trainer.run_id = state.get(RUN)
        return trainer


def _total(parts: list[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors; of one without a launch."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _windows_at_once(options: TrainOptions, ranks: Ranks) -> int:
    parts = options.grad_accum_steps
    if options.batch_size % (parts * ranks.world):
        expected = f"a multiple of {parts} parts x {ranks.world} processes"
        raise ValueError(f"batch_size: expected {expected}, got {options.batch_size}")
    return options.batch_size // parts
