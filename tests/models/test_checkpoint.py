"""Checkpoints: whole or absent, verified, and never pickled."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TINY, ids_of, scrambled
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


def test_fields_of_early_runs_have_todays_names(tmp_path: Path) -> None:
    """Fields are read as the first commits of 0.1.0 wrote them."""
    folder = save_checkpoint(tmp_path, checkpoint_at(3))
    config = json.loads((folder / "config.json").read_text())
    config["patch_capacity"] = config.pop("max_patches")
    config["patch_rule"] = "given"
    state = {"step": 3, "options": {"rows": 4, "accumulate": 2, "clip": None, "seed": 1}}
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, values in (("config.json", config), ("state.json", state)):
        (folder / name).write_text(json.dumps(values))
        manifest[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = load_checkpoint(tmp_path)
    assert found.config.patch_rule == "external"
    assert found.state["options"] == {
        "batch_size": 4, "grad_accum_steps": 2, "max_grad_norm": None, "seed": 1,
    }  # fmt: skip


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class TestWhatIsTheUsers:
    """Case f04: whatever began with `step-` was read and deleted."""

    def test_copies_stay(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path, checkpoint_at(10))
        copies = ["step-00000010-best", "step-00000010 (copy)", "best", "step-0000000x", "step-1"]
        copies += ["step-000000010", "Step-00000010", ".unfinished-mine"]
        for name in copies:
            shutil.copytree(folder, folder.with_name(name))
        save_checkpoint(tmp_path, checkpoint_at(20))
        assert names_in(tmp_path) == sorted([*copies, "step-00000020"])
        assert load_checkpoint(tmp_path).state["step"] == 20

    def test_a_copy_under_the_name_of_another_step_stays(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path, checkpoint_at(10))
        shutil.copytree(folder, folder.with_name("step-00000015"))
        save_checkpoint(tmp_path, checkpoint_at(20))
        assert names_in(tmp_path) == ["step-00000015", "step-00000020"]

    def test_stray_files_are_ignored(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path, checkpoint_at(20))
        root = folder.parent
        (root / "step-00000020.tar").write_bytes(b"x")
        (root / "step-00000099").write_bytes(b"a file, no folder")
        (root / "step-00000098").mkdir()
        (root / "step-00000098" / "notes.txt").write_text("no manifest")
        (root / "step-00000097").symlink_to("nowhere")
        assert latest_checkpoint(tmp_path) == folder
        assert load_checkpoint(tmp_path).state["step"] == 20
        before = names_in(tmp_path)
        save_checkpoint(tmp_path, checkpoint_at(21))
        assert names_in(tmp_path) == sorted({*before, "step-00000021"} - {"step-00000020"})

    def test_a_checkpoint_with_a_file_of_the_user_stays(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path, checkpoint_at(10))
        (folder / "notes.txt").write_text("the best one")
        save_checkpoint(tmp_path, checkpoint_at(20))
        assert names_in(tmp_path) == ["step-00000010", "step-00000020"]
        assert (folder / "notes.txt").read_text() == "the best one"

    def test_a_link_to_a_checkpoint_is_read_and_stays(self, tmp_path: Path) -> None:
        elsewhere = save_checkpoint(tmp_path / "elsewhere", checkpoint_at(10))
        root = tmp_path / "run" / "checkpoints"
        root.mkdir(parents=True)
        (root / "step-00000010").symlink_to(elsewhere)
        assert load_checkpoint(tmp_path / "run").state["step"] == 10
        save_checkpoint(tmp_path / "run", checkpoint_at(20))
        assert names_in(tmp_path / "run") == ["step-00000010", "step-00000020"]
        assert load_checkpoint(tmp_path / "elsewhere").state["step"] == 10

    @pytest.mark.parametrize("kind", ["file", "folder", "link"])
    def test_a_name_that_is_taken(self, tmp_path: Path, kind: str) -> None:
        root = tmp_path / "checkpoints"
        root.mkdir()
        taken = root / "step-00000007"
        if kind == "file":
            taken.write_text("ours")
        elif kind == "folder":
            taken.mkdir()
        else:
            taken.symlink_to("nowhere")
        with pytest.raises(FileExistsError, match="step-00000007 is in the way"):
            save_checkpoint(tmp_path, checkpoint_at(7))
        assert names_in(tmp_path) == ["step-00000007"]

    def test_the_newest_is_the_one_of_most_steps(self, tmp_path: Path) -> None:
        """Names are not compared as text: step-100000000 comes before step-99999999 there."""
        for step in (99_999_999, 100_000_000):
            folder = save_checkpoint(tmp_path, checkpoint_at(step))
            (folder / "notes.txt").touch()  # so that it stays
        assert load_checkpoint(tmp_path).state["step"] == 100_000_000


def of_run(run_id: str | None, step: int) -> Checkpoint:
    state = {"step": step} if run_id is None else {"step": step, "run": run_id}
    return dataclasses.replace(checkpoint_at(step), state=state)


class TestRuns:
    @pytest.mark.parametrize("step", [5, 1000, 2000])
    @pytest.mark.parametrize(("ours", "theirs"), [("a", "b"), ("a", None), (None, "b")])
    def test_a_folder_of_another_run(
        self, tmp_path: Path, ours: str | None, theirs: str | None, step: int
    ) -> None:
        save_checkpoint(tmp_path, of_run(theirs, 1000))
        with pytest.raises(FileExistsError, match="step-00001000 is of another run: move it"):
            save_checkpoint(tmp_path, of_run(ours, step))
        assert names_in(tmp_path) == ["step-00001000"]

    @pytest.mark.parametrize("run_id", ["a", None])
    def test_a_later_checkpoint_is_not_replaced_by_an_earlier(
        self, tmp_path: Path, run_id: str | None
    ) -> None:
        save_checkpoint(tmp_path, of_run(run_id, 1000))
        with pytest.raises(FileExistsError, match="step-00001000 is later than step 5, which"):
            save_checkpoint(tmp_path, of_run(run_id, 5))
        assert names_in(tmp_path) == ["step-00001000"]

    def test_a_run_replaces_its_own(self, tmp_path: Path) -> None:
        for step in (5, 6):
            save_checkpoint(tmp_path, of_run("a", step))
        assert names_in(tmp_path) == ["step-00000006"]
        assert load_checkpoint(tmp_path).state == {"step": 6, "run": "a"}

    def test_a_checkpoint_without_a_readable_manifest(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path, of_run("a", 5))
        (folder / "manifest.json").write_text("{")
        with pytest.raises(FileExistsError, match=r"damaged: not JSON .*: move"):
            save_checkpoint(tmp_path, of_run("a", 6))
        assert names_in(tmp_path) == ["step-00000005"]

    def test_another_run_that_saves_in_between_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seen when older ones are dropped, since it came after the folder was looked at."""
        rename = Path.rename

        def late(path: Path, target: Path) -> Path:
            with monkeypatch.context() as undone:
                undone.setattr(Path, "rename", rename)
                save_checkpoint(tmp_path, of_run("b", 4))
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", late)
            save_checkpoint(tmp_path, of_run("a", 5))
        assert names_in(tmp_path) == ["step-00000004", "step-00000005"]


class TestReadingBesideASaver:
    def test_every_load_finds_a_whole_one(self, tmp_path: Path) -> None:
        model = scrambled()
        save_checkpoint(tmp_path, checkpoint_at(1, model))
        found: list[int] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                loaded = load_checkpoint(tmp_path)
                assert (loaded.optimizer["muon.x.momentum_buffer"] == loaded.state["step"]).all()
                found.append(loaded.state["step"])

        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(read)
            for step in range(2, 40):
                save_checkpoint(tmp_path, checkpoint_at(step, model))
            done.set()
            reading.result()
        assert found == sorted(found)

    @pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "state.json"])
    def test_the_newer_one_is_read_where_it_takes_the_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
    ) -> None:
        save_checkpoint(tmp_path, checkpoint_at(1))
        read_bytes = Path.read_bytes
        saved: list[Path] = []

        def late(path: Path) -> bytes:
            if path.name == file and not saved:
                saved.append(path)
                save_checkpoint(tmp_path, checkpoint_at(2))
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", late)
        assert load_checkpoint(tmp_path).state["step"] == 2

    def test_a_scan_between_two_names(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_checkpoint(tmp_path, checkpoint_at(1))
        iterdir, scans = Path.iterdir, itertools.count()

        def blind(path: Path) -> Any:
            return iter(()) if next(scans) < 2 else iterdir(path)

        monkeypatch.setattr(Path, "iterdir", blind)
        assert load_checkpoint(tmp_path).state["step"] == 1


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
            if function.__name__ == "open" and args[1:2] != ("wb",):
                return function(*args, **kwargs)  # which reads
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
    """Save in a process of its own, which only a signal ends."""
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
    """Return the newest step of a folder that is being written to."""
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
