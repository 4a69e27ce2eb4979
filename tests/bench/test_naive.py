"""The naive composition of a model computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.norms import assert_as_right
from torch import Tensor

from bench import naive_step, report
from bench.harness import environment
from bench.harness.baseline_ops import ops_replaced
from bench.harness.naive_ops import NAIVE_OPS
from bench.naive_step import Measurement, Settings, measure
from stlm_models import STLM, ModelConfig

TINY = ModelConfig(
    byte_dim=16, ngram_buckets=32, ngram_dim=8, core_layers=1, core_dim=16, core_heads=2,
    core_kv_heads=1, core_ff=16, decoder_layers=1, decoder_heads=2, decoder_kv_heads=1,
    decoder_ff=16, decoder_window=5, context=24, softcap=20.0,
)  # fmt: skip


def tiny(draw: int = 0) -> STLM:
    torch.manual_seed(draw)
    model = STLM(TINY)
    for parameter in model.parameters():  # outputs begin at zero, which would hide most of it
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def loss_and_gradients(model: STLM, naive: bool, **inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    if naive:
        with ops_replaced(NAIVE_OPS):
            loss, _ = model(**inputs)
            loss.backward()
    else:
        loss, _ = model(**inputs)
        loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def three_runs(dense: bool, draw: int) -> list[dict[str, Tensor]]:
    """Ours, the naive composition, and fp64."""
    text = b"the same model, written as one writes it at first; "
    ids = torch.tensor([256, *text[:-1]] * 2)
    targets = torch.tensor([*text[:-1], -100] * 2)
    inputs = {"byte_ids": ids, "targets": targets}
    if dense:
        inputs = {name: x.view(2, -1) for name, x in inputs.items()}
    else:
        inputs["cu_seqlens"] = torch.tensor([0, 20, 51, len(ids)], dtype=torch.int32)
    model = tiny(draw)
    return [
        loss_and_gradients(model, False, **inputs),
        loss_and_gradients(model, True, **inputs),
        loss_and_gradients(tiny(draw).double(), False, **inputs),
    ]


@pytest.mark.parametrize("dense", [True, False])
def test_naive_model_equals_ours(dense: bool, draw: int) -> None:
    ours, naive, exact = three_runs(dense, draw)
    assert len(exact) == 1 + len(list(tiny().parameters()))
    assert_as_right(ours, naive, exact)


MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropped": torch.zeros_like,
    "scaled": lambda x: 1.001 * x,
    "half the digits": lambda x: x.half().float(),
    "last row dropped": lambda x: torch.cat([x[:-1], 0 * x[-1:]]),
}


@pytest.mark.parametrize("wrong", ["ours", "naive"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_one_wrong_gradient_of_the_model_shows(mutation: str, wrong: str) -> None:
    """Gradients of all parameters agree in either composition."""
    ours, naive, exact = three_runs(False, 0)
    planted = {name: MUTATIONS[mutation](x) for name, x in ours.items() if x.dim()}
    # The last row of a table of bytes has no gradient to lose.
    planted = {name: x for name, x in planted.items() if not torch.equal(x, ours[name])}
    assert len(planted) > 15
    for name, x in planted.items():
        pair = (ours | {name: x}, naive) if wrong == "ours" else (ours, naive | {name: x})
        with pytest.raises(AssertionError, match="relative error of"):
            assert_as_right(*pair, exact)
    missing = {name: x for name, x in ours.items() if name != "embedding.weight"}
    with pytest.raises(AssertionError, match=r"only in one: \['embedding.weight'\]"):
        assert_as_right(missing, naive, exact)


def test_both_processes_train_the_same(full: bool) -> None:
    """Settings travel to the processes; what comes back can be compared."""
    if not full:
        pytest.skip("two fresh processes: with --full")
    found = measure(Settings("demo", 1, 64, "fp32", 1), steps=1)
    assert found["naive"].losses == pytest.approx(found["ours"].losses, rel=1e-4)
    assert all(x.peak_bytes > 2**26 and len(x.seconds) == 1 for x in found.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such"], "preset"),
        (["demo", "--batch-size", "0"], "argument --batch-size: expected a whole number"),
        (["demo", "--steps", "0"], "expected a whole number from 1 on, got '0'"),
    ],
)
def test_bad_words_are_refused_before_a_process_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        naive_step.main([*words, "--precision", "fp32"])
    assert message in capsys.readouterr().err


def test_the_command_and_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {
        "ours": Measurement([1.0], 200.0, 2**20, []),
        "naive": Measurement([2.0], 100.0, 2**22, []),
    }
    monkeypatch.setattr(naive_step, "measure", lambda settings, steps: results)
    out = tmp_path / "naive.json"
    words = ["demo", "--precision", "fp32", "--commit", "abc", "--json", str(out)]
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    naive_step.main(words)
    page = report.page(tmp_path)
    for text in (capsys.readouterr().out, page):
        assert "2.00 times the speed, 0.25 of the peak" in text
        assert "THE MACHINE WAS BUSY (load 1.5" in text
    assert "`python -m bench.naive_step demo --precision fp32" in page
    assert "commit abc" in page
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    naive_step.main(words)
    assert "BUSY" not in report.page(tmp_path)
