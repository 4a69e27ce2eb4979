"""ThreadCount finds the fastest number of threads on machines of a few simple laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stlm_models.config import ModelConfig
from stlm_models.data.corpus import Corpus
from stlm_models.training.threads import LONGEST_WAIT, ThreadCount
from stlm_models.training.trainer import Trainer, TrainOptions


def quiet(threads: int) -> float:
    return 0.2 + 1 / threads


def one_core_taken(cores: int) -> Callable[[int], float]:
    """The thread on the taken core is seldom there, and all others wait for it."""
    return lambda threads: quiet(threads) if threads < cores else 3 * quiet(threads)


def run(count: ThreadCount, law: Callable[[int], float], steps: int, now: list[int]) -> float:
    """Seconds of so many steps under a law of threads."""
    total = 0.0
    for _ in range(steps):
        seconds = law(now[0])
        count.after_step(seconds)
        total += seconds
    return total


def machine(most: int) -> tuple[ThreadCount, list[int]]:
    now = [most]

    def set_threads(wanted: int) -> None:
        assert 1 <= wanted <= most
        now[0] = wanted

    return ThreadCount(most, set_threads), now


@pytest.mark.parametrize("cores", [1, 2, 4, 16])
def test_a_quiet_machine_keeps_its_threads(cores: int) -> None:
    count, now = machine(cores)
    seconds = run(count, quiet, 1000, now)
    assert count.count == cores
    assert seconds <= 1.03 * 1000 * quiet(cores)  # what the trials cost


@pytest.mark.parametrize("cores", [2, 4, 16])
def test_a_taken_core_is_left_and_taken_back(cores: int) -> None:
    count, now = machine(cores)
    busy = one_core_taken(cores)
    run(count, quiet, 200, now)
    run(count, busy, 2, now)
    assert count.count < cores, "one slow step and one trial are enough"
    seconds = run(count, busy, 200, now)
    assert seconds < 1.4 * 200 * min(map(busy, range(1, cores + 1)))
    run(count, quiet, 4 * LONGEST_WAIT, now)
    assert count.count == cores


def test_the_first_step_decides_nothing() -> None:
    """The first step compiles and allocates: whatever follows looks faster."""
    count, now = machine(2)
    count.after_step(100.0)
    assert now == [2]
    assert run(count, quiet, 3, now) == pytest.approx(3 * quiet(2))


def test_a_change_is_said() -> None:
    count, now = machine(2)
    for _ in range(5):
        assert count.after_step(1.0) is None
    assert now == [1], "a trial"
    line = count.after_step(0.5)
    assert line is not None
    assert line.startswith("threads: 1 instead of 2: a step took 0.50 s after 1.00 s")
    count.close()
    assert now == [2]


def test_training_tells_its_steps_and_gives_the_threads_back() -> None:
    config = ModelConfig(
        byte_dim=16, core_layers=1, core_dim=16, core_heads=1, core_kv_heads=1, core_ff=16,
        decoder_layers=1, decoder_ff=16, context=32,
    )  # fmt: skip
    trainer = Trainer(config, Corpus("words", [b"some words " * 20], []), TrainOptions(steps=3))
    seconds: list[float] = []
    before = torch.get_num_threads()
    trainer.run(after_step=seconds.append)
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert torch.get_num_threads() == before
