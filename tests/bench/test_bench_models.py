"""Steps and generation as lines of the benchmarks: the same model in each entry, or no figure."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_bench import FakeBenchmark, FakeCuda

import stlm_models.layers.embedding
from bench import report
from bench.bench_models import test_model_speed as model_speed
from bench.harness import model_jobs
from bench.harness.baseline_ops import BASELINE_OPS, ops_replaced
from bench.harness.model_jobs import BASELINE, CACHED, GENERATE, OURS, RECOMPUTED, STEP, ModelJob
from bench.harness.session import Session
from bench.harness.timing import Cpu, Gpu
from bench.peers import attention_varlen
from stlm_models.data.corpus import Corpus

CORPUS = Corpus("words", [b"the cat sat on the mat, and the dog sat by the door. " * 20], [])
STEP_SIZES = (("batch", 2), ("context", 32))
TEXT_SIZES = (("batch", 3), ("prompt", 9), ("new", 5))


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(model_jobs, "_corpus", lambda: CORPUS)
    return Session(Cpu(), rehearsal=True)


def timed(session: Session, job: ModelJob) -> dict[str, Any]:
    benchmark = FakeBenchmark()
    model_speed(job, session, time.perf_counter, benchmark)
    assert benchmark.rounds >= 3
    return benchmark.extra_info


def test_steps_of_ours_and_of_baseline_ops_are_timed(session: Session) -> None:
    first, second = (
        timed(session, ModelJob(STEP, "demo", entry, STEP_SIZES)) for entry in (OURS, BASELINE)
    )
    assert first["flops"] == second["flops"] > 6 * 2 * 32 * 500_000
    assert first["peak_bytes"] > 0
    assert first["real_bytes"] in (63, 64)  # a document's start is none
    assert (first["ours"], second["ours"]) == (True, False)


def test_texts_are_timed(session: Session) -> None:
    for entry in (CACHED, RECOMPUTED):
        info = timed(session, ModelJob(GENERATE, "demo", entry, TEXT_SIZES))
        assert info["real_bytes"] == 15
        session.add_model_rates(info, 3.0)
        assert info["bytes_per_s"] == 5.0


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("linear_cross_entropy", 1.001, "loss: relative error"),
        ("linear_cross_entropy", float("nan"), "the loss is nan"),
    ],
)
def test_another_model_is_never_timed(
    session: Session, name: str, factor: float, message: str
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return factor * BASELINE_OPS[name](*args, **kwargs)

    timed(session, ModelJob(STEP, "demo", OURS, STEP_SIZES))
    entry = replace(BASELINE, ops={**BASELINE_OPS, name: wrong})
    with pytest.raises(AssertionError, match=message):
        timed(session, ModelJob(STEP, "demo", entry, STEP_SIZES))


@pytest.mark.parametrize("name", ["attention", "segment_pool", "unpool"])
def test_another_gradient_is_never_timed(session: Session, name: str) -> None:
    """Gradients of these would be zero where branches begin at zero."""

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = BASELINE_OPS[name](*args, **kwargs)
        out.register_hook(lambda grad: 1.1 * grad)
        return out

    timed(session, ModelJob(STEP, "demo", OURS, STEP_SIZES))
    entry = replace(BASELINE, ops={**BASELINE_OPS, name: wrong})
    with pytest.raises(AssertionError, match="gradient: relative error"):
        timed(session, ModelJob(STEP, "demo", entry, STEP_SIZES))


def test_a_compiled_entry_is_what_is_timed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def compile(model: Any, **options: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return model(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    job = ModelJob(STEP, "demo", replace(OURS, compiled=True), STEP_SIZES)
    with session.models.checked(job) as work:
        calls.clear()
        work.task.run(work.task.prepare(work.task.samples[0]))
    assert calls == [1]


def test_no_thread_makes_data_within_a_timed_step(session: Session) -> None:
    before = set(threading.enumerate())
    with session.models.checked(ModelJob(STEP, "demo", OURS, STEP_SIZES)) as work:
        work.task.run(work.task.prepare(work.task.samples[0]))
        assert not [x for x in set(threading.enumerate()) - before if "loader" in x.name]


def test_a_text_is_more_than_one_byte_again_and_again(session: Session) -> None:
    job = ModelJob(GENERATE, "demo", CACHED, TEXT_SIZES)
    model, prompts = model_jobs.model_of(job, session.machine), model_jobs.prompts_of(job)
    texts = model_jobs.cached(model, prompts, job["new"])
    assert len(set(texts)) > 1


def test_a_model_is_no_graph_on_a_gpu(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of launching is part of a step."""
    gpu = Gpu(FakeCuda(), torch.device("cpu"), flush_bytes=1 << 10)
    monkeypatch.setattr(gpu, "_host_seconds", lambda task: 1.0)
    for sizes, family, entry in ((STEP_SIZES, STEP, OURS), (TEXT_SIZES, GENERATE, CACHED)):
        with session.models.checked(ModelJob(family, "demo", entry, sizes)) as work:
            assert gpu.plan(work.task, gpu.timer()).info["timed_as"] == "events"


def test_another_text_is_never_timed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(session, ModelJob(GENERATE, "demo", CACHED, TEXT_SIZES))
    monkeypatch.setattr(model_jobs, "recomputed", lambda *_: [b"other"] * 3)
    with pytest.raises(AssertionError, match="another text"):
        timed(session, ModelJob(GENERATE, "demo", RECOMPUTED, TEXT_SIZES))


def test_baseline_ops_replace_every_op_of_a_step(session: Session) -> None:
    """Each is called, and what is left of the library is what generation alone calls."""
    called: set[str] = set()

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return BASELINE_OPS[name](*args, **kwargs)

        return call

    job = ModelJob(STEP, "demo", BASELINE, STEP_SIZES)
    before = stlm_models.layers.embedding.byte_pool
    with ops_replaced({name: watched(name) for name in BASELINE_OPS}):
        model_jobs.loss_and_gradients(model_jobs.trainer_of(job, session.machine))
    assert called == set(BASELINE_OPS) - {"qk_norm_rope"}  # which maps that are replaced need
    assert stlm_models.layers.embedding.byte_pool is before


@pytest.mark.parametrize("asks", [True, False])
def test_varlen_attn_of_each_torch_gets_what_it_takes(
    asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.12 added enable_gqa."""

    def newer(q, k, v, cq, ck, mq, mk, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        assert enable_gqa
        return older(q, k, v, cq, ck, mq, mk, scale=scale, window_size=window_size)

    def older(q, k, v, cq, ck, mq, mk, *, scale, window_size):  # type: ignore[no-untyped-def]
        assert (cq.tolist(), mk, window_size) == ([0, 2, 5], 3, (1, 0))
        return q

    given = newer if asks else older
    monkeypatch.setattr(attention_varlen, "function_of", lambda module, name: given)
    attention_varlen._takes.cache_clear()
    q, k = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    inputs = {"q": q, "k": k, "v": k, "window": 2, "scale": None}
    inputs["cu_seqlens"] = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(attention_varlen._varlen(**attention_varlen._varlen_inputs(inputs)), q)
    attention_varlen._takes.cache_clear()


@pytest.mark.parametrize("rehearsal", [True, False])
def test_model_jobs_have_distinct_names(rehearsal: bool) -> None:
    for machine in (Cpu(), Gpu(FakeCuda(), torch.device("cpu"), flush_bytes=1 << 10)):
        jobs = model_jobs.model_jobs(machine, rehearsal, full=True)
        assert len({job.id for job in jobs}) == len(jobs)
        for group in {job.group for job in jobs}:
            assert {job.entry.ours for job in jobs if job.group == group} == {True, False}


def test_the_table_shows_bytes_per_second() -> None:
    info = {"op": STEP, "case": "demo", "pass": "step", "entry": "ours", "ours": True,
            "dtype": "float32", "peak_bytes": 1 << 20, "bytes_per_s": 12345.6,
            "compiled": False}  # fmt: skip
    stats = {"median": 1e-3, "iqr": 1e-5, "q1": 1e-3, "q3": 1e-3}
    (text,) = report.tables([{"extra_info": info, "stats": stats}], {"device": "A"})
    assert "12,346 bytes/s" in text
