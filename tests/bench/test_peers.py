"""Peers of the benchmarks: what one is called is what runs, and a missing one is noted with its
reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ops import LargestTensor

from bench.peers import PEERS, installed
from stlm_kernels.registry import OPS

CANNOT_IMPORT = "raise ModuleNotFoundError(\"No module named 'packaging'\")"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (CANNOT_IMPORT, "is installed, but {} does not import: No module named 'packaging'"),
        ("raise RuntimeError('no driver')", "is installed, but {} does not import: no driver"),
        ("other = 1", "{} has no loss"),
        ("loss = 1", None),
    ],
)
def test_a_missing_peer_says_why(
    code: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"a_library_of_{len(code)}_letters"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    said = installed.why_missing(name, "loss")
    assert (installed.function_of(name, "loss") is None) == (reason is not None)
    assert (
        said is None if reason is None else said is not None and said.endswith(reason.format(name))
    )


def test_a_library_that_is_not_there() -> None:
    assert installed.why_missing("no_such_library.of_it", "f") == "no no_such_library is installed"


def test_only_the_unfused_peer_forms_all_logits() -> None:
    """torch 2.13 takes its unfused reference unless it is given options."""
    spec = OPS["linear_cross_entropy"]
    case = next(x for x in spec.tagged("smoke") if x["V"] >= 100)
    inputs = spec.make_inputs(case, torch.float32, torch.device("cpu"), 0)
    largest = {}
    for peer in PEERS["linear_cross_entropy"]:
        if not peer.name.startswith("F.linear_cross_entropy"):
            continue
        if peer.unsupported(case):
            pytest.skip("this torch has none")
        with LargestTensor() as made:
            peer.function(**peer.convert(inputs))
        largest[peer.name] = made.elements
    logits = inputs["target"].numel() * case["V"]
    assert largest["F.linear_cross_entropy, unfused"] >= logits
    assert largest["F.linear_cross_entropy, chunked"] < logits


WORDS = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name, spec in OPS.items()
    for case in spec.tagged("bench_cpu")
    if case.get("boundaries") == "words"
]


def test_pooling_is_timed_on_words() -> None:
    timed = {parameter.values[0] for parameter in WORDS}
    assert timed >= {"byte_pool", "segment_pool", "patch_attention", "attention_pool", "unpool"}
