"""Timing of a task: on a GPU between events behind an L2 flush, on a CPU by the clock.

Everything that touches CUDA takes the `torch.cuda` module as an argument, so that the tests walk
through it on a CPU with a stand-in.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .jobs import Task

Timer = Callable[[], float]
Prepared = tuple[tuple[Any, ...], dict[str, Any]]

FLUSH_BYTES = 256 << 20
GRAPH_CALLS = 16
MOST_FLUSHES = 20
LEAST_ROUNDS = 3


@dataclass
class Plan:
    """Arguments of `benchmark.pedantic`, and what is worth recording about them."""

    target: Callable[..., Any]
    setup: Callable[[], Prepared]
    rounds: int
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """Rates that large copies and products reach on this device in this session."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float

    def floor_seconds(self, nbytes: int, flops: int) -> float:
        """Return the least time that the bytes and the arithmetic take at these rates."""
        return max(nbytes / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)


def rounds_for(seconds: float, budget: float, least: int, most: int) -> int:
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def timed_rounds(
    target: Callable[..., Any], setup: Callable[[], Prepared], timer: Timer, rounds: int
) -> list[float]:
    """Return seconds of each round, taken as pytest-benchmark's pedantic mode does."""
    seconds = []
    for _ in range(rounds):
        args, kwargs = setup()
        begin = timer()
        target(*args, **kwargs)
        seconds.append(timer() - begin)
    return seconds


def interleaved_medians(
    tasks: Sequence[Task], rounds: int, timer: Timer = time.perf_counter
) -> list[float]:
    """Time tasks in turns, so that a drifting machine slows all alike; return their medians."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for turn in range(rounds):
        for k in range(len(tasks)):
            which = (k + turn) % len(tasks)
            task = tasks[which]
            prepared = task.prepare(task.samples[0])
            begin = timer()
            task.run(prepared)
            seconds[which].append(timer() - begin)
    return [statistics.median(x) for x in seconds]


def _rotation(task: Task) -> Callable[[], Prepared]:
    turns = itertools.cycle(task.samples)
    return lambda: ((task.prepare(next(turns)),), {})


def _measure_ceilings(
    source: Tensor, left: Tensor, timer: Timer, setup: Callable[[], Prepared]
) -> Ceilings:
    target = torch.empty_like(source)
    copy = timed_rounds(lambda: target.copy_(source), setup, timer, 7)
    matmul = timed_rounds(lambda: left @ left, setup, timer, 7)
    n = left.shape[0]
    # The first two rounds warm up.
    return Ceilings(
        2 * source.nbytes / statistics.median(copy[2:]), 2 * n**3 / statistics.median(matmul[2:])
    )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection: freeing a kernel or graph within a capture ends the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Cpu:
    """CPU timing: one sample and no flush, since the caches are what a user has."""

    tag = "bench_cpu"
    impls = ("torch",)
    dtype = torch.float32
    device = torch.device("cpu")

    def timer(self) -> Timer:
        return time.perf_counter

    def sample_count(self, sample_bytes: int) -> int:
        return 1

    def clear(self) -> None:
        gc.collect()

    def plan(self, task: Task, timer: Timer) -> Plan:
        setup = _rotation(task)
        # The caller's check and memory run have warmed up what takes long; short work needs more.
        begin = time.perf_counter()
        timed_rounds(task.run, setup, timer, 1)
        rounds = rounds_for(time.perf_counter() - begin, 0.2, LEAST_ROUNDS, 60)
        timed_rounds(task.run, setup, timer, 0 if rounds == LEAST_ROUNDS else min(2, rounds // 3))
        return Plan(task.run, setup, rounds, {"timed_as": "clock", "samples": 1})

    def peak_bytes(self, task: Task) -> int:
        """Return the peak of torch's allocator in one run: tensors, not library scratch."""
        prepared = task.prepare(task.samples[0])
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            kept = task.run(prepared)
        del kept
        results = profiler.profiler.kineto_results  # type: ignore[union-attr]
        steps = [
            (event.start_ns(), event.nbytes())
            for event in results.events()
            if event.name() == "[memory]"
        ]
        running = itertools.accumulate(nbytes for _, nbytes in sorted(steps, key=lambda x: x[0]))
        return max(running, default=0)

    def ceilings(self) -> Ceilings:
        source = torch.randn(32 << 20)
        return _measure_ceilings(source, torch.randn(1536, 1536), self.timer(), lambda: ((), {}))


class EventTimer:
    """Timer of GPU work, called once before and once after it.

    The first call records an event and returns 0.0 without waiting, so that the work queues up
    behind the flush; the second waits and returns the seconds of one call.
    """

    __name__ = "cuda_events"

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.calls = 1
        self._cuda = cuda
        self._begin: Any = None

    def __call__(self) -> float:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        if self._begin is None:
            self._begin = event
            return 0.0
        event.synchronize()
        milliseconds = self._begin.elapsed_time(event)
        self._begin = None
        return milliseconds / 1e3 / self.calls


class Gpu:
    """GPU timing: rotated samples behind an L2 flush that is long enough to hide the launches.

    Work that is shorter on the device than its launch on the host is captured instead: one graph
    of many rotated calls, whose results stay alive so that each is written somewhere else.
    """

    tag = "bench"
    impls = ("triton", "torch")
    dtype = torch.bfloat16

    def __init__(
        self,
        cuda: Any = torch.cuda,
        device: torch.device | None = None,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        self._cuda = cuda
        self.device = device or torch.device("cuda", cuda.current_device())
        self._flushed = torch.empty(flush_bytes, dtype=torch.uint8, device=self.device)
        once = timed_rounds(self._flush, lambda: ((), {}), self.timer(), 5)
        self._flush_seconds = max(statistics.median(once), 1e-6)

    def timer(self) -> EventTimer:
        return EventTimer(self._cuda)

    def _flush(self, times: int = 1) -> None:
        for _ in range(times):
            self._flushed.zero_()

    def sample_count(self, sample_bytes: int) -> int:
        """Return how many copies make three L2 caches' worth of input before one is used again.

        Of small inputs as many as a graph has calls: each finds its own flushed from the cache.
        """
        l2_bytes = self._cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(GRAPH_CALLS, -(-3 * l2_bytes // max(sample_bytes, 1))))

    def clear(self) -> None:
        """Give back unused memory, so that the next job finds it whole."""
        gc.collect()
        self._cuda.empty_cache()

    def plan(self, task: Task, timer: EventTimer) -> Plan:
        rotated = _rotation(task)
        timed_rounds(task.run, rotated, timer, 3)
        host = self._host_seconds(task)
        flushes = min(MOST_FLUSHES, 1 + int(host / self._flush_seconds))

        def setup() -> Prepared:
            prepared = rotated()
            self._flush(flushes)
            return prepared

        begin = time.perf_counter()
        device = statistics.median(timed_rounds(task.run, setup, timer, 5))
        rounds = rounds_for((time.perf_counter() - begin) / 5, 0.12, 10, 100)
        info = {"timed_as": "events", "samples": len(task.samples), "host_us": host * 1e6}
        plan = Plan(task.run, setup, rounds, info)
        if task.capturable and device < host:
            self._use_graph(plan, task, timer)
        return plan

    def _host_seconds(self, task: Task) -> float:
        """Return seconds from call to return on an idle device: the cost of launching."""
        seconds = []
        for sample in [task.samples[0]] * 5:
            prepared = task.prepare(sample)
            self._cuda.synchronize()
            begin = time.perf_counter()
            task.run(prepared)
            seconds.append(time.perf_counter() - begin)
        self._cuda.synchronize()
        return statistics.median(seconds)

    def _use_graph(self, plan: Plan, task: Task, timer: EventTimer) -> None:
        try:
            self._refuse_waits(task)
            replay = self._captured(task)
        except RuntimeError as error:
            plan.info["not_captured"] = str(error).splitlines()[0]
            self._cuda.synchronize()
            return

        def setup() -> Prepared:
            self._flush(2)
            return (), {}

        timer.calls = GRAPH_CALLS
        plan.target, plan.setup = replay, setup
        plan.info["timed_as"] = f"graph of {GRAPH_CALLS} calls"

    def _refuse_waits(self, task: Task) -> None:
        """Look for waits first: one inside a capture can leave torch's allocator unusable."""
        prepared = task.prepare(task.samples[0])
        self._cuda.set_sync_debug_mode("error")
        try:
            task.run(prepared)
        finally:
            self._cuda.set_sync_debug_mode("default")

    def _captured(self, task: Task) -> Callable[[], None]:
        # A backward pass runs on its forward's stream, so both must see the stream of the capture.
        stream, graph = self._cuda.Stream(), self._cuda.CUDAGraph()
        turns = itertools.islice(itertools.cycle(task.samples), GRAPH_CALLS)
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            task.run(task.prepare(task.samples[0]))
            prepared = [task.prepare(sample) for sample in turns]
        self._cuda.synchronize()
        with _no_collection(), self._cuda.graph(graph, stream=stream):
            kept = [task.run(x) for x in prepared]

        def replay() -> None:
            graph.replay()
            replay.results = kept  # type: ignore[attr-defined]

        return replay

    def peak_bytes(self, task: Task) -> int:
        prepared = task.prepare(task.samples[0])
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()
        before = self._cuda.memory_allocated()
        kept = task.run(prepared)
        self._cuda.synchronize()
        del kept
        return self._cuda.max_memory_allocated() - before

    def ceilings(self) -> Ceilings:
        source = torch.randn(512 << 20, device=self.device)
        left = torch.randn(8192, 8192, dtype=self.dtype, device=self.device)

        def setup() -> Prepared:
            self._flush(2)  # or the launch would count
            return (), {}

        return _measure_ceilings(source, left, self.timer(), setup)
