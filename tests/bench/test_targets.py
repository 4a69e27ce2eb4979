"""Targets: each names a case that exists, is judged by the right entries, and can be missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.harness import targets
from bench.harness.jobs import cases_of, passes_of
from bench.harness.model_jobs import ModelJob, model_jobs
from bench.harness.timing import Gpu
from bench.peers import PEERS
from stlm_kernels.registry import OPS

CASE = "T9-P2"
ROW = targets.Target("byte_pool", CASE, "fwd", 14.0)  # 20 us at 0.7 of the rate
RATIO = targets.Ratio("byte_pool", CASE, "fwd", 2, "EmbeddingBag")
COMMITTED = {
    ("byte_pool", CASE, direction, "stlm"): {"bound": 10.0} for direction in ("fwd", "bwd")
}


def record(
    entry: str, us: float, ours: bool = False, op: str = "byte_pool", case: str = CASE,
    direction: str = "fwd",
) -> dict[str, Any]:  # fmt: skip
    info = {"op": op, "case": case, "pass": direction, "entry": entry, "ours": ours,
            "compiled": False, "roofline_share": 0.39, "peak_bytes": 513 << 20}  # fmt: skip
    return {"extra_info": info, "stats": {"median": us * 1e-6}}


def records(bag: float = 45.0, ours: float = 20.0) -> list[dict[str, Any]]:
    return [
        record("triton", ours, True),
        record("torch", 1.0, True),  # ours too, but not what a user gets
        record("EmbeddingBag", 90.0),
        record("EmbeddingBag, int64 ids", bag),
        record("compiled EmbeddingBag", 1.0),  # another one
        record("EmbeddingBag", 1.0, case="T9-P2-sum"),
        record("EmbeddingBag", 1.0, direction="bwd"),
    ]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Judge by a table of two rows."""

    def lines(found: list[dict[str, Any]], device: str = "NVIDIA H200") -> list[str]:
        return list(targets.lines(found, device, on_gpu=True))

    monkeypatch.setattr(targets, "TARGETS", (ROW,))
    monkeypatch.setattr(targets, "RATIOS", (RATIO,))
    monkeypatch.setattr(targets.counting, "read", lambda path: COMMITTED)
    return lines


def test_targets_met_and_missed(shown: Callable[..., list[str]]) -> None:
    assert shown(records()) == [
        "targets: 2 met, 0 MISSED, 0 not timed",
        "  byte_pool T9-P2 fwd: 20.0 us for 20.0, 2.00x the bound met",
        "  byte_pool T9-P2 fwd: 2.25x EmbeddingBag for 2x met",
    ]
    assert shown(records(bag=39.0))[0] == "targets: 1 met, 1 MISSED, 0 not timed"
    assert shown(records(ours=20.1))[0] == "targets: 1 met, 1 MISSED, 0 not timed"


def test_a_row_without_an_aim_shall_stay_where_it_is(
    shown: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "TARGETS", (targets.Target("byte_pool", CASE, "fwd"),))
    assert "14.0 us for 14.3, 1.40x the bound met" in shown(records(ours=14.0))[1]


def test_another_device_is_not_judged_by_the_microseconds(
    shown: Callable[..., list[str]],
) -> None:
    head, line, _ = shown(records(), "NVIDIA H100")
    assert head == "targets: 1 met, 0 MISSED, 0 not timed"
    assert line.endswith("20.0 us for 20.0, 2.00x the bound of an H200")


def test_what_was_not_timed_is_said(shown: Callable[..., list[str]]) -> None:
    without_peers = [x for x in records() if x["extra_info"]["ours"]]
    assert shown(without_peers)[0] == "targets: 1 met, 0 MISSED, 1 not timed"
    assert shown(records()[2:]) == [
        "targets: 0 met, 0 MISSED, 2 not timed",
        "  byte_pool T9-P2 fwd: not timed",
        "  byte_pool T9-P2 fwd: EmbeddingBag not timed",
    ]
    assert shown([record("x", 1.0, op="other")]) == []


def test_memory_and_the_share_of_the_roofline(shown: Callable[..., list[str]]) -> None:
    """Sizes of the machine stand behind the name of a model's case."""
    loss = next(iter(targets.MOST_MIB))
    large = record("triton", 1.0, True, *loss, direction="fwd+bwd")
    step = record("ours", 1.0, True, "model-step", "100m-batch8", "step")
    assert shown([large, step])[1:] == [
        f"  {loss[0]} {loss[1]}: 513 MiB for 512 MISSED",
        "  model-step 100m step: 39% of the roofline for 40% MISSED",
    ]


def test_on_a_cpu_the_best_eager_peer_counts() -> None:
    def on_cpu(ours: float) -> list[str]:
        group = [record("torch", ours, True), record("slow", 9.0), record("fast", 4.0)]
        compiled = record("compiled", 1.0)
        compiled["extra_info"]["compiled"] = True
        for x in (found := [*group, compiled]):
            x["extra_info"]["pass"] = "no-grad"
        return list(targets.lines(found, "A CPU", on_gpu=False))

    head, _, line = on_cpu(4.2)
    assert head.startswith("targets: 1 met, 0 MISSED")
    assert line.split() == ["1.05x", "met", "byte_pool", CASE, "no-grad,", "fast"]
    assert on_cpu(4.3)[0].startswith("targets: 0 met, 1 MISSED")


@pytest.mark.parametrize("row", targets.TARGETS, ids=lambda x: f"{x.op}-{x.case}-{x.direction}")
def test_every_target_is_timed(row: targets.Target) -> None:
    """Each in the full sweep at least."""
    spec = OPS[row.op]
    assert row.case in [x.name for x in cases_of(spec, "bench_full")]
    assert row.timed_pass in passes_of(spec)


@pytest.mark.parametrize("ratio", targets.RATIOS, ids=lambda x: f"{x.op}-{x.case}-{x.entry}")
def test_every_ratio_names_an_entry_that_is_timed(ratio: targets.Ratio) -> None:
    if ratio.op in OPS:
        spec = OPS[ratio.op]
        assert ratio.case in [x.name for x in cases_of(spec, "bench_full")]
        assert ratio.direction in passes_of(spec)
        assert any(entry.name.startswith(ratio.entry) for entry in PEERS[ratio.op])
    else:
        gpu = Gpu.__new__(Gpu)
        jobs: list[ModelJob] = [x for x in model_jobs(gpu, False, True) if x.family == ratio.op]
        assert ratio.entry in {job.entry.name for job in jobs if job.preset == ratio.case}


def test_limits_name_what_is_timed() -> None:
    for op, case in targets.MOST_MIB:
        assert case in [x.name for x in cases_of(OPS[op], "bench_full")]
    assert {key[:2] for key in targets.LEAST_SHARE} <= {(x.op, x.case) for x in targets.RATIOS}


def test_words_are_among_the_targets_of_each_op_that_has_patches() -> None:
    pools = {x.op for x in targets.TARGETS if "-even" in x.case and "-P" in x.case}
    assert pools == {x.op for x in targets.TARGETS if "-words" in x.case} - {"attention_pool"}
