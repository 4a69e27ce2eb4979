"""`python -m stlm_kernels.ptx`: every op, every option, and what is said of wrong ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fences import LACKING, release

from stlm_kernels.ptx.__main__ import main
from stlm_kernels.registry import OPS

pytestmark = pytest.mark.lanes("compiled")
ROOT = Path(__file__).parents[2]
WITH_KERNELS = [name for name, spec in OPS.items() if spec.kernels]


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_every_op(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main([op, "--pass", "fwd", "--json"])
    assert status == 0 or release() == LACKING  # whose faults the command tells
    values = json.loads(capsys.readouterr().out)
    assert values["device"].startswith("NVIDIA H200")
    assert values["us"] > 0
    assert values["launches"]
    for each in values["launches"]:
        assert each["kernel"].startswith("stlm_")
        assert each["us"]["issue"] > 0
        assert each["us"][each["binding"]] == max(each["us"].values())
        assert each["nsight"]["smsp__inst_executed.sum"] > 0


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (
            [],
            ["bfloat16, sm_90, rates of NVIDIA H200", "stlm_segment_sum", "segment_pool_bwd"],
        ),
        (["--pass", "bwd"], ["stlm_segment_pool_bwd"]),
        (["--arch", "80"], ["sm_80, rates of NVIDIA A100"]),
        (["--arch", "100", "--dtype", "float32"], ["float32, sm_100, rates of NVIDIA B200"]),
        (["--arch", "80", "--device", "h200"], ["sm_80, rates of NVIDIA H200"]),
        (["--dtype", "float16", "--source"], ["float16", "warp instructions by source line"]),
        (["--case", "T700-P2-D20-max"], ["segment_pool T700-P2-D20-max-ragged"]),
        (["--case", "T700-P2-D20-max-ragged", "--sample", "1"], ["SAMPLED"]),
    ],
)
def test_options(options: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment_pool", *options]) == 0
    printed = capsys.readouterr().out
    assert "a bound, not a time" in printed
    for text in shown:
        assert text in printed
    if "bwd" in options:
        assert "stlm_segment_sum" not in printed


def test_a_whole_name_is_that_case(capsys: pytest.CaptureFixture[str]) -> None:
    """The name may be a part of that of a case before it."""
    short, long = "T300-space", "T300-space-S4-max7-C120"
    names = [case.name for case in OPS["find_patches"].cases]
    assert names.index(long) < names.index(short)
    assert main(["find_patches", "--case", short]) == 0
    assert f"find_patches {short}, " in capsys.readouterr().out
    assert main(["find_patches", "--case", "T300-space-S4"]) == 0
    assert f"find_patches {long}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment_pol"], "argument op: invalid choice: 'segment_pol' (choose from "),
        (["segment_pool", "--arch", "70"], "argument --arch: invalid choice: 70 (choose from "),
        (["segment_pool", "--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
        (["segment_pool", "--pass", "all"], "argument --pass: invalid choice: 'all'"),
        (["segment_pool", "--sample", "0"], "expected a whole number from 1 on, got '0'"),
        (["segment_pool", "--sample", "x"], "expected a whole number from 1 on, got 'x'"),
        (["segment_pool", "--device", "h300"], "device: expected one of ["),
        (["segment_pool", "--case", "X9"], "--case: expected part of a case's name, got 'X9'"),
        (["find_patches", "--pass", "bwd"], "--pass: find_patches has no backward pass"),
    ],
)
def test_wrong_values(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "--arch", "100", "--pass", "fwd"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "error: " in printed.err
    assert "tcgen05" in printed.err
    assert "is not known here (triton_impl.py:" in printed.err


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "stlm_kernels.ptx", "segment_pool", "--pass", "fwd"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stlm_segment_sum" in done.stdout


def test_faults_are_shown_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stlm_kernels.ptx import launch

    execute: Any = launch.execute
    monkeypatch.setattr(
        launch, "execute", lambda text, *args, **options: execute(
            text.replace("bar.sync", "// bar.sync"), *args, **options
        )
    )  # fmt: skip
    with torch.random.fork_rng():
        assert main(["attention", "--pass", "fwd"]) == 1
    assert "FAULT race: stlm_attention_fwd" in capsys.readouterr().out
