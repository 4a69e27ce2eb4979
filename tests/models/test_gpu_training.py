"""Training on a GPU: a captured step, no waiting for it, the first step's time.

Written where no GPU is; what can run on a CPU is rehearsed there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from helpers.norms import assert_same_gradients
from helpers.small_training import CORPUS, SMALL
from helpers.synchronisation import synchronisation_is_an_error
from torch import Tensor

from bench.harness.model_jobs import fill_zeros
from stlm_models import BytePatcher
from stlm_models.data.corpus import Corpus
from stlm_models.data.loader import Batch
from stlm_models.presets import preset
from stlm_models.training.trainer import Trainer, TrainOptions

ON_GPU = pytest.mark.lanes("gpu")
SECONDS_TO_THE_FIRST_STEP = 60
Step = Callable[[], None]


def trainer_of_static_shapes() -> Trainer:
    patcher = BytePatcher("space", max_patch_len=5, max_patches=40)
    trainer = Trainer(SMALL, CORPUS, TrainOptions(steps=9, batch_size=2), patcher=patcher)
    fill_zeros(trainer.model)
    return trainer


def tensors_of(batch: Batch) -> list[Tensor]:
    assert batch.patches is not None
    return [batch.byte_ids, batch.targets, batch.cu_seqlens, *batch.patches]


def backward(trainer: Trainer, batch: Batch) -> None:
    loss_sum, n_valid = trainer.model(
        batch.byte_ids, batch.targets, cu_seqlens=batch.cu_seqlens, patches=batch.patches
    )
    (loss_sum / n_valid).backward()


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    named = trainer.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def replays_equal_fresh_steps(capture: Callable[[Trainer, Step], Step]) -> None:
    trainer = trainer_of_static_shapes()
    static = trainer.windows.batch(0).to(trainer.device)
    replay = capture(trainer, lambda: backward(trainer, static))
    for index in (1, 2, 3):
        batch = trainer.windows.batch(index).to(trainer.device)
        for old, new in zip(tensors_of(static), tensors_of(batch), strict=True):
            old.copy_(new)
        replay()
        got = gradients(trainer)
        fresh = trainer_of_static_shapes()
        backward(fresh, batch)
        want = gradients(fresh)
        for name, grad in want.items():
            assert grad.any(), f"step {index}, {name}: nothing to compare"
        assert_same_gradients(got, want)


def captured(trainer: Trainer, step: Step) -> Step:
    """The step as a CUDA graph, whose replay writes the gradients anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    trainer.model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def called_again(trainer: Trainer, step: Step) -> Step:
    def replay() -> None:
        trainer.model.zero_grad(set_to_none=True)
        step()

    return replay


@ON_GPU
def test_a_step_is_captured_and_replayed_on_other_batches() -> None:
    replays_equal_fresh_steps(captured)


def test_rehearsal_of_the_replay() -> None:
    replays_equal_fresh_steps(called_again)


@ON_GPU
def test_forward_and_backward_wait_for_nothing() -> None:
    trainer = trainer_of_static_shapes()
    batch = trainer.loader.batch(0)
    backward(trainer, batch)  # compiles as well
    with synchronisation_is_an_error():
        batch = trainer.loader.batch(1)
        backward(trainer, batch)
    trainer.loader.close()


@ON_GPU
@pytest.mark.exclusive
def test_the_first_10m_step_is_there_within_a_minute() -> None:
    corpus = Corpus("words", [b"the cat sat on the mat, and the dog sat by the door. " * 4000], [])
    started = time.monotonic()
    trainer = Trainer(preset("10m"), corpus, TrainOptions(steps=1, batch_size=8, precision="bf16"))
    loss = float(trainer.train_step().loss)
    assert time.monotonic() - started < SECONDS_TO_THE_FIRST_STEP
    assert 0 < loss < 7
    trainer.loader.close()
