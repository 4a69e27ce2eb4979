"""Batches made ahead: their patches, their order, the thread that makes them."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import TINY, scrambled

import stlm_models.presets
import stlm_models.train
from stlm_models import BytePatcher, ModelConfig
from stlm_models.checkpoint import load_checkpoint
from stlm_models.data.corpus import Corpus, load_corpus
from stlm_models.data.loader import Batch, Loader, patcher_of
from stlm_models.data.windows import TrainingWindows
from stlm_models.training.trainer import Trainer, TrainOptions

CPU = torch.device("cpu")
TEXTS = [
    b"Zo\xc3\xab sat, 12_345 times;\n\n  ",
    b"extraordinarilylong " * 9,
    b"x" * 70,
    b"a. b! " * 20,
]
FIXED = dataclasses.replace(TINY, patch_rule="fixed", patch_size=3, max_patch_len=None)
FEW_SLOTS = 12


def windows(config: ModelConfig = TINY, max_patches: int | None = None) -> TrainingWindows:
    patcher = patcher_of(config)
    if max_patches is not None:
        patcher = BytePatcher("space", max_patch_len=config.max_patch_len, max_patches=max_patches)
    return TrainingWindows(TEXTS, context=config.context, batch_size=3, seed=1, patcher=patcher)


def assert_same(got: Batch, want: Batch) -> None:
    assert got.patches is not None
    assert want.patches is not None
    for a, b in (
        (got.byte_ids, want.byte_ids),
        (got.targets, want.targets),
        (got.cu_seqlens, want.cu_seqlens),
        *zip(got.patches, want.patches, strict=True),
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stlm-loader")]


class TestPatches:
    @pytest.mark.parametrize("config", [TINY, FIXED], ids=["space", "fixed"])
    def test_are_those_of_the_model_and_give_its_loss(self, config: ModelConfig) -> None:
        model, made = scrambled(config), windows(config)
        for step in range(6):
            batch = made.batch(step)
            alone = dataclasses.replace(
                batch, patches=model.patcher(batch.byte_ids, batch.cu_seqlens)
            )
            assert_same(batch, alone)
            given, own = (
                model(batch.byte_ids, batch.targets, cu_seqlens=batch.cu_seqlens, patches=patches)
                for patches in (batch.patches, None)
            )
            assert torch.equal(given[0], own[0])
            assert torch.equal(given[1], own[1])

    def test_a_model_without_a_rule_of_its_own(self) -> None:
        flat, given = (SimpleNamespace(patch_rule=rule) for rule in ("none", "external"))
        assert patcher_of(flat) is None  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r'patcher: expected one of your own .* "external"'):
            patcher_of(given)  # type: ignore[arg-type]
        made = TrainingWindows(TEXTS, context=32, batch_size=2, seed=0)
        assert made.batch(0).patches is None
        assert int(made.batch(0).lost_patches) == 0

    def test_a_capacity_keeps_shapes_and_counts_what_is_lost(self) -> None:
        exact, few, many = windows(), windows(max_patches=FEW_SLOTS), windows(max_patches=90)
        for step in range(8):
            batches = exact.batch(step), few.batch(step), many.batch(step)
            found, kept, spare = (batch.patches for batch in batches)
            assert found is not None
            assert kept is not None
            assert spare is not None
            assert kept.cu_patchlens.shape == (FEW_SLOTS + 1,)
            assert spare.cu_patchlens.shape == (91,)
            n_patches = len(found.cu_patchlens) - 1
            assert [int(x.n_patches) for x in (found, kept, spare)] == [n_patches] * 3
            lost = [int(batch.lost_patches) for batch in batches]
            assert lost == [0, n_patches - FEW_SLOTS, 0]
            assert n_patches > FEW_SLOTS

    def test_a_capacity_leaves_nothing_of_a_batch_to_vary(self) -> None:
        model, exact, static = scrambled(), windows(), windows(max_patches=90)
        shapes = set()
        for step in range(8):
            batch, other = static.batch(step), exact.batch(step)
            assert batch.patches is not None
            tensors = (batch.byte_ids, batch.targets, batch.cu_seqlens, *batch.patches)
            shapes.add(tuple(tuple(x.shape) for x in tensors))
            assert batch.cu_seqlens.unique().tolist() == other.cu_seqlens.tolist()
            losses = [
                model(x.byte_ids, x.targets, cu_seqlens=x.cu_seqlens, patches=x.patches)[0]
                for x in (batch, other)
            ]
            torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        assert len(shapes) == 1


class TestLoader:
    def test_gives_each_index_its_batch_in_any_order(self) -> None:
        made = windows()
        loader = Loader(made.batch, CPU)
        for index in (0, 1, 2, 7, 8, 3, 3, 0):
            assert_same(loader.batch(index), made.batch(index))
        loader.close()

    def test_makes_no_more_than_two_ahead(self) -> None:
        asked: list[int] = []
        third = threading.Event()

        def make(index: int) -> Batch:
            asked.append(index)
            if len(asked) == 3:
                third.set()
            return windows().batch(index)

        loader = Loader(make, CPU)
        loader.batch(4)
        assert third.wait(10)
        assert sorted(loader._made) == [5, 6]
        loader.close()
        assert asked == [4, 5, 6]
        assert not loader_threads()
        assert_same(loader.batch(5), windows().batch(5))  # opens again
        loader.close()

    def test_what_the_thread_raises_reaches_the_caller_at_its_step(self) -> None:
        def make(index: int) -> Batch:
            if index == 2:
                raise OSError("no such block")
            return windows().batch(index)

        loader = Loader(make, CPU)
        for index in (0, 1):
            loader.batch(index)
        with pytest.raises(OSError, match="no such block"):
            loader.batch(2)
        assert_same(loader.batch(3), windows().batch(3))
        loader.close()


class TestTrainer:
    corpus = Corpus("texts", TEXTS, [])
    patcher = BytePatcher("space", max_patch_len=5, max_patches=FEW_SLOTS)

    def test_hands_the_patches_over_and_ends_the_thread(self) -> None:
        trainer = Trainer(TINY, self.corpus, TrainOptions(steps=3, batch_size=2))
        patched: list[object] = []
        trainer.model.patcher.register_forward_hook(lambda *call: patched.append(call))
        assert trainer.run()
        assert not patched
        assert not loader_threads()

    def test_fails_with_its_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreadable(windows: TrainingWindows, index: int) -> Batch:
            raise OSError("no such block")

        monkeypatch.setattr(TrainingWindows, "batch", unreadable)
        with pytest.raises(OSError, match="no such block"):
            Trainer(TINY, self.corpus, TrainOptions(steps=3, batch_size=2)).run()
        assert not loader_threads()

    def test_counts_the_patches_of_a_rule_of_its_own(self) -> None:
        options = TrainOptions(steps=3, batch_size=2)
        trainer = Trainer(TINY, self.corpus, options, patcher=self.patcher)
        exact = Trainer(TINY, self.corpus, options)
        for step in range(3):
            found = exact.windows.batch(step).patches
            assert found is not None
            lost = trainer.train_step().lost_patches
            assert int(lost) == max(0, len(found.cu_patchlens) - 1 - FEW_SLOTS) > 0
        assert exact.train_step().lost_patches is None
        trainer.loader.close()
        exact.loader.close()

    def test_the_command_reports_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)
        monkeypatch.setattr("stlm_models.training.trainer.patcher_of", lambda config: self.patcher)
        monkeypatch.setattr(stlm_models.train, "FINAL_SAMPLE_BYTES", 4)
        text, run = tmp_path / "text.txt", tmp_path / "run"
        text.write_bytes(b"".join(TEXTS))
        arguments = ["--data", str(text), "--out", str(run), "--steps", "3", "--batch-size", "2"]
        assert stlm_models.train.main([*arguments, "--precision", "fp32"]) == 0
        record = json.loads((run / "metrics.jsonl").read_text())
        made = Trainer(TINY, load_corpus([str(text)]), TrainOptions(steps=3, batch_size=2)).windows
        lost = [int(made.batch(step).lost_patches) for step in range(3)]
        assert record["lost_patches"] == sum(lost) > max(lost)
        told = f"warning: {record['lost_patches']} patches since the last record found no slot"
        assert told in capsys.readouterr().err
        assert load_checkpoint(run).state["step"] == 3


def test_the_thread_takes_one_core() -> None:
    """A second team of threads beside the model's makes every step of it wait."""
    seen: list[int] = []

    def make(index: int) -> Batch:
        seen.append(torch.get_num_threads())
        return Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = Loader(make, torch.device("cpu"))
        loader.batch(0)
        loader.close()
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
