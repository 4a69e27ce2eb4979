"""`python -m stlm_kernels.env`: what a bug report needs, from a fresh process."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

import stlm_kernels.inspect
from stlm_kernels import env
from stlm_kernels.registry import OPS


def test_the_command_says_which_path_each_op_takes_and_why() -> None:
    command = [sys.executable, "-m", "stlm_kernels.env"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"torch: {torch.__version__}" in done.stdout
    lines = done.stdout.splitlines()
    for name in OPS:
        (line,) = [line for line in lines if line.startswith(f"  {name}: ")]
        assert "torch: " in line or line.endswith("triton")
    if not torch.cuda.is_available():
        assert "device: cpu, no CUDA device" in lines
        assert "the kernels run on CUDA devices" in done.stdout


def test_inspect_says_in_one_line_that_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stlm_kernels._dispatch.has_triton", lambda: False)
    assert stlm_kernels.inspect.main(["unpool", "--arch", "90"]) == 1
    output = capsys.readouterr()
    expected = "error: inspect needs triton, and a process without TRITON_INTERPRET\n"
    assert (output.out, output.err) == ("", expected)


def test_torch_is_named_with_its_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metadata of CUDA wheels says 2.15.0 where torch says 2.15.0+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.15.0+cu130")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.15.0")
    monkeypatch.setattr(env, "describe_ops", list)
    env.main([])
    assert "torch: 2.15.0+cu130\n" in capsys.readouterr().out
