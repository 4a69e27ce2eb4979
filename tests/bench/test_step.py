"""The step budget: every part is found, alone, and the table adds up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import TINY
from torch.autograd import DeviceType

import stlm_models.presets
from bench import step
from bench.harness import timing
from bench.harness.results import Result
from stlm_models.data.corpus import Corpus
from stlm_models.training.trainer import Trainer, TrainOptions

CORPUS = Corpus("words", [b"the cat sat on the mat, and the dog sat by the door. " * 100], [])
CEILINGS = timing.Ceilings(copy_bytes_per_s=1e3, matmul_flops_per_s=1e9)
PARTS = {"pooling", "ngrams", "to_core", "core", "from_core", "unpooling", "decoder", "to_output"}


def test_parts_add_up_to_the_step() -> None:
    trainer = Trainer(TINY, CORPUS, TrainOptions(steps=1 << 30, batch_size=2))
    ticks = itertools.count()
    parts = step.budget(trainer, lambda: float(next(ticks)), rounds=3, ceilings=CEILINGS)
    by_name = {part.name: part for part in parts}
    assert by_name.keys() == {*PARTS, "loss", "optimiser", step.REST, step.WHOLE}
    whole = by_name[step.WHOLE]
    assert sum(part.seconds for part in parts[:-1]) == pytest.approx(whole.seconds)
    assert sum(part.flops for part in parts[:-1]) == pytest.approx(whole.flops, rel=0.05)
    assert whole.floor_seconds == whole.flops / CEILINGS.matmul_flops_per_s
    # It reads parameters, gradients, two states (Muon: one) in fp32, and writes all but gradients.
    numbers = sum(p.numel() for p in trainer.model.parameters())
    moved = by_name["optimiser"].floor_seconds * CEILINGS.copy_bytes_per_s
    assert 4 * 5 * numbers <= moved < 4 * 7.1 * numbers
    # forward, and twice that backward, of each byte-rate matrix at each of the 2 windows' bytes
    bytes_read = 2 * TINY.context
    matrices = sum(p.numel() for p in trainer.model.decoder.parameters() if p.dim() == 2)
    assert by_name["decoder"].flops >= 6 * matrices * bytes_read


def test_time_without_a_kernel_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels may overlap and follow each other; what is no kernel does not count."""

    def event(begin: int, ns: int, device: Any = DeviceType.CUDA, annotation: bool = False) -> Any:
        return SimpleNamespace(
            start_ns=lambda: begin,
            duration_ns=lambda: ns,
            device_type=lambda: device,
            is_user_annotation=lambda: annotation,
        )

    kernels = [event(500, 100), event(100, 200), event(150, 50), event(250, 100), event(600, 50)]
    others = [event(0, 900, DeviceType.CPU), event(0, 900, annotation=True)]
    assert step.busy_seconds([*kernels, *others]) == pytest.approx(400e-9)
    assert step.busy_seconds(others) == 0
    monkeypatch.setattr(step, "_idle_seconds", lambda trainer, whole: 0.25 * whole)
    trainer = Trainer(TINY, CORPUS, TrainOptions(steps=1 << 30, batch_size=2))
    ticks = itertools.count()
    parts = step.budget(trainer, lambda: float(next(ticks)), rounds=1, ceilings=CEILINGS)
    assert [part.name for part in parts[-3:]] == [step.REST, step.IDLE, step.WHOLE]
    assert sum(part.seconds for part in parts[:-1]) == pytest.approx(parts[-1].seconds)


def test_measuring_leaves_the_model_as_it_was() -> None:
    """Parts run with rate zero, or every round would time another model."""
    trainer = Trainer(TINY, CORPUS, TrainOptions(steps=1 << 30, batch_size=2))
    works = step._works(trainer)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    for name, work in works.items():
        if name != step.WHOLE:
            work()
    assert all(map(torch.equal, before, trainer.model.parameters()))


OTHERS = {
    "-flat": {"decoder", "to_output"},
    "-word": {"decoder", "to_output"},
    "paper-byte": {"pooling", "to_core", "core", "head", "decoder", "to_output"},
}
SHOWN = [name for name in stlm_models.presets.PRESETS if name not in ("50m-word", "100m-word")]


@pytest.mark.parametrize("name", SHOWN)  # those two differ from 10m-word by size
def test_every_preset_has_the_parts_of_its_kind(name: str) -> None:
    """One layer of each kind, in the preset's own widths and heads."""
    config = stlm_models.presets.preset(name)
    few = {x: min(1, getattr(config, x)) for x in ("core_layers", "encoder_layers")}
    config = replace(config, context=32, decoder_layers=1, **few)
    trainer = Trainer(config, CORPUS, TrainOptions(steps=1 << 30, batch_size=1))
    works = step._works(trainer)
    pooled = PARTS | {"ngrams_to_bytes"}
    parts = next((found for end, found in OTHERS.items() if name.endswith(end)), pooled)
    parts = parts | {"matches", "memory"} if config.match_sizes else parts
    assert works.keys() - {"encoder"} == {*parts, "loss", "optimiser", step.WHOLE}
    for part in works.keys() - {"optimiser", step.WHOLE}:
        works[part]()
    # The lookup of bytes belongs to the rest where the table is not the output's too.
    parameters = dict(trainer.model.named_parameters())
    del parameters["embedding.weight"]
    assert all(p.grad is not None for p in parameters.values() if p.dim() == 2)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)
    monkeypatch.setattr(step, "load_corpus", lambda paths: CORPUS)
    monkeypatch.setattr(timing.Cpu, "ceilings", lambda self: timing.Ceilings(1e9, 1e9))
    path = tmp_path / "step.json"
    words = ["demo", "--batch-size", "1", "--context", "24", "--rounds", "1", "--precision", "fp32"]
    step.main([*words, "--json", str(path)])
    shown = capsys.readouterr().out
    assert "demo, 1 windows of 24, fp32" in shown
    assert "whole step" in shown
    found = Result.read(path)
    names = {row["name"] for row in found.rows if row["preset"] == "demo"}
    assert names >= PARTS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such"], "no-such"),
        (["--rounds", "0"], "expected a whole number from 1 on, got '0'"),
        (["--context", "1"], "context: expected"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        step.main(words)
    assert message in capsys.readouterr().err
