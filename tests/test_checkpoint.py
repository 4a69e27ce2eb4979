"""Checkpoints: whole or absent, verified, and never pickled."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import TINY, ids_of, scrambled
from safetensors.torch import load_file

from stlm_models import STLM, ModelConfig
from stlm_models.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    save_checkpoint,
)


def checkpoint_at(step: int, model: STLM | None = None) -> Checkpoint:
    model = scrambled() if model is None else model
    optimizer = {"muon.x.momentum_buffer": torch.full((2, 3), float(step))}
    return Checkpoint(model.config, model.state_dict(), optimizer, {"step": step})


def test_round_trip(tmp_path: Path) -> None:
    model = scrambled()
    folder = save_checkpoint(tmp_path, checkpoint_at(7, model))
    assert folder == latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000007"
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == TINY
    assert loaded.state == {"step": 7}
    assert torch.equal(loaded.optimizer["muon.x.momentum_buffer"], torch.full((2, 3), 7.0))
    again = load_model(tmp_path)
    ids = ids_of(b"some bytes")
    assert torch.equal(again(ids), model(ids))
    assert not again.training


def test_the_tied_table_is_stored_once(tmp_path: Path) -> None:
    model = scrambled()
    folder = save_checkpoint(tmp_path, checkpoint_at(1, model))
    stored = load_file(folder / "model.safetensors")
    table = model.embedding.weight
    assert [name for name, tensor in stored.items() if tensor.shape == table.shape] == [
        "embedding.weight"
    ]
    assert sum(map(torch.numel, stored.values())) == sum(map(torch.numel, model.parameters()))


def test_another_checkpoint_of_the_same_step_is_refused(tmp_path: Path) -> None:
    first = checkpoint_at(7)
    folder = save_checkpoint(tmp_path, first)
    later = dataclasses.replace(first, state={"step": 7, "seconds": 2.0})
    assert save_checkpoint(tmp_path, later) == folder, "the same parameters are kept as they are"
    other = dataclasses.replace(first, optimizer={"muon.x.momentum_buffer": torch.zeros(2, 3)})
    with pytest.raises(FileExistsError, match="step-00000007 holds another one of the same step"):
        save_checkpoint(tmp_path, other)
    assert torch.equal(
        load_checkpoint(tmp_path).optimizer["muon.x.momentum_buffer"].unique(), torch.tensor([7.0])
    )


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        save_checkpoint(tmp_path, checkpoint_at(step))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-100000000"]
    assert load_checkpoint(tmp_path).state["step"] == 100_000_000


class FailAt:
    """Fails the n-th of all writing system calls, as a full disk or a kill would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
        self.left = n
        self.error = error
        for owner, name in (
            (os, "fsync"),
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "open"),
        ):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Any) -> Any:
        def failing(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise self.error
            return function(*args, **kwargs)

        return failing


class Killed(BaseException):
    """Stands for kill -9: no handler of OSError cleans up after it."""


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_whenever_a_save_fails_a_whole_checkpoint_loads(
    tmp_path: Path, error: BaseException
) -> None:
    save_checkpoint(tmp_path, checkpoint_at(1))
    outcomes = set()
    for n in range(1, 40):
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing = FailAt(monkeypatch, n, error)
            try:
                save_checkpoint(tmp_path, checkpoint_at(n + 1))
                failed = False
            except type(error):
                failed = True
        step = load_checkpoint(tmp_path).state["step"]
        loaded = load_checkpoint(tmp_path).optimizer["muon.x.momentum_buffer"]
        assert (loaded == step).all()
        outcomes.add((failed, step == n + 1))
        if failed and isinstance(error, OSError) and step != n + 1:
            names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
            assert not [name for name in names if name.startswith(".unfinished")]
        if not failed and failing.left > 0:
            break
    else:
        pytest.fail("the last save should have come through")
    assert (True, False) in outcomes
    assert (False, True) in outcomes
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:08d}"]


def save_until_killed(run: Path, model: STLM) -> None:
    """In a process of its own, which only a signal ends."""
    try:
        for step in range(1, 1_000_000):
            save_checkpoint(run, checkpoint_at(step, model))
    finally:
        os._exit(1)


def test_kill_minus_nine_at_any_moment(tmp_path: Path, full: bool) -> None:
    """The last complete checkpoint loads, and it is never older than the one before the kill."""
    randomly, model = random.Random(1), scrambled()
    for _ in range(50 if full else 5):
        child = os.fork()
        if child == 0:
            save_until_killed(tmp_path, model)
        while latest_checkpoint(tmp_path) is None:
            time.sleep(0.001)
        before = newest_step(tmp_path)
        time.sleep(randomly.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = load_checkpoint(tmp_path)
        assert found.state["step"] >= before
        assert (found.optimizer["muon.x.momentum_buffer"] == found.state["step"]).all()
        assert found.model.keys() == model.state_dict().keys()
        shutil.rmtree(tmp_path / "checkpoints")


def newest_step(run: Path) -> int:
    """Of a folder that is being written to."""
    folder = latest_checkpoint(run)
    return 0 if folder is None else int(folder.name.rpartition("-")[2])


FILES = ("model.safetensors", "optimizer.safetensors", "config.json", "state.json", "manifest.json")


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_a_cut_and_a_missing_file(tmp_path: Path, file: str) -> None:
    folder = save_checkpoint(tmp_path, checkpoint_at(1))
    whole = (folder / file).read_bytes()
    randomly = random.Random(0)
    for _ in range(20):
        at = randomly.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << randomly.randrange(8)
        (folder / file).write_bytes(flipped)
        with pytest.raises(ValueError, match=r"checkpoint: .*damaged"):
            load_checkpoint(tmp_path)
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"checkpoint: .*{file} is damaged"):
        load_checkpoint(tmp_path)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint: expected a file .*{file}, found none"):
        load_checkpoint(tmp_path)


def test_a_foreign_configuration(tmp_path: Path) -> None:
    wider = dataclasses.replace(TINY, core_ff=48)
    checkpoint = dataclasses.replace(checkpoint_at(1), config=wider)
    save_checkpoint(tmp_path, checkpoint)
    message = r"checkpoint: expected the tensors of its own configuration, but core\.blocks\.0\..*"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_config_with_a_field_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelConfig, "to_dict", lambda self: {"experts": 8})
    save_checkpoint(tmp_path, checkpoint_at(1))
    with pytest.raises(ValueError, match=r"config: expected the fields of .* \['experts'\]"):
        load_checkpoint(tmp_path)
