"""The benchmarks are tested too: what they refuse, how they time, what they say."""

from __future__ import annotations

import contextlib
import gc
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import check, report
from bench.harness import environment, timing
from bench.harness.jobs import CaseData, Job, Task, entries_of, jobs, left_out, task_of
from bench.harness.session import Session
from bench.harness.timing import Cpu, EventTimer, Gpu
from bench.peers import PEERS
from bench.peers.entry import Entry
from stlm_kernels.registry import OPS

ROOT = Path(__file__).parents[2]
SPEC = OPS["byte_pool"]
CASE = SPEC.tagged("smoke")[0]
CPU = torch.device("cpu")


class FakeCuda:
    """Stands in for `torch.cuda`: a device whose every second event is 3 ms after the one before.

    `waits` makes any synchronising call fail while sync debug mode is "error", as on a device.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return FakeEvent(self)

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait_stream"))

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.log.append("capture")
        assert not gc.isenabled()
        yield

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=1 << 16)

    def set_sync_debug_mode(self, mode: str) -> None:
        self.log.append(f"sync debug {mode}")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def empty_cache(self) -> None:
        self.log.append("empty cache")

    def current_stream(self) -> None: ...

    def reset_peak_memory_stats(self) -> None: ...

    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return 164


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.log.append("record")
        self.at_ms = self.cuda.now_ms = self.cuda.now_ms + 3.0

    def synchronize(self) -> None:
        self.cuda.log.append("event synchronize")

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


class FakeBenchmark:
    """pytest-benchmark's fixture, as far as a job uses it."""

    stats = None

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
        self.rounds = rounds
        args, kwargs = setup()
        target(*args, **kwargs)


def job_of(entry: Entry, direction: str = "fwd") -> Job:
    return Job(SPEC, CASE, direction, entry)


# Timing


def test_event_timer_waits_only_at_the_end() -> None:
    cuda = FakeCuda()
    timer = EventTimer(cuda)
    assert timer() == 0.0
    assert cuda.log == ["record"]
    assert timer() == pytest.approx(3e-3)
    assert cuda.log == ["record", "record", "event synchronize"]
    timer.calls = 2
    assert timer() == 0.0  # a new round begins
    assert timer() == pytest.approx(1.5e-3)


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd", "no-grad"])
def test_gpu_timing_rehearsed(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through: behind a flush, and captured where the launch is longer than the work."""
    cuda = FakeCuda()
    gpu = Gpu(cuda, CPU, flush_bytes=1 << 10)
    data = CaseData(SPEC, CASE, torch.float32, CPU)
    samples = data.samples(gpu.sample_count(data.sample_bytes()))
    assert 1 < len(samples) < timing.GRAPH_CALLS
    assert gpu.sample_count(1 << 16) == 3  # of 64 KiB of cache
    # Small inputs: as many as a graph has calls, or the second half would find them in the cache.
    assert gpu.sample_count(1) == timing.GRAPH_CALLS
    entry = entries_of(SPEC, ["torch"])[0]
    task = task_of(job_of(entry, direction), samples, entry.function)
    for host_seconds, way in ((1e-3, "events"), (5e-3, "graph of 16 calls")):
        monkeypatch.setattr(gpu, "_host_seconds", lambda task, s=host_seconds: s)
        timer = gpu.timer()
        plan = gpu.plan(task, timer)
        assert plan.info["timed_as"] == way
        seconds = timing.timed_rounds(plan.target, plan.setup, timer, 2)
        assert seconds == pytest.approx([3e-3 / timer.calls] * 2)
    assert cuda.log.index("sync debug default") < cuda.log.index("capture")
    assert gc.isenabled()
    assert gpu.peak_bytes(task) == 64


def test_work_that_waits_is_not_captured() -> None:
    cuda = FakeCuda()
    gpu = Gpu(cuda, CPU, flush_bytes=1 << 10)

    def waits(x: Any) -> None:
        if cuda.log[-1] == "sync debug error":
            raise RuntimeError("called a synchronizing CUDA operation")

    plan = timing.Plan(waits, lambda: ((None,), {}), 3)
    gpu._use_graph(plan, Task([None], lambda sample: sample, waits), gpu.timer())  # type: ignore[list-item]
    assert "synchronizing" in plan.info["not_captured"]
    assert "capture" not in cuda.log


def test_peak_memory_counts_what_is_freed_again() -> None:
    def run(size: int) -> torch.Tensor:
        temporary = torch.ones(size)
        return temporary[: size // 2].clone()

    task = Task([1 << 18], lambda size: size, run)  # type: ignore[list-item]
    assert Cpu().peak_bytes(task) == pytest.approx(1.5 * (1 << 20), rel=0.01)


def test_slow_work_is_run_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to find out how long it takes, which warms up as well; short work gets more of both."""
    calls: list[float] = []
    # A clock that only this work moves: the machine may be busy.
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: sum(calls)))
    machine = Cpu()
    for seconds, before, rounds in ((0.1, 1, 3), (0.02, 3, 10)):
        calls.clear()
        task = Task([seconds], lambda sample: sample, calls.append)
        plan = machine.plan(task, machine.timer())
        assert len(calls) == before
        assert plan.rounds == pytest.approx(rounds, abs=1)


def test_interleaved_medians_take_turns() -> None:
    order: list[str] = []
    tasks = [
        Task([name], lambda sample: sample, order.append)  # type: ignore[list-item]
        for name in ("a", "b")
    ]
    timing.interleaved_medians(tasks, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]


# Right before fast


def test_a_right_result_is_timed_and_described() -> None:
    from bench.bench_ops import test_speed as speed

    benchmark = FakeBenchmark()
    entry = entries_of(SPEC, ["torch"])[0]
    session = Session(Cpu(), rehearsal=True)
    speed(job_of(entry, "fwd+bwd"), session, time.perf_counter, benchmark)
    info = benchmark.extra_info
    assert benchmark.rounds >= 3
    assert info["rms_errors"].keys() == {"out", "gradient of weight"}
    assert info["peak_bytes"] > 0
    both = SPEC.flops(CASE, "fwd") + SPEC.flops(CASE, "bwd")
    assert info["flops"] == both
    session.add_rates(job_of(entry), info, 2.0)
    assert info["tflop_per_s"] == pytest.approx(both / 2e12)


# What cannot be timed


def measured(session: Session, entry: Entry) -> str:
    """Return the reason why the line was skipped, or nothing."""
    from bench.bench_ops import test_speed as speed

    try:
        speed(job_of(entry), session, time.perf_counter, FakeBenchmark())
    except pytest.skip.Exception as skipped:
        return str(skipped)
    return ""


def raises(error: Exception) -> Callable[..., Any]:
    def function(**inputs: Any) -> Any:
        raise error

    return function


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
NO_KERNEL = RuntimeError("No available kernel. Aborting execution.")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, NO_KERNEL])
def test_a_peer_that_cannot_run_is_noted_and_ours_must(error: Exception) -> None:
    session = Session(Cpu(), rehearsal=False)
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert measured(session, Entry("peer", raises(error))) == reason
    names = {"op": SPEC.name, "case": CASE.name, "pass": "fwd", "entry": "peer"}
    assert session.not_timed == [names | {"reason": reason}]
    with pytest.raises(type(error)):
        measured(session, Entry("mine", raises(error), ours=True))
    with pytest.raises(type(error)):  # a rehearsal looks for errors
        measured(Session(Cpu(), rehearsal=True), Entry("peer", raises(error)))
    assert len(session.not_timed) == 1


def test_without_a_reference_nothing_is_timed_and_it_is_tried_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def case_data(*_: Any) -> CaseData:
        tried.append(1)
        raise OUT_OF_MEMORY

    monkeypatch.setattr("bench.harness.session.CaseData", case_data)
    session = Session(Cpu(), rehearsal=False)
    for entry in (Entry("mine", SPEC.op, ours=True), Entry("peer", SPEC.op)):
        assert "do not fit in memory" in measured(session, entry)
    assert [x["entry"] for x in session.not_timed] == ["mine", "peer"]
    assert len(tried) == 1


# What is collected


@pytest.mark.parametrize("tag", ["bench", "bench_full", "bench_cpu", "smoke"])
def test_jobs_have_distinct_names_and_every_kernel_group_a_peer(tag: str) -> None:
    found = list(jobs(OPS.values(), tag, ("triton", "torch"), few_compiled=False))
    assert len({job.id for job in found}) == len(found)
    for spec in OPS.values():
        entries = {(job.group, job.entry.ours) for job in found if job.spec is spec}
        assert entries, f"{spec.name} has no case"
        groups = {group for group, _ in entries}
        assert groups == {group for group, ours in entries if not ours}, spec.name


def test_compiled_peers_run_on_one_case() -> None:
    found = list(jobs([SPEC], "bench_cpu", ("torch",), few_compiled=True))
    (job,) = [job for job in found if job.entry.compiled]
    assert job.direction == "fwd+bwd"


def test_what_cannot_run_is_left_out_with_a_reason() -> None:
    gain = next(case for case in SPEC.tagged("smoke") if "L" in case.sizes)
    names = {job.entry.name for job in jobs([SPEC], "smoke", ("torch",), False)}
    assert "EmbeddingBag" in names
    assert PEERS["byte_pool"][0].unsupported(gain) is not None
    assert any("a sum needs no scale" in text for _, text in left_out([SPEC], "bench_cpu"))


def test_rehearsal_of_the_whole_run() -> None:
    """The command of `make bench`, each body once, on what takes a moment."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/bench_ops.py",
        "--benchmark-disable",
        "-q",
        "--threads=1",
    ]
    done = subprocess.run(
        [*command, "-k", "(fwd+bwd or no-grad) and not compiled"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_no_line_begins_after_the_minutes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--minutes=0", "-q"]
    done = subprocess.run(
        [*command, f"--benchmark-json={tmp_path / 'none.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no minutes are left" in done.stdout
    assert "passed" not in done.stdout
    # Models take longest, so they come last.
    assert done.stdout.index("bench_ops.py") < done.stdout.index("bench_models.py")


# The check


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_kept_for_the_next_result(kept: bool) -> None:
    """Memory is counted in a process of its own, whose allocator nothing else needs."""
    code = """
import resource, torch
from stlm_models.training.process import keep_freed_memory
{}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""".format("keep_freed_memory()" if kept else "")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    rounds = int(done.stdout) / ((64 << 20) / resource.getpagesize())
    # A small tensor may take a place within the freed one, which the next then asks for anew.
    assert rounds < 4 if kept else rounds > 11, rounds


def slow(**inputs: Any) -> torch.Tensor:
    time.sleep(0.02)
    return SPEC.op(**inputs)


@pytest.mark.parametrize(("op", "verdict"), [(SPEC.op, None), (slow, "FAILED")])
def test_a_slow_op_fails_the_check(op: Callable[..., Any], verdict: str | None) -> None:
    spec = replace(SPEC, op=op)
    data = CaseData(spec, CASE, torch.float32, CPU)
    found = check.compare(spec, CASE, "no-grad", data, timing.interleaved_medians, 5)
    assert found is not None
    if verdict is not None:
        assert found.verdict == verdict
        assert min(found.ratios) > check.FAILURE
    assert found.peer in {peer.name for peer in PEERS["byte_pool"] if not peer.compiled}
    assert SPEC.name in check.line(found)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [([1.0], "met"), ([1.1], "missed"), ([1.3, 1.04], "met"), ([1.3, 1.4, 1.26], "FAILED")],
)
def test_verdicts_of_the_check(ratios: list[float], verdict: str) -> None:
    """A ratio that would fail is measured again; the last one counts."""
    data = CaseData(SPEC, CASE, torch.float32, CPU)
    left = [1.0, *ratios]

    def medians(tasks: Sequence[Task], rounds: int) -> list[float]:
        return [left.pop(0), *[1.0] * (len(tasks) - 1)]

    found = check.compare(SPEC, CASE, "fwd+bwd", data, medians, 5)
    assert found is not None
    assert (found.verdict, found.ratios, left) == (verdict, ratios, [])


# What is shown


def record(entry: str, direction: str, median: float, ours: bool) -> report.Record:
    info = {"op": "byte_pool", "case": "T9", "pass": direction, "entry": entry, "ours": ours,
            "compiled": False, "sizes": {"T": 9}, "dtype": "float32", "peak_bytes": 3 << 20,
            "roofline_share": 0.25}  # fmt: skip
    stats = {"median": median, "iqr": median / 10, "q1": median * 0.9, "q3": median * 1.1}
    return {"extra_info": info, "stats": stats}


RECORDS = [
    record("torch", "fwd", 1e-3, True),
    record("EmbeddingBag", "fwd", 2.5e-3, False),
    record("torch", "bwd", 4e-3, True),
]


def test_summary_table() -> None:
    failed = {"op": "byte_pool", "case": "T9", "pass": "bwd", "entry": "EmbeddingBag"}
    about = {
        "device": "A",
        "left_out": [("byte_pool", "X: too old"), ("other", "Y: no")],
        "not_timed": [failed | {"reason": "OutOfMemoryError: CUDA"}],
    }
    (text,) = report.tables(RECORDS, about)
    lines = text.splitlines()
    assert lines[0].startswith("byte_pool: median us")
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
    assert rows["torch"][1:] == ["1000", "±10%", "1.00x", "3", "4000", "±10%", "1.00x", "3"]
    assert rows["EmbeddingBag"][1:] == ["2500", "±10%", "2.50x", "3", "failed"]
    assert rows["roofline"][-2:] == ["25%", "25%"]
    assert lines[-2] == "left out: X: too old"
    assert lines[-1] == "not timed: EmbeddingBag, T9 bwd: OutOfMemoryError: CUDA"


def test_header_says_what_a_figure_needs() -> None:
    about = environment.describe(CPU, commit="abc123")
    text = environment.header(about | {"load": 3.0}, timing.Ceilings(4.3e12, 790e12))
    for needed in (torch.__version__, "abc123", "default launch configs", "4300.0 GB/s", "BUSY"):
        assert needed in text
    assert "BUSY" not in environment.header(about | {"load": 0.1}, None)
