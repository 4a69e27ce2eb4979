"""Precision of a training run: its choice by capability, the line that says why, overrides."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import stlm_models.train
from bench import baselines, naive_step, step
from bench.harness import timing
from stlm_models.data.corpus import Corpus
from stlm_models.parallel import Ranks
from stlm_models.training import precision
from stlm_models.training.precision import Precision, cpu_capabilities, faster_precision

MILAN = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
GENOA = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
SAPPHIRE_RAPIDS = {**GENOA, "amx_tile": True, "amx_bf16": True}
SKYLAKE = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}
GRACE = {"architecture": "arm64", "neon": True, "bf16": True, "sve2": True}
WORDS = b"the cat sat on the mat. " * 400
CEILINGS = timing.Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e9)
NEOVERSE_N1 = {"architecture": "arm64", "neon": True, "bf16": False}


def use_cpu(patch: pytest.MonkeyPatch, can: dict[str, object], *, onednn: bool = True) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(precision, "cpu_capabilities", lambda: {**can, "onednn": onednn})


@pytest.mark.parametrize(
    ("can", "expected"),
    [
        (MILAN, ("fp32", "this CPU has no instructions that multiply in bf16")),
        (SKYLAKE, ("fp32", "this CPU has no instructions that multiply in bf16")),
        (NEOVERSE_N1, ("fp32", "this CPU has no instructions that multiply in bf16")),
        ({}, ("fp32", "this CPU has no instructions that multiply in bf16")),
        (GENOA, ("bf16", "this CPU multiplies in bf16 (AVX-512 BF16)")),
        (SAPPHIRE_RAPIDS, ("bf16", "this CPU multiplies in bf16 (AMX)")),
        (GRACE, ("bf16", "this CPU multiplies in bf16 (Arm BF16)")),
    ],
)
def test_a_cpu_is_judged_by_its_instructions(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, object], expected: tuple[str, str]
) -> None:
    use_cpu(monkeypatch, can)
    assert faster_precision() == expected


def test_without_onednn_nothing_uses_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cpu(monkeypatch, SAPPHIRE_RAPIDS, onednn=False)
    assert faster_precision() == (
        "fp32",
        "this torch has no oneDNN, which would use this CPU's AMX",
    )


@pytest.mark.parametrize(
    ("major", "expected"),
    [
        (6, ("fp32", "Some GPU does not multiply in bf16")),
        (7, ("fp32", "Some GPU does not multiply in bf16")),
        (8, ("bf16", "Some GPU multiplies in bf16")),
        (10, ("bf16", "Some GPU multiplies in bf16")),
    ],
)
def test_a_gpu_is_judged_by_its_generation(
    monkeypatch: pytest.MonkeyPatch, major: int, expected: tuple[str, str]
) -> None:
    """Torch's own rule counts emulation unless told not to; the CPU does not matter."""
    use_cpu(monkeypatch, SAPPHIRE_RAPIDS)
    properties = SimpleNamespace(major=major, name="Some GPU")
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "_check_bf16_tensor_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "hip", None)
    assert faster_precision() == expected


def test_the_capabilities_are_those_of_torch() -> None:
    found = dict(cpu_capabilities())
    assert found.pop("onednn") in (True, False)
    assert found == dict(torch.cpu.get_capabilities())
    assert found["architecture"]


def test_no_clock_decides() -> None:
    tree = ast.parse(inspect.getsource(precision))
    imports = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import)}
    assert imports == {"import torch"}


class TestCommand:
    @pytest.fixture(name="text")
    def text_file(self, tmp_path: Path) -> Path:
        file = tmp_path / "text.txt"
        file.write_bytes(WORDS)
        return file

    def said(
        self, capsys: pytest.CaptureFixture[str], text: Path, *arguments: object
    ) -> tuple[str, str]:
        """The precision of the trainer that a command line makes, and the line about it."""
        words = ["--data", text, "--steps", 1, "--batch-size", 1, *arguments]
        parsed = stlm_models.train._parser().parse_args([str(word) for word in words])
        trainer, _ = stlm_models.train._prepare(parsed, Ranks())
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.startswith("precision: ")]
        return trainer.options.precision, line.removeprefix("precision: ")

    @pytest.mark.parametrize(
        ("can", "given", "expected", "reason"),
        [
            (SAPPHIRE_RAPIDS, [], "bf16", "bf16, this CPU multiplies in bf16 (AMX)"),
            (MILAN, [], "fp32", "fp32, this CPU has no instructions that multiply in bf16"),
            (SAPPHIRE_RAPIDS, ["fp32"], "fp32", "fp32, asked for by --precision"),
            (MILAN, ["bf16"], "bf16", "bf16, asked for by --precision"),
        ],
    )
    def test_the_choice_and_its_reason_are_printed(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        text: Path,
        can: dict[str, object],
        given: list[str],
        expected: str,
        reason: str,
    ) -> None:
        use_cpu(monkeypatch, can)
        options = ["--precision", *given] if given else []
        assert self.said(capsys, text, *options) == (expected, reason)

    def test_a_resumed_run_keeps_its_own(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        text: Path,
        tmp_path: Path,
    ) -> None:
        """Even a machine that would choose otherwise does this."""
        words = ["--data", text, "--steps", 1, "--batch-size", 1, "--out", tmp_path / "run"]
        parsed = stlm_models.train._parser().parse_args([*map(str, words), "--precision", "bf16"])
        trainer, run = stlm_models.train._prepare(parsed, Ranks())
        trainer.save(run)
        capsys.readouterr()
        use_cpu(monkeypatch, MILAN)
        found = self.said(capsys, text, "--resume", "--out", run)
        assert found == ("bf16", "bf16, as the run began with")

    def test_processes_agree_on_what_all_can(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Ours has AMX; another of the group has not."""
        use_cpu(monkeypatch, SAPPHIRE_RAPIDS)

        class Group(Ranks):
            def agree(self, seconds: float, should_stop: bool) -> tuple[float, bool]:
                return seconds, True

        assert stlm_models.train._precision(None, Group()) == "fp32"
        reason = "the device of another process does not multiply in bf16"
        assert capsys.readouterr().err == f"precision: fp32, {reason}\n"
        assert stlm_models.train._precision("bf16", Group()) == "bf16"


class Asked(Exception):
    """Raised where the rule is asked."""


@pytest.mark.parametrize("bench", [naive_step, step, baselines])
def test_benchmarks_follow_the_same_rule(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule() -> Precision:
        raise Asked

    def too_late(*_: object) -> None:
        raise AssertionError("measured without the rule")

    monkeypatch.setattr(bench, "faster_precision", rule)
    for name in {"Trainer", "measure"} & vars(bench).keys():
        monkeypatch.setattr(bench, name, too_late)
    monkeypatch.setattr(bench, "load_corpus", lambda _, **options: Corpus("text", [WORDS], [WORDS]))
    for name in ("Cpu", "Gpu"):
        monkeypatch.setattr(f"bench.harness.timing.{name}.ceilings", lambda _: CEILINGS)
    with pytest.raises(Asked):
        bench.main([])
