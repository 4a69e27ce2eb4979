"""Training steps, timed in a process of its own.

Run by `bench.step_speed` beside any checkout of the library, the one on `PYTHONPATH`: of this one
it imports `turns` alone, and it prepares the process where its `train` does. The first line of
input says what to train; every other asks for a step, or for the peak of memory. Answers are lines
of JSON.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from stlm_models.config import ModelConfig

from . import turns

try:
    from stlm_models.data.corpus import load_corpus
    from stlm_models.training.trainer import Trainer, TrainOptions
except ImportError:  # commits before there were folders
    from stlm_models.trainer import Trainer, TrainOptions  # type: ignore[import-not-found,no-redef]

    from stlm_models.data import load_corpus  # type: ignore[no-redef]

try:
    from stlm_models.training.process import prepare_process
except ImportError:  # commits before it
    prepare_process = None  # type: ignore[assignment]

ROWS_NAMES = ("batch_size", "rows")
"""Names that the option for windows in a step has had."""


def main() -> None:
    settings, config = turns.begin()
    trainer = trainer_of(config, settings["batch_size"], settings["precision"])
    if prepare_process is not None:
        prepare_process()  # as late as in `train`: what loading needed once is given back
    turns.answer(lambda: turns.timed(lambda: step(trainer)))


def trainer_of(config: ModelConfig, batch_size: int, precision: str) -> Any:
    """Return a trainer whose rates stay at their peak: its budget has very many steps."""
    names = {field.name for field in fields(TrainOptions)}
    rows = next(name for name in ROWS_NAMES if name in names)
    options: dict[str, Any] = {"steps": 1 << 30, "precision": precision, rows: batch_size}
    return Trainer(config, load_corpus(None), TrainOptions(**options))


def step(trainer: Any) -> dict[str, float]:
    """Train a step."""
    result = trainer.train_step()
    return {"n_bytes": result.n_bytes, "loss": float(result.loss)}
