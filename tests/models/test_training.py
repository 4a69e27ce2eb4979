"""Options of training: parts of a step, clipping, schedules, and how much of a device is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.models import TINY
from helpers.norms import half_the_digits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import stlm_models.presets
import stlm_models.train
from stlm_kernels.testing import hold
from stlm_models import BytePatcher
from stlm_models.checkpoint import load_checkpoint, save_checkpoint
from stlm_models.config import IGNORED
from stlm_models.data.corpus import Corpus
from stlm_models.training.optim import WARM_UP, Optimizers, lr_scale
from stlm_models.training.throughput import flops_per_byte, matmul_flops_per_second
from stlm_models.training.trainer import Trainer, TrainOptions

# Documents of one byte and of many: parts of a step have different numbers of targets.
TEXTS = [b"the cat sat on the mat, and the dog sat by the door. " * 5, *([b"a", b"b"] * 40)]
CORPUS = Corpus("texts", TEXTS, TEXTS[:1])
NEW_OPTIONS = ("grad_accum_steps", "schedule", "max_grad_norm", "compile")


def a_step(monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients that the optimisers get."""
    trainer = Trainer(TINY, CORPUS, TrainOptions(steps=9, batch_size=4, **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    monkeypatch.setattr(trainer.optimizers, "step", lambda scale: None)
    trainer.step = 2
    loss = float(trainer.train_step().loss)
    trainer.loader.close()
    named = trainer.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.cat([grad.flatten() for grad in gradients.values()]).norm())


class TestParts:
    @pytest.mark.parametrize("parts", [2, 4])
    def test_equal_one_batch(self, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
        loss, want = a_step(monkeypatch)
        loss_in_parts, got = a_step(monkeypatch, grad_accum_steps=parts)
        assert loss_in_parts == pytest.approx(loss, rel=half_the_digits(torch.float32))
        assert got.keys() == want.keys()
        off = {name: got[name] - grad for name, grad in want.items()}
        bound = half_the_digits(torch.float32)
        hold("gradients in parts", norm(off), bound * norm(want))

    def test_have_different_numbers_of_targets(self) -> None:
        """The test above could not tell a mean of means from the mean otherwise."""
        windows = Trainer(
            TINY, CORPUS, TrainOptions(steps=9, batch_size=4, grad_accum_steps=4)
        ).windows
        assert len({int((windows.batch(n).targets != IGNORED).sum()) for n in range(4)}) > 1

    def test_share_the_rows(self) -> None:
        with pytest.raises(
            ValueError, match=r"batch_size: expected a multiple of 3 parts x 1 .* got 4"
        ):
            Trainer(TINY, CORPUS, TrainOptions(steps=1, batch_size=4, grad_accum_steps=3))


def test_clipping_shortens_the_gradient_of_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    _, free = a_step(monkeypatch)
    limit = norm(free) / 5
    _, loose = a_step(monkeypatch, max_grad_norm=10 * norm(free))
    _, short = a_step(monkeypatch, max_grad_norm=limit)
    assert norm(short) == pytest.approx(limit, rel=1e-4)
    for name, grad in free.items():
        torch.testing.assert_close(loose[name], grad, rtol=0, atol=0)
        torch.testing.assert_close(short[name], grad / 5, rtol=1e-4, atol=1e-9)


def test_cosine_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = [lr_scale(step / 1000, "cosine") for step in range(1001)]
    peak = int(1000 * WARM_UP)
    assert scales[peak] == max(scales) == 1
    assert scales[:peak] == sorted(scales[:peak])
    assert scales[peak:] == sorted(scales[peak:], reverse=True)
    assert scales[510] == pytest.approx(0.5)
    assert scales[1000] == 0 == lr_scale(1.1, "cosine")
    with pytest.raises(ValueError, match=r"schedule: expected one of .* got 'line'"):
        lr_scale(0.5, "line")
    used: list[float] = []
    trainer = Trainer(TINY, CORPUS, TrainOptions(steps=4, batch_size=1, schedule="cosine"))
    monkeypatch.setattr(trainer.optimizers, "step", used.append)
    trainer.run()
    assert used == [lr_scale(step / 4, "cosine") for step in range(4)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_accum_steps", 0),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("schedule", "line"),
    ],
)
def test_bad_options(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .* got '?{value}"):
        TrainOptions(steps=1, **{name: value})  # type: ignore[arg-type]


class TestUtilisation:
    def test_counts_forward_and_backward(self) -> None:
        trainer = Trainer(TINY, CORPUS, TrainOptions(steps=1, batch_size=2))
        state = torch.get_rng_state()
        counted = flops_per_byte(trainer)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        # Each matrix at byte rate: a multiply and an add, forward and twice backward. The rest
        # (attention, the table, the core at patch rate) is less than all that once more.
        matrices = [*trainer.model.decoder.parameters(), trainer.model.to_output.weight]
        least = 6 * sum(p.numel() for p in matrices if p.dim() == 2)
        assert least < counted < 6 * sum(p.numel() for p in trainer.model.parameters())
        slots = BytePatcher("space", max_patch_len=TINY.max_patch_len, max_patches=500)
        spare = Trainer(TINY, CORPUS, TrainOptions(steps=1, batch_size=2), patcher=slots)
        assert flops_per_byte(spare) == pytest.approx(counted, rel=0.05)

    def test_rate_of_products(self) -> None:
        assert 1e8 < matmul_flops_per_second(torch.device("cpu"), torch.float32) < 1e13


class TestCommand:
    @pytest.fixture(autouse=True)
    def small_demo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)
        monkeypatch.setattr(stlm_models.train, "FINAL_SAMPLE_BYTES", 4)

    def test_options_are_kept_and_must_stay(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text, run = tmp_path / "text.txt", tmp_path / "run"
        text.write_bytes(b"".join(TEXTS))
        common = ["--data", str(text), "--out", str(run), "--precision", "fp32"]
        given = ["--schedule", "cosine", "--max-grad-norm", "1.5", "--grad-accum-steps", "2"]
        main = stlm_models.train.main
        assert main([*common, *given, "--batch-size", "4", "--steps", "2"]) == 0
        kept = load_checkpoint(run).state["options"]
        assert [kept[name] for name in NEW_OPTIONS] == [2, "cosine", 1.5, False]
        record, result = (
            json.loads((run / name).read_text()) for name in ("metrics.jsonl", "result.json")
        )
        per_byte, possible = result["flops_per_byte"], result["matmul_flops_per_second"]
        used = record["bytes_per_second"] * per_byte / possible
        assert record["mfu"] == pytest.approx(used, rel=0.01)
        capsys.readouterr()
        for name, value in (
            ("max_grad_norm", "2.0"),
            ("schedule", "wsd"),
            ("grad_accum_steps", "1"),
        ):
            assert main([*common, "--resume", f"--{name.replace('_', '-')}", value]) == 1
            assert f"{name}: expected {kept[name]} as the run began" in capsys.readouterr().err
        assert main([*common, "--resume", "--compile"]) == 1
        assert "compile: expected False as the run began" in capsys.readouterr().err
        assert main([*common, *given, "--resume", "--steps", "3"]) == 0

    def test_checkpoints_from_before_the_options(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text, run = tmp_path / "text.txt", tmp_path / "run"
        text.write_bytes(b"".join(TEXTS))
        common = ["--data", str(text), "--precision", "fp32"]
        main = stlm_models.train.main
        assert main([*common, "--out", str(run), "--batch-size", "1", "--steps", "1"]) == 0
        checkpoint = load_checkpoint(run)
        for name in NEW_OPTIONS:
            del checkpoint.state["options"][name]
        old = tmp_path / "old"
        save_checkpoint(old, checkpoint)
        assert main([*common, "--out", str(old), "--resume", "--max-grad-norm", "1"]) == 1
        assert (
            "max_grad_norm: expected None as the run began with, got 1.0" in capsys.readouterr().err
        )
        assert main([*common, "--out", str(old), "--resume", "--steps", "2"]) == 0
        assert load_checkpoint(old).state["options"]["schedule"] == "wsd"


class TestResume:
    def test_with_the_patcher_of_the_beginning(self, tmp_path: Path) -> None:
        config = dataclasses.replace(TINY, patch_rule="external")
        patcher = BytePatcher("fixed", patch_size=3)
        options = TrainOptions(steps=3, batch_size=2)
        through, begun = (Trainer(config, CORPUS, options, patcher=patcher) for _ in range(2))
        through.run()
        begun.train_step()
        begun.loader.close()
        begun.save(tmp_path)
        resumed = Trainer.resume(load_checkpoint(tmp_path), CORPUS, options, patcher=patcher)
        assert resumed.run()
        for name, tensor in through.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name

    def test_a_run_keeps_its_id(self, tmp_path: Path) -> None:
        options = TrainOptions(steps=3, batch_size=2)
        run, other = (Trainer(TINY, CORPUS, options) for _ in range(2))
        run.save(tmp_path)
        resumed = Trainer.resume(load_checkpoint(tmp_path), CORPUS, options)
        assert resumed.run_id == run.run_id != other.run_id
        resumed.train_step()
        resumed.loader.close()
        resumed.save(tmp_path)
        other.step = 5
        with pytest.raises(FileExistsError, match="step-00000001 is of another run"):
            other.save(tmp_path)
        assert load_checkpoint(tmp_path).state["step"] == 1

    def test_a_run_of_version_0_1_0(self, tmp_path: Path) -> None:
        """Version 0.1.0 wrote no id: such a run goes on without one."""
        options = TrainOptions(steps=3, batch_size=2)
        begun = Trainer(TINY, CORPUS, options)
        begun.run_id = None
        folder = begun.save(tmp_path)
        assert "run" not in json.loads((folder / "state.json").read_text())
        assert "run" not in json.loads((folder / "manifest.json").read_text())
        resumed = Trainer.resume(load_checkpoint(tmp_path), CORPUS, options)
        resumed.train_step()
        resumed.loader.close()
        resumed.save(tmp_path)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]

    def test_counts_of_steps_go_to_the_device(self) -> None:
        """AdamW reads them there where it is fused; a checkpoint is read on the CPU."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = torch.nn.Linear(4, 4, device="meta")
            model.weight = torch.nn.Parameter(torch.empty(4, 4, device="cuda"))
            model.bias = torch.nn.Parameter(torch.empty(4, device="cuda"))
            optimizers = Optimizers(model, muon_lr=0.1, adamw_lr=0.1)
            optimizers.load_state_tensors(
                {
                    "adamw.bias.step": torch.tensor(3.0),
                    "muon.weight.momentum_buffer": torch.ones(4, 4),
                }
            )
            state = optimizers.state_tensors()
        assert {tensor.device.type for tensor in state.values()} == {"cuda"}
        assert len(state) == 2
