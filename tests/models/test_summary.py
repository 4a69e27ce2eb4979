"""The summary counts what a model is and does; here by hand, where that is possible."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.models import TINY

from stlm_models import STLM, summary

TEXT = b"the cat sat on the mat, and the dog sat by the door. "


def test_parameters_are_those_of_the_model() -> None:
    found = summary.summarise(TINY, TEXT)
    model = STLM(TINY)
    assert sum(found.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert found.parameters["core"] == sum(p.numel() for p in model.core.parameters())
    assert found.bytes_per_patch == len(TEXT) / int(
        model.patcher(torch.tensor(list(TEXT))).n_patches
    )
    # fp32: parameter, gradient, and one or two states of it, besides the counters of steps
    n_parameters = sum(found.parameters.values())
    assert 12 * n_parameters <= found.state_bytes <= 16 * n_parameters + 4096


def test_work_grows_with_the_model_and_the_text() -> None:
    """A multiply and an add are two; each matrix of the byte-rate layers is used at every byte."""

    text = TEXT * 8  # a CPU keeps more of each row of a few
    found = summary.summarise(TINY, text)
    decoder = found.parameters["decoder"]
    assert found.forward_flops >= 2 * decoder * len(text)
    assert 2.5 < found.step_flops / found.forward_flops < 3.5
    wide = summary.summarise(dataclasses.replace(TINY, decoder_ff=2 * TINY.decoder_ff), text)
    more = wide.parameters["decoder"] - decoder
    assert wide.forward_flops - found.forward_flops == 2 * more * len(text)
    assert wide.activation_bytes == found.activation_bytes  # nothing of the hidden layer is kept
    twice = summary.summarise(TINY, text * 2)
    assert 1.9 < twice.activation_bytes / found.activation_bytes < 2.1


def test_the_command(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(summary.PRESETS, "demo", TINY)
    summary.main(["demo"])
    out = capsys.readouterr().out
    assert "demo: " in out
    assert "bytes per patch or id" in out
    with pytest.raises(SystemExit):
        summary.main(["none"])
    assert "preset: expected one of" in capsys.readouterr().err


def test_flat_models_of_bytes_and_words() -> None:
    flat = dataclasses.replace(TINY, patch_rule="none", core_layers=0)
    found = summary.summarise(flat, TEXT)
    assert found.bytes_per_patch == 1
    assert set(found.parameters) == {"embedding", "ngrams", "decoder", "to_output"}
    words = dataclasses.replace(flat, tokens="words", vocab_size=1000, ngram_sizes=())
    found = summary.summarise(words, TEXT)
    n_words = round(len(TEXT) / 4.5)
    assert found.bytes_per_patch == len(TEXT) / n_words
    assert found.forward_flops >= 2 * n_words * found.parameters["decoder"]
    assert found.n_bytes == len(TEXT)


def test_the_second_loss_of_the_parallel_output_belongs_to_training() -> None:
    plain = dataclasses.replace(
        TINY, output="parallel", decoder_window=None, reconstruction_weight=0.0
    )
    found = summary.summarise(plain, TEXT)
    both = summary.summarise(dataclasses.replace(plain, reconstruction_weight=1.0), TEXT)
    assert both.forward_flops == found.forward_flops
    assert both.step_flops > 1.3 * found.step_flops


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="text: expected at least one byte"):
        summary.summarise(TINY, b"")
