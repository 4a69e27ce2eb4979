"""Docstrings of the public modules: short, and with an example that runs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.examples import run_example

import stlm_models
from stlm_models import STLM, ModelConfig, compression, data, layers
from stlm_models.checkpoint import Checkpoint, save_checkpoint

MAX_LINES, MAX_STATEMENTS = 30, 3
PUBLIC = {
    name: getattr(folder, name)
    for folder in (stlm_models, layers, data, compression)
    for name in folder.__all__
}
DOCUMENTED = sorted(name for name, value in PUBLIC.items() if callable(value))
FOLDERS = {path.parent.name for path in Path(stlm_models.__file__).parent.glob("*/__init__.py")}


@pytest.fixture(name="run", scope="module")
def folder_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pytest.importorskip("safetensors")
    model = STLM(ModelConfig(core_layers=1, decoder_layers=1))
    save_checkpoint(folder, Checkpoint(model.config, model.state_dict(), {}, {"step": 1}))
    return folder


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_docstring_fits_on_a_page(name: str) -> None:
    lines = (inspect.getdoc(PUBLIC[name]) or "").splitlines()
    assert len(lines) <= MAX_LINES, f"{name} has {len(lines)} lines"
    assert lines[1] == "", "one line, then the rest"


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name != "load_model"])
def test_the_example_runs(name: str) -> None:
    known: dict[str, Any] = {"torch": torch, "__file__": __file__, **PUBLIC}
    torch.manual_seed(0)
    statements = run_example(inspect.getdoc(PUBLIC[name]) or "", name, known)
    assert 1 <= len(statements) <= MAX_STATEMENTS


def test_the_example_of_a_run_runs(run: Path) -> None:
    known = {**PUBLIC, "run": run}
    run_example(inspect.getdoc(stlm_models.load_model) or "", "load_model", known)


@pytest.mark.parametrize("path", sorted(Path(stlm_models.__file__).parent.rglob("*.py")))
def test_a_module_says_what_it_holds_in_a_page(path: Path) -> None:
    doc = inspect.cleandoc(compile(path.read_text(), path, "exec").co_consts[0] or "")
    assert 1 <= len(doc.splitlines()) <= MAX_LINES


def test_dir_shows_public_names_and_folders() -> None:
    """Names are the public ones in a fresh process, and after every module was imported."""
    code = """
import stlm_models
print(dir(stlm_models))
import stlm_models.train, stlm_models.compress, stlm_models.summary
print(dir(stlm_models))
print([getattr(stlm_models, name) for name in dir(stlm_models) if name != "huggingface"] != [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, reached = done.stdout.splitlines()
    assert before == after == str(sorted({*stlm_models.__all__, *FOLDERS}))
    assert reached == "True"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stlm_models.nothing
