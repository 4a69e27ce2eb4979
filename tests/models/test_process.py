"""Processes that train on a CPU: faster products, and never less exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stlm_models.training import process

MATMUL = torch.backends.mkldnn.matmul
ZEN = {"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False, "onednn": True}


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, True),
        ({"cpu_name": "Intel(R) Xeon(R) Processor"}, False),
        ({"cpu_name": None}, False),
        ({"avx512_bf16": False}, False),
        ({"amx_bf16": True}, False),
        ({"onednn": False}, False),
    ],
    ids=str,
)
def test_cpus_on_which_onednn_is_chosen(
    change: dict[str, Any], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "cpu_capabilities", lambda: {**ZEN, **change})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process.onednn_multiplies_faster() is chosen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not process.onednn_multiplies_faster()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not process.onednn_multiplies_faster()


def test_products_that_round_are_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_rounds_operands", lambda: True)
    before = torch.get_float32_matmul_precision()
    assert process.multiply_by_onednn() is None
    assert torch.get_float32_matmul_precision() == before


def test_a_precision_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_rounds_operands", lambda: False)
    torch.set_float32_matmul_precision("medium")
    assert process.multiply_by_onednn() is None
    assert torch.get_float32_matmul_precision() == "medium"


def test_what_is_chosen_multiplies_as_fp32_does() -> None:
    """Products stay those of torch where oneDNN would round."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=draw) for _ in range(2))
    said = process.multiply_by_onednn()
    assert (MATMUL.fp32_precision == "bf16") == (said is not None)
    error = (a @ b).double() - a.double() @ b.double()
    assert error.norm() <= 1e-6 * (a.double() @ b.double()).norm()


def test_rounded_operands_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not process._rounds_operands()
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *x: full(*x).bfloat16().float())
    assert process._rounds_operands()
