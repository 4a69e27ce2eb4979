"""The evaluation command: a run on files gives bits per byte, and says no in one line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import TINY, scrambled

from stlm_models import STLM, bits_per_byte
from stlm_models.checkpoint import Checkpoint, save_checkpoint
from stlm_models.data.words import WordVocabulary
from stlm_models.evaluate import main

ROOT = Path(__file__).parents[2]
TEXTS = {"a.txt": b"the cat sat on the mat. " * 4, "b.txt": b"Zo\xc3\xab \x00\xff 12", "c.txt": b""}
WORD_TEXT = b"the cat sat on the mat, and the dog sat by the door. " * 3


@pytest.fixture(name="model")
def small_model() -> STLM:
    return scrambled()


@pytest.fixture(name="run")
def run_folder(tmp_path: Path, model: STLM) -> Path:
    save(tmp_path / "run", model)
    return tmp_path / "run"


@pytest.fixture(name="texts")
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_bytes(text)
    return folder


def save(run: Path, model: STLM, words: WordVocabulary | None = None) -> None:
    save_checkpoint(run, Checkpoint(model.config, model.state_dict(), {}, {"step": 1}, words))


def evaluate(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command is refused with."""
    assert evaluate(*arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line.removeprefix("error: ")


def test_a_file_gives_the_bits_per_byte_of_the_function(
    run: Path, texts: Path, model: STLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--run", run, texts / "a.txt") == 0
    expected = bits_per_byte(model, TEXTS["a.txt"])
    assert capsys.readouterr().out == f"{expected:.4f} bits per byte, 96 bytes in 1 document\n"


@pytest.mark.parametrize("paths", [["."], ["*.txt"], ["b.txt", "a.txt", "a.txt"]])
def test_folders_and_globs_are_documents_each_counted_once(
    run: Path,
    texts: Path,
    model: STLM,
    paths: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(texts)
    assert evaluate("--run", run, *paths) == 0
    expected = bits_per_byte(model, [TEXTS["a.txt"], TEXTS["b.txt"]])
    n_bytes = len(TEXTS["a.txt"] + TEXTS["b.txt"])
    wanted = f"{expected:.4f} bits per byte, {n_bytes} bytes in 2 documents\n"
    assert capsys.readouterr().out == wanted


def test_context_and_stride_are_obeyed(
    run: Path, texts: Path, model: STLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--run", run, texts / "a.txt", "--context", 8, "--stride", 3) == 0
    expected = bits_per_byte(model, TEXTS["a.txt"], context=8, stride=3)
    assert f"{expected:.4f}" != f"{bits_per_byte(model, TEXTS['a.txt']):.4f}"
    assert capsys.readouterr().out.startswith(f"{expected:.4f} bits per byte")


def test_a_model_of_words_reads_by_its_own_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = WordVocabulary.of([WORD_TEXT], 300)
    config = dataclasses.replace(
        TINY, tokens="words", vocab_size=words.size, patch_rule="none", core_layers=0
    )
    model = scrambled(config)
    save(tmp_path / "run", model, words)
    (tmp_path / "text").write_bytes(WORD_TEXT)
    assert evaluate("--run", tmp_path / "run", tmp_path / "text") == 0
    expected = bits_per_byte(model, WORD_TEXT, vocabulary=words)
    wanted = f"{expected:.4f} bits per byte, {len(WORD_TEXT)} bytes in 1 document\n"
    assert capsys.readouterr().out == wanted


def test_refusals_are_one_line(
    run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = texts / "a.txt"
    for arguments, message in (
        (("--run", tmp_path / "none", text), "checkpoint: expected one in"),
        (("--run", run, texts / "d.txt"), "data: expected a file, a folder with files or a glob"),
        (("--run", run, texts / "c.txt"), "data: expected at least one byte, got only empty"),
        (("--run", run, text, "--context", 0), "context: expected at least 1, got 0"),
        (("--run", run, text, "--stride", 99), "stride: expected 1 to context = 32, got 99"),
    ):
        assert refusal(capsys, *arguments).startswith(message)


def test_a_model_without_a_finite_loss_is_refused(
    texts: Path, tmp_path: Path, model: STLM, capsys: pytest.CaptureFixture[str]
) -> None:
    model.to_output.weight.data.fill_(float("nan"))
    save(tmp_path / "lost", model)
    line = refusal(capsys, "--run", tmp_path / "lost", texts / "a.txt")
    assert line == "checkpoint: expected a model whose loss is finite, got nan"


def test_missing_safetensors_is_named(
    run: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(capsys, "--run", run, texts) == "missing safetensors: pip install safetensors"


def test_as_a_module_it_says_nothing_else(run: Path, texts: Path) -> None:
    """Python warns where the module that it runs was already imported by its package."""
    command = [sys.executable, "-m", "stlm_models.evaluate", "--run", str(run)]
    command.append(str(texts / "a.txt"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bits per byte" in done.stdout
