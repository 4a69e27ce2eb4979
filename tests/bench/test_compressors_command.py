"""bench.compressors: each compressor that is here, and what the training text saves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bench import compressors
from bench.harness.results import Result
from stlm_models.data.corpus import Corpus

HELD_OUT = [b"one part of the text. " * 20, b"another part of it. " * 20]
CORPUS = Corpus("a text", [b"the text to learn from. " * 30], HELD_OUT)


def test_the_command_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compressors, "load_corpus", lambda paths: CORPUS)
    path = tmp_path / "found.json"
    compressors.main(["--json", str(path), "--commit", "abc"])
    rows = {row["compressor"]: row for row in Result.read(path).rows}
    assert {"gzip -9", "bzip2 -9", "xz -9"} <= rows.keys()
    assert ("zpaq -m5" in rows) == bool(shutil.which("zpaq"))
    n_bytes = sum(map(len, HELD_OUT))
    for row in rows.values():
        assert row["bits_per_byte"] == 8 * row["bytes"] / n_bytes
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["gzip", "-9", f"{rows['gzip -9']['bits_per_byte']:.4f}"] in shown


def test_zpaq_after_the_training_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in whose archive is its input, so that sizes say what it was given."""
    program = tmp_path / "zpaq"
    program.write_text('#!/bin/sh\ncp "$3" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sizes = compressors.sizes_of(b"held out", b"training")
    assert (sizes["zpaq -m5"], sizes["zpaq -m5 after the training text"]) == (8, 8)
