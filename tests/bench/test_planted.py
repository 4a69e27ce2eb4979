"""The benchmarks judged: planted wrong and slow variants show, timers are right, names true."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_bench import CASE, CPU, SPEC, FakeBenchmark, job_of
from torch import Tensor

from bench.bench_ops import test_speed as speed
from bench.harness.jobs import CaseData, Job, Task, task_of
from bench.harness.session import Session
from bench.harness.timing import Cpu, Gpu, Plan, timed_rounds
from bench.peers.entry import Entry
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

# Wrong ones


class _Planted(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def without_last_row(x: Tensor) -> Tensor:
    return torch.cat([x[:-1], torch.zeros_like(x[-1:])])


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda x: 1.001 * x,
    "off by one": lambda x: x.roll(1, 0),
    "dropped tail": without_last_row,
    "half the digits": lambda x: x.half().to(x.dtype) + 0.01 * x.abs().mean(),
}


def wrong_result(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda **inputs: change(SPEC.op(**inputs, impl="torch"))


def wrong_gradient(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda **inputs: _Planted.apply(SPEC.op(**inputs, impl="torch"), change)


@pytest.mark.parametrize("plant", [wrong_result, wrong_gradient])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_variant_is_never_timed(plant: Any, change: str, ours: bool) -> None:
    benchmark = FakeBenchmark()
    entry = Entry("wrong", plant(CHANGES[change]), ours=ours)
    what = "wrong: out" if plant is wrong_result else "wrong: gradient of weight"
    with pytest.raises(AssertionError, match=what):
        speed(job_of(entry), Session(Cpu(), rehearsal=True), time.perf_counter, benchmark)
    assert benchmark.rounds == 0


@pytest.mark.lanes("gpu")
@pytest.mark.parametrize("plant", [wrong_result, wrong_gradient])
def test_a_wrong_variant_is_never_timed_on_a_gpu(plant: Any) -> None:
    gpu = Gpu()
    entry = Entry("wrong", plant(CHANGES["off by one"]), ours=True)
    with pytest.raises(AssertionError, match="wrong: "):
        speed(job_of(entry), Session(gpu, rehearsal=True), gpu.timer(), FakeBenchmark())


# Slow ones


def median_of(machine: Cpu | Gpu, function: Callable[..., Any]) -> float:
    """Return the time that a run would report for this function, without gradients."""
    data = CaseData(SPEC, CASE, machine.dtype, machine.device)
    task = task_of(Job(SPEC, CASE, "no-grad", Entry("any", function)), [data.first], function)
    timer: Any = machine.timer()
    plan = machine.plan(task, timer)
    return statistics.median(timed_rounds(plan.target, plan.setup, timer, plan.rounds))


def test_a_slow_variant_shows() -> None:
    """The delay shows as planted; a busy machine may make it more."""

    def slow(**inputs: Any) -> Tensor:
        time.sleep(0.01)
        return SPEC.op(**inputs)

    right, wrong = median_of(Cpu(), SPEC.op), median_of(Cpu(), slow)
    assert wrong - right > 0.005


@pytest.mark.lanes("gpu")
@pytest.mark.exclusive
def test_a_slow_variant_shows_on_a_gpu() -> None:
    def slow(**inputs: Any) -> Tensor:
        from helpers.spin import spin

        out = SPEC.op(**inputs)
        spin(torch.empty(1, dtype=torch.int64, device=out.device), 100_000)
        return out

    gpu = Gpu()
    assert median_of(gpu, slow) - median_of(gpu, SPEC.op) == pytest.approx(100e-6, rel=0.1)


# The timer


def of_known_duration(machine: Cpu | Gpu, run: Callable[[Any], Any]) -> list[float]:
    task = Task([None], lambda sample: sample, run)
    timer: Any = machine.timer()
    plan = machine.plan(task, timer)
    return timed_rounds(plan.target, plan.setup, timer, 5)


def test_the_clock_against_a_known_duration() -> None:
    seconds = of_known_duration(Cpu(), lambda _: time.sleep(0.02))
    assert 0.02 <= min(seconds) < 0.03  # a busy machine wakes some of them late


@pytest.mark.lanes("gpu")
@pytest.mark.exclusive
@pytest.mark.parametrize("microseconds", [200, 2000])
def test_events_against_a_known_duration(microseconds: int) -> None:
    from helpers.spin import spin

    out = torch.empty(1, dtype=torch.int64, device="cuda")
    seconds = of_known_duration(Gpu(), lambda _: spin(out, 1000 * microseconds))
    assert statistics.median(seconds) == pytest.approx(microseconds * 1e-6, rel=0.03, abs=3e-6)


@pytest.mark.lanes("gpu")
@pytest.mark.exclusive
def test_a_graph_against_a_known_duration() -> None:
    """Sixteen calls in one graph: the time of one, without the launches between them."""
    from helpers.spin import spin

    gpu = Gpu()
    out = torch.empty(1, dtype=torch.int64, device="cuda")
    timer = gpu.timer()
    task = Task([None], lambda sample: sample, lambda _: spin(out, 200_000))
    task.run(None)
    plan = Plan(task.run, lambda: ((None,), {}), 5)
    gpu._use_graph(plan, task, timer)
    assert plan.info["timed_as"].startswith("graph")
    seconds = timed_rounds(plan.target, plan.setup, timer, 5)
    assert statistics.median(seconds) == pytest.approx(200e-6, rel=0.03, abs=3e-6)


@pytest.mark.lanes("aot")
def test_the_kernel_of_known_duration_compiles() -> None:
    """The loop asks the clock again each time."""
    from helpers.spin import _spin

    from stlm_kernels.inspect import target

    with target(90):
        compiled = _spin.warmup(torch.empty(1, dtype=torch.int64), 1000, grid=(1,), num_warps=1)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    assert compiled.asm["ptx"].count("%globaltimer") >= 2


# Names

SHAPES = {"B", "C", "D", "H", "K", "KV", "L", "N", "P", "T", "V", "W", "max"}


def facts_of(inputs: dict[str, Any]) -> set[Any]:
    """Every dimension of the inputs, less one for offsets, their rows, pairs of a rotary table's
    columns, and every plain value.
    """
    facts: set[Any] = set()
    for name, value in inputs.items():
        if name == "cos":
            facts.add(2 * value.shape[-1])
        if isinstance(value, Tensor):
            rows = math.prod(value.shape[:-1])
            facts |= {*value.shape, *(dim - 1 for dim in value.shape), rows}
        elif not isinstance(value, tuple | list):
            facts.add(value)
    return facts


def unfounded_sizes(spec: OpSpec, case: Case) -> dict[str, int]:
    """Return claims of the case's name that its inputs do not keep."""
    facts = facts_of(spec.make_inputs(case, torch.float32, CPU, 0))
    return {key: x for key, x in case.sizes.items() if key in SHAPES and x not in facts}


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in OPS.items()])
def test_names_of_cases_are_true(spec: OpSpec) -> None:
    by_name: dict[str, Case] = {}
    for case in spec.cases:
        same = by_name.setdefault(case.name, case)
        assert same.sizes == case.sizes, f"two cases are called {case.name}"
    for case in spec.tagged("smoke", "edge"):
        assert unfounded_sizes(spec, case) == {}, case.name


def test_a_name_that_lies_is_found() -> None:
    def other_inputs(case: Case, *rest: Any) -> dict[str, Any]:
        return SPEC.make_inputs(replace(case, sizes={**case.sizes, "D": 40}), *rest)

    assert unfounded_sizes(replace(SPEC, make_inputs=other_inputs), CASE) == {"D": CASE["D"]}
    assert unfounded_sizes(SPEC, CASE) == {}
