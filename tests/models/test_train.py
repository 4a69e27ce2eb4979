"""The training command: what it leaves behind, how it resumes, and how it says no."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import stlm_models.generate
import stlm_models.presets
import stlm_models.train
from stlm_models import STLM, ModelConfig
from stlm_models.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from stlm_models.data.corpus import Corpus, load_corpus
from stlm_models.train import main
from stlm_models.training.optim import Optimizers, lr_scale
from stlm_models.training.trainer import StepResult, Trainer, TrainOptions

SMALL = ModelConfig(
    byte_dim=16,
    ngram_buckets=64,
    ngram_dim=8,
    core_layers=1,
    core_dim=16,
    core_heads=2,
    core_kv_heads=2,
    core_ff=16,
    decoder_layers=1,
    decoder_heads=2,
    decoder_kv_heads=2,
    decoder_ff=16,
    decoder_window=16,
    context=64,
)
WORDS = b"the cat sat on the mat, and the dog sat by the door. " * 60


@pytest.fixture(autouse=True)
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", SMALL)
    monkeypatch.setattr(stlm_models.training.reporting, "SAMPLE_BYTES", 4)
    monkeypatch.setattr(stlm_models.train, "FINAL_SAMPLE_BYTES", 20)


@pytest.fixture(name="text")
def text_file(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_bytes(WORDS)
    return str(file)


def train(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that begins with error:, none being a traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert error.endswith(lines[0] + "\n")
    return lines[0]


class TestRun:
    def test_a_run_leaves_all_it_promises(
        self, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        arguments = ("--data", text, "--out", run, "--steps", 25, "--batch-size", 2)
        assert train(*arguments, "--precision", "fp32", "--sample-every", 0.01) == 0
        output = capsys.readouterr()
        assert "held out, 318 bytes:" in output.out
        assert "gzip -9:" in output.out
        assert "sample:" in output.err
        assert "sha256" in output.err
        assert "bits/byte" in output.err
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        assert [record["step"] for record in records] == [10, 20, 25]
        assert records[-1]["loss"] < records[0]["loss"]
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        result = json.loads((run / "result.json").read_text())
        assert 0 < result["bits_per_byte"] < 8
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000025"]
        assert load_checkpoint(run).config == SMALL

        told = ["--run", str(run), "--prompt", "the cat", "--max-new-bytes", "9", "--seed", "1"]
        texts = []
        for _ in range(2):
            assert stlm_models.generate.main(told) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]
        assert texts[0].startswith("the cat")
        assert len(texts[0]) > len("the cat") + 1
        assert stlm_models.generate.main([*told, "--top-p", "2"]) == 1
        assert one_line(capsys).startswith("error: linear_sample: top_p: expected")

    def test_the_process_is_prepared_before_the_first_step(
        self, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        happened: list[str] = []
        step = Trainer.train_step

        def prepared() -> str:
            happened.append("prepared")
            return "products: as a test says"

        def stepped(trainer: Trainer) -> StepResult:
            happened.append("step")
            return step(trainer)

        monkeypatch.setattr(stlm_models.train, "prepare_process", prepared)
        monkeypatch.setattr(Trainer, "train_step", stepped)
        assert train("--data", text, "--out", tmp_path / "run", "--steps", 1) == 0
        assert happened == ["prepared", "step"]
        assert "products: as a test says" in capsys.readouterr().err

    def test_rates_of_a_preset(self, tmp_path: Path, text: str) -> None:
        """Trials chose those that hold where none are given."""
        for n, given in enumerate(((), ("--muon-lr", 0.01))):
            run = tmp_path / str(n)
            arguments = ("--data", text, "--out", run, "--steps", 1, "--batch-size", 1)
            assert train(*arguments, "--precision", "fp32", *given) == 0
            options = load_checkpoint(run).state["options"]
            rates = {**stlm_models.presets.RATES["demo"], **({"muon_lr": 0.01} if given else {})}
            assert {name: options[name] for name in rates} == rates

    def test_minutes_end_a_run(self, tmp_path: Path, text: str) -> None:
        started = time.monotonic()
        run = tmp_path / "run"
        assert train("--data", text, "--out", run, "--minutes", 0.02, "--precision", "fp32") == 0
        assert time.monotonic() - started < 10
        state = load_checkpoint(run).state
        assert 1.2 <= state["seconds"] < 3
        # The time is used up: nothing is left to do but to judge again.
        assert train("--data", text, "--out", run, "--resume") == 0
        assert load_checkpoint(run).state["step"] == state["step"]
        assert train("--data", text, "--out", run, "--resume", "--minutes", 0.06) == 0
        resumed = load_checkpoint(run).state
        assert resumed["step"] > state["step"]
        assert 3.6 <= resumed["seconds"] < 6

    def test_it_learns(self) -> None:
        corpus = Corpus("words", [WORDS], [WORDS[:200]])
        trainer = Trainer(SMALL, corpus, TrainOptions(steps=60, batch_size=4))
        losses: list[float] = []
        assert trainer.run(lambda result: losses.append(float(result.loss)))
        assert losses[0] == pytest.approx(5.55, abs=0.2)
        assert losses[-1] < 1.5

    def test_schedule(self) -> None:
        scales = [lr_scale(step / 1000) for step in range(1001)]
        assert 0 < scales[0] < 0.1
        assert max(scales) == scales[100] == 1
        assert scales[-1] == 0
        peak = scales.index(1)
        assert scales[:peak] == sorted(scales[:peak])
        assert scales[peak:] == sorted(scales[peak:], reverse=True)


class TestResume:
    def test_interrupted_equals_uninterrupted(self, tmp_path: Path) -> None:
        corpus = Corpus("words", [WORDS, WORDS[::-1]], [WORDS[:200]])
        options = TrainOptions(steps=12, batch_size=2)
        whole = Trainer(SMALL, corpus, options)
        losses: list[float] = []
        whole.run(lambda result: losses.append(float(result.loss)))

        first = Trainer(SMALL, corpus, options)
        assert not first.run(should_stop=lambda: first.step == 5)
        first.save(tmp_path)
        second = Trainer.resume(load_checkpoint(tmp_path), corpus, options)
        again: list[float] = []
        assert second.run(lambda result: again.append(float(result.loss)))
        assert again == losses[5:]
        for ours, theirs in zip(
            second.model.state_dict().values(), whole.model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs)

    def test_ctrl_c_saves_and_resume_goes_on(
        self,
        tmp_path: Path,
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        run = tmp_path / "run"
        common = ("--data", text, "--out", run, "--precision", "fp32")
        step_once = Trainer.train_step
        handler = signal.getsignal(signal.SIGINT)  # ignored where a shell began us with "&"

        def interrupted(trainer: Trainer) -> StepResult:
            if trainer.step == 13:
                os.kill(os.getpid(), signal.SIGINT)
            return step_once(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", interrupted)
            assert train(*common, "--minutes", 5, "--batch-size", 1) == 130
        assert f"--resume --out {run}" in capsys.readouterr().err
        # The step under way is finished, its state saved, and nothing judged.
        assert load_checkpoint(run).state["step"] == 14
        assert (run / "loss.png").exists()
        assert not (run / "result.json").exists()
        assert train(*common, "--resume", "--steps", 17) == 0
        assert load_checkpoint(run).state["step"] == 17
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
        assert steps == [10, 14, 17]
        assert signal.getsignal(signal.SIGINT) is handler

    def test_another_corpus_configuration_or_option(
        self,
        tmp_path: Path,
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        run = tmp_path / "run"
        common = ("--out", run, "--precision", "fp32")
        assert train("--data", text, *common, "--steps", 2, "--batch-size", 1) == 0
        files = sorted(run.rglob("*"))
        capsys.readouterr()

        assert train("--data", text, *common, "--resume", "--preset", "10m") == 1
        line = one_line(capsys)
        assert "preset: expected the configuration of the checkpoint" in line
        assert "byte_dim 16" in line
        assert train("--data", text, *common, "--resume", "--seed", 3) == 1
        assert "seed: expected 0 as the run began with, got 3" in one_line(capsys)
        other = tmp_path / "other.txt"
        other.write_bytes(WORDS.upper())
        assert train("--data", other, *common, "--resume") == 1
        assert "data: expected the bytes that the run began with" in one_line(capsys)
        assert train("--data", text, *common, "--steps", 2) == 1
        assert "add --resume" in one_line(capsys)
        checkpoint = dataclasses.replace(load_checkpoint(run), state={"step": 9})
        save_checkpoint(tmp_path / "foreign", checkpoint)
        assert train("--data", text, "--out", tmp_path / "foreign", "--resume") == 1
        assert "got one without ['options', 'seconds', 'train_sha256']" in one_line(capsys)
        assert train("--data", text, "--out", tmp_path / "none", "--resume") == 1
        assert "checkpoint: expected one in" in one_line(capsys)
        assert sorted(run.rglob("*")) == files
        assert not (tmp_path / "none").exists()


class TestData:
    def test_of_a_folder_that_holds_its_runs(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Files that a run or one before it writes are not what it trains on when it goes on."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text.txt").write_bytes(WORDS)
        (tmp_path / ".git").mkdir()
        common = ("--data", ".", "--precision", "fp32", "--batch-size", 1)
        assert train(*common, "--out", "runs/a", "--steps", 1) == 0
        (tmp_path / "runs/b").mkdir()
        (tmp_path / "runs/b/log").write_bytes(b"of a shell")
        assert train(*common, "--out", "runs/b", "--steps", 1) == 0
        capsys.readouterr()
        assert train(*common, "--out", "runs/b", "--steps", 2, "--resume") == 0
        said = capsys.readouterr().err.splitlines()
        assert f"train: 1 documents, {len(WORDS) * 9 // 10:,} bytes" in "\n".join(said)
        assert "left out: 1 hidden folder, .git" in said
        assert "left out: 1 folder of a run, runs/a" in said
        assert "left out: 1 output folder, runs/b" in said

    def test_paths_of_all_flags_and_fields_of_lines(
        self, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = tmp_path / "a.jsonl"
        lines.write_text(json.dumps({"text": "x" * 500}) + "\n" + json.dumps({"text": "y" * 500}))
        (tmp_path / "b").write_bytes(b"b" * 1000)
        data = ("--data", tmp_path / "b", lines, "--data", text, "--text-key", "text")
        assert train(*data, "--out", tmp_path / "run", "--batch-size", 1, "--steps", 1) == 0
        said = capsys.readouterr().err
        n_bytes = (2000 + len(WORDS)) * 9 // 10
        assert f"train: 4 documents, {n_bytes:,} bytes" in said
        assert f"JSON lines, of each the field 'text' taken: 1 file, {lines}" in said


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "{tmp}/none"], "data: expected a file, a folder with files or a glob"),
            (["--data", "{tmp}/empty"], "data: expected at least one byte"),
            (["--data", "{tmp}/short"], "data: expected at least one window of 64 bytes"),
            (["--data", "{tmp}/short", "--data", "{tmp}/table"], "table is a Parquet file, which"),
            (["--data", "{tmp}/short", "--text-key", "x"], "text_key: expected a file of JSON"),
            (["--text-key", "x", "--raw"], "text_key: expected None beside raw, got 'x'"),
            (["--data", "{tmp}/a.jsonl", "--text-key", "y"], "a.jsonl, line 1: expected text in a"),
            (["--preset", "huge"], "preset: expected one of"),
            (["--steps", "0"], "steps: expected more than 0"),
            (["--minutes", "-1"], "minutes: expected more than 0"),
            (["--batch-size", "0"], "batch_size: expected more than 0"),
            (["--minutes", "inf"], "minutes: expected a finite number, got inf"),
            (["--muon-lr", "inf"], "muon_lr: expected a finite number, got inf"),
            (["--seed", str(2**64)], "seed: expected 0 to 2**64 - 1, got"),
            (["--threads", "0"], "threads: expected at least 1, got 0"),
            (["--save-every", "nan"], "save_every: expected at least 0, got nan"),
            (["--sample-every", "-1"], "sample_every: expected at least 0, got -1"),
        ],
    )
    def test_one_clear_line_and_nothing_written(
        self,
        tmp_path: Path,
        text: str,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        (tmp_path / "empty").write_bytes(b"")
        (tmp_path / "short").write_bytes(b"x" * 50)
        (tmp_path / "table").write_bytes(b"PAR1" + bytes(50))
        (tmp_path / "a.jsonl").write_bytes(b'{"x": "text"}')
        given = [argument.format(tmp=tmp_path) for argument in arguments]
        base = [] if "--data" in arguments else ["--data", text]
        assert train("--out", tmp_path / "run", *base, *given) == 1
        assert message in one_line(capsys)
        assert not (tmp_path / "run").exists()

    def test_a_missing_extra(
        self,
        tmp_path: Path,
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert train("--data", text, "--out", tmp_path / "run") == 1
        line = one_line(capsys)
        assert "missing safetensors, tqdm, matplotlib" in line
        assert "pip install safetensors tqdm matplotlib" in line
        assert not (tmp_path / "run").exists()

    def test_a_folder_that_cannot_be_made(
        self, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert train("--data", text, "--out", tmp_path / "file" / "run") == 1
        assert "Not a directory" in one_line(capsys)

    def test_a_run_that_diverges_ends_and_saves_nothing(
        self, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        common = ("--data", text, "--out", run, "--batch-size", 1, "--precision", "fp32")
        often = ("--save-every", 0, "--sample-every", 0)
        assert train(*common, "--steps", 12, "--muon-lr", 1e30, *often) == 1
        line = one_line(capsys)
        assert "loss: expected a finite number, got nan by step" in line
        assert "lower --muon-lr" in line
        assert all(t.isfinite().all() for t in load_checkpoint(run).model.values())

    @pytest.mark.parametrize(
        ("lost", "message"),
        [(math.nan, "embedding.weight: expected a finite n"), (1e38, "held-out bits per byte: ex")],
    )
    def test_a_model_that_the_last_step_lost(
        self,
        tmp_path: Path,
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        lost: float,
        message: str,
    ) -> None:
        """Its loss was finite before that step."""
        step = Optimizers.step

        def losing_step(optimizers: Optimizers, scale: float) -> None:
            step(optimizers, scale)
            next(iter(optimizers.names)).data.fill_(lost)

        monkeypatch.setattr(Optimizers, "step", losing_step)
        run = tmp_path / "run"
        common = ("--data", text, "--out", run, "--batch-size", 1, "--precision", "fp32")
        assert train(*common, "--steps", 1) == 1
        assert message in one_line(capsys)
        assert (latest_checkpoint(run) is None) == math.isnan(lost)
        assert not (run / "result.json").exists()

    def test_a_full_disk(
        self, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        # A limit on the size of a file fails a write like a disk that is full.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            assert train("--data", text, "--out", run, "--steps", 2, "--batch-size", 1) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "error: [Errno 27] File too large" in one_line(capsys)
        assert not list((run / "checkpoints").iterdir())
        assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "metrics.jsonl"]

    def test_the_package_works_without_the_extra(self) -> None:
        program = """
import sys
for name in ("safetensors", "tqdm", "matplotlib"):
    sys.modules[name] = None
import torch
from stlm_models import STLM, ModelConfig
model = STLM(ModelConfig(byte_dim=16, core_dim=16, core_layers=1, decoder_layers=1))
model(torch.zeros(2, 8, dtype=torch.long))
assert len(model.generate("x", max_new_bytes=2)) == 2
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_generate_into_a_closed_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, Checkpoint(SMALL, STLM(SMALL).state_dict(), {}, {"step": 1}))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert stlm_models.generate.main(["--run", str(tmp_path), "--max-new-bytes", "3"]) == 0


def test_corpus_of_a_command_is_what_it_prints(text: str, capsys: Any) -> None:
    corpus = load_corpus([text])
    assert corpus.train[0] + corpus.held_out[0] == WORDS
    assert os.path.basename(text) in corpus.name
