"""Targets: each names a case that exists, is judged by the right entries, and can be missed."""

from __future__ import annotations

from typing import Any

import pytest

from bench.harness import targets
from bench.harness.jobs import cases_of, passes_of
from bench.harness.model_jobs import ModelJob, model_jobs
from bench.harness.timing import Gpu
from bench.peers import PEERS
from stlm_kernels.registry import OPS

OURS_US = 20.0
AIM = targets.Aim(
    "byte_pool", {"T": 9}, "fwd", us=20.0, share=0.8, mib=2.0,
    against=[
        targets.Against(2, "EmbeddingBag"),
        targets.Against(1 / 1.2, sizes={"T": 5}),
        targets.Against(0.5, op="unpool", sizes={"D": 1}),
    ],
)  # fmt: skip


def record(
    entry: str, us: float, ours: bool = False, op: str = "byte_pool", share: float = 0.8,
    **sizes: Any,
) -> dict[str, Any]:  # fmt: skip
    info = {"op": op, "case": "T9", "pass": "fwd", "entry": entry, "ours": ours, "sizes": sizes,
            "compiled": False, "roofline_share": share, "peak_bytes": 1 << 20}  # fmt: skip
    return {"extra_info": info, "stats": {"median": us * 1e-6}}


def records(bag: float = 45.0, ours: float = OURS_US, share: float = 0.8) -> list[dict[str, Any]]:
    return [
        record("triton", ours, True, T=9, P=2, share=share),
        record("torch", 1.0, True, T=9, P=2),  # ours too, but not what a user gets
        record("EmbeddingBag", 90.0, T=9, P=2),
        record("EmbeddingBag, int64 ids", bag, T=9, P=2),
        record("compiled EmbeddingBag", 1.0, T=9, P=2),  # another one
        record("triton", 18.0, True, T=5, P=2),
        record("triton", 15.0, True, op="unpool", D=1),
    ]


def shown(found: list[dict[str, Any]], device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(targets, "AIMS", (AIM,))
    return list(targets.lines(found, device, on_gpu=True))


def test_targets_met_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, line = shown(records(), "NVIDIA H200", monkeypatch)
    assert head == "targets: 6 met, 0 MISSED, 0 not timed"
    assert line.startswith("  byte_pool T9 fwd: 20.0 us for 20 met, 80% of the roofline")
    assert "2.25x EmbeddingBag for 2x met" in line
    for found in (records(bag=39.0), records(share=0.79)):
        assert shown(found, "NVIDIA H200", monkeypatch)[0].startswith("targets: 5 met, 1 MISSED")
    # slower by a tenth: only the ratio to half of unpool is kept
    head, line = shown(records(ours=22.6), "NVIDIA H200", monkeypatch)
    assert head == "targets: 2 met, 4 MISSED, 0 not timed" or "1.99x" in line


def test_another_device_is_not_judged_by_the_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    head, line = shown(records(ours=10.0), "NVIDIA H100", monkeypatch)
    assert head == "targets: 5 met, 0 MISSED, 0 not timed"
    assert "10.0 us for 20 on an H200," in line


def test_what_was_not_timed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without_peers = [x for x in records() if x["extra_info"]["ours"]]
    assert "1 not timed" in shown(without_peers, "H200", monkeypatch)[0]
    assert shown(records()[2:], "H200", monkeypatch) == [
        "targets: 0 met, 0 MISSED, 1 not timed",
        "  byte_pool T9 fwd: not timed",
    ]
    assert shown([record("x", 1.0, op="other")], "H200", monkeypatch) == []


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
    assert line.split() == ["1.05x", "met", "byte_pool", "T9", "no-grad,", "fast"]
    assert on_cpu(4.3)[0].startswith("targets: 0 met, 1 MISSED")


@pytest.mark.parametrize("aim", targets.AIMS, ids=lambda aim: aim.name)
def test_every_target_names_a_case_that_is_timed(aim: targets.Aim) -> None:
    """Each is timed in the full sweep at least, against entries that exist."""
    gpu = Gpu.__new__(Gpu)
    if aim.op in OPS:
        spec = OPS[aim.op]
        cases = [x for x in cases_of(spec, "bench_full") if aim.sizes.items() <= x.sizes.items()]
        assert aim.direction in passes_of(spec)
        names = [entry.name for entry in PEERS[aim.op]]
        for rival in aim.against:
            if rival.op:
                others = cases_of(OPS[rival.op], "bench_full")
                assert any(rival.sizes.items() <= x.sizes.items() for x in others)
            elif rival.sizes:
                sizes = dict(aim.sizes) | dict(rival.sizes)
                assert any(sizes.items() <= x.sizes.items() for x in cases_of(spec, "bench_full"))
            else:
                assert any(name.startswith(rival.entry) for name in names), rival.entry
        assert len(cases) == 1, [x.name for x in cases]
    else:
        jobs: list[ModelJob] = [x for x in model_jobs(gpu, False, True) if x.family == aim.op]
        own = [job for job in jobs if job.preset == aim.sizes["preset"]]
        assert {rival.entry for rival in aim.against} <= {job.entry.name for job in own}
