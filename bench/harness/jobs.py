"""Jobs to time: one entry in one pass of one case, on inputs whose result was checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stlm_kernels.spec import Case, Inputs, OpSpec
from stlm_kernels.testing import assert_matches

from ..peers import PEERS
from ..peers.entry import Entry

PASSES = ("fwd", "bwd", "fwd+bwd", "no-grad")
CHECKED_ELEMENTS = 1 << 20
"""A larger result is checked by rows spread over it, the first and the last among them."""


@dataclass(frozen=True)
class Job:
    """Line of the results: an entry in a pass of a case."""

    spec: OpSpec
    case: Case
    direction: str
    entry: Entry

    @property
    def group(self) -> str:
        return f"{self.spec.name}/{self.case.name}/{self.direction}"

    @property
    def id(self) -> str:
        return f"{self.group}/{self.entry.name}".replace("/", "-").replace(" ", "_")


def our_entries(spec: OpSpec, impls: Sequence[str]) -> list[Entry]:
    """Return our implementations, the default first."""
    covered = [impl for impl in impls if impl == "torch" or spec.kernels]
    return [Entry(impl, partial(spec.op, impl=impl), ours=True) for impl in covered]


def entries_of(spec: OpSpec, impls: Sequence[str]) -> list[Entry]:
    return our_entries(spec, impls) + list(PEERS.get(spec.name, ()))


def passes_of(spec: OpSpec) -> tuple[str, ...]:
    return PASSES if spec.grad_args else ("no-grad",)


def cases_of(spec: OpSpec, tag: str) -> list[Case]:
    """Return cases by tag: "bench" (GPU), "bench_full" (its sweep), "bench_cpu", "smoke" (one)."""
    if tag == "smoke":
        return spec.tagged(tag)[:1]
    return spec.tagged("bench", "bench_full") if tag == "bench_full" else spec.tagged(tag)


def _longest_pass(spec: OpSpec) -> tuple[str, ...]:
    return ("fwd+bwd",) if spec.grad_args else ("no-grad",)


def jobs(
    specs: Iterable[OpSpec], tag: str, impls: Sequence[str], few_compiled: bool
) -> Iterator[Job]:
    """Yield every job, in the order in which inputs are shared best.

    Args:
        specs: the ops.
        tag: see `cases_of`.
        impls: our implementations on this device, the default first.
        few_compiled: one compiled peer of each op, on the first case that it supports, in the
            longest pass, since compiling takes long.
    """
    for spec in specs:
        compiled = False
        for case in cases_of(spec, tag):
            for entry in entries_of(spec, impls):
                seldom = entry.compiled and few_compiled
                if entry.unsupported(case) or (seldom and compiled):
                    continue
                compiled |= entry.compiled
                for direction in _longest_pass(spec) if seldom else passes_of(spec):
                    yield Job(spec, case, direction, entry)


def left_out(specs: Iterable[OpSpec], tag: str) -> Iterator[tuple[str, str]]:
    """Yield (op, sentence) for each peer that cannot run some case, and the reason."""
    for spec in specs:
        sentences = [
            f"{entry.name}: {reason}"
            for entry in PEERS.get(spec.name, ())
            for case in cases_of(spec, tag)
            if (reason := entry.unsupported(case))
        ]
        yield from ((spec.name, sentence) for sentence in dict.fromkeys(sentences))


@dataclass(frozen=True)
class Sample:
    """Inputs, leaves and upstream gradients; timing rotates over samples of equal values."""

    inputs: Inputs
    leaves: list[Tensor]
    upstream: list[Tensor]


@dataclass(frozen=True)
class Task:
    """Job on its inputs: `run(prepare(sample))`, of which only `run` is timed.

    Not capturable is work that users never run as a CUDA graph.
    """

    samples: Sequence[Any]
    prepare: Callable[[Any], Any]
    run: Callable[[Any], Any]
    capturable: bool = True


def task_of(job: Job, samples: Sequence[Sample], function: Callable[..., Any]) -> Task:
    """Make the task of a job; a backward pass gets a fresh graph each time, made untimed."""
    converted = [replace(x, inputs=job.entry.convert(x.inputs)) for x in samples]

    def forward(sample: Sample) -> Any:
        return function(**sample.inputs)

    def without_grad(sample: Sample) -> Any:
        with torch.no_grad():
            return function(**sample.inputs)

    def graph_of(sample: Sample) -> tuple[list[Tensor], Sample]:
        return roots_of(forward(sample)), sample

    def backward(graph: tuple[list[Tensor], Sample]) -> Any:
        roots, sample = graph
        return torch.autograd.grad(roots, sample.leaves, sample.upstream, allow_unused=True)

    def both(sample: Sample) -> Any:
        return backward(graph_of(sample))

    if job.direction == "bwd":
        return Task(converted, graph_of, backward)
    run = {"fwd": forward, "fwd+bwd": both, "no-grad": without_grad}[job.direction]
    return Task(converted, lambda sample: sample, run)


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def roots_of(result: Any) -> list[Tensor]:
    """Return the outputs that require gradients: the roots of a backward pass."""
    return [x for x in _outputs(result) if x.requires_grad]


class CaseData:
    """Inputs of one case, the reference results, and the errors of entries checked so far."""

    def __init__(self, spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.case = spec, case
        inputs = spec.make_inputs(case, dtype, device, 0)
        self.first = self._sample(inputs)
        self._errors: dict[str, dict[str, float]] = {}
        self._functions: dict[str, Callable[..., Any]] = {}
        self._set_reference()

    def _sample(self, inputs: Inputs, upstream: list[Tensor] | None = None) -> Sample:
        inputs = dict(inputs)
        present = [name for name in self.spec.grad_args if inputs.get(name) is not None]
        for name in present:
            inputs[name] = inputs[name].detach().requires_grad_()
        if upstream is None:
            roots = roots_of(self.spec.op(**inputs, impl="torch")) if present else []
            upstream = [torch.randn_like(x) for x in roots]
        return Sample(inputs, [inputs[name] for name in present], upstream)

    def samples(self, count: int) -> list[Sample]:
        """Return the first sample and copies of it elsewhere in memory."""
        copies = [
            self._sample(_mapped(self.first.inputs, Tensor.clone), [*map(Tensor.clone, upstream)])
            for upstream in [self.first.upstream] * (count - 1)
        ]
        return [self.first, *copies]

    def sample_bytes(self) -> int:
        tensors = [x for x in self.first.inputs.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in [*tensors, *self.first.upstream])

    def function_of(self, entry: Entry, backend: str) -> Callable[..., Any]:
        if entry.name not in self._functions:
            function = entry.function
            if entry.compiled:
                torch.compiler.reset()  # shapes of earlier cases would make this one dynamic
                function = torch.compile(function, dynamic=False, backend=backend)
            self._functions[entry.name] = function
        return self._functions[entry.name]

    def _set_reference(self) -> None:
        """Compute results in fp64: by the reference for small cases, else by the yardstick."""
        spec, first = self.spec, self.first
        reference = spec.reference if "smoke" in self.case.tags else spec.yardstick
        floats = any(x.is_floating_point() for x in _tensors(first.inputs))
        # What has no float input is integers found one by one: faster on the CPU.
        move = Tensor.double if floats else Tensor.cpu
        wide = self._sample(
            _mapped(first.inputs, lambda x: move(x) if x.is_floating_point() or not floats else x),
            [x.double() for x in first.upstream],
        )
        self._want = _results(reference, wide)
        self._yardstick = _results(spec.yardstick, first) if floats else self._want

    def errors_of(self, entry: Entry, function: Callable[..., Any]) -> dict[str, float]:
        """Check an entry; return the relative RMS error of each result and gradient.

        Raises:
            AssertionError: ours breaks the tolerance rule, or a peer computes something else.
        """
        if entry.name not in self._errors:
            sample = replace(self.first, inputs=entry.convert(self.first.inputs))
            got = _results(function, sample)
            names = self._names(len(got))
            for name, x, want, yardstick in zip(
                names, got, self._want, self._yardstick, strict=True
            ):
                self._assert_right(entry, name, x, want, yardstick)
            self._errors[entry.name] = {
                name: relative_rms(x, want)
                for name, x, want in zip(names, got, self._want, strict=True)
            }
        return self._errors[entry.name]

    def _names(self, count: int) -> list[str]:
        gradients = [f"gradient of {name}" for name in self.spec.grad_args
                     if self.first.inputs.get(name) is not None]  # fmt: skip
        outputs = count - len(gradients)
        return [*(["out"] if outputs == 1 else [f"out{i}" for i in range(outputs)]), *gradients]

    def _assert_right(
        self, entry: Entry, name: str, got: Tensor, want: Tensor, yardstick: Tensor
    ) -> None:
        label = f"{self.spec.name}: {entry.name}: {name}"
        if not want.is_floating_point():
            assert torch.equal(got.cpu().long(), want.cpu().long()), f"{label} differs"
        elif entry.ours:
            argument = name.removeprefix("gradient of ")
            exact = argument in self.spec.exact(self.case)
            rows = argument in self.spec.row_args
            assert_matches(got, want, yardstick, name=label, exact=exact, rows=rows)
        elif not (entry.loose_gradients and name.startswith("gradient")):
            # Half the digits: a peer may round more often than we do, but not compute another thing
            error, allowed = relative_rms(got, want), torch.finfo(got.dtype).eps ** 0.5
            assert error <= allowed, f"{label}: relative RMS error {error:.2e} > {allowed:.2e}"


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs.values() if isinstance(x, Tensor)]


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return {k: change(x.detach()) if isinstance(x, Tensor) else x for k, x in inputs.items()}


def _results(function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Run a function; return the rows to check of every output, then of every gradient."""
    outputs = _outputs(function(**sample.inputs))
    roots = roots_of(outputs)
    gradients: Sequence[Tensor | None] = []
    if roots:
        gradients = torch.autograd.grad(roots, sample.leaves, sample.upstream, allow_unused=True)
    filled = [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(sample.leaves, gradients, strict=True)
    ]
    return [_sampled_rows(x.detach()) for x in [*outputs, *filled]]


def _sampled_rows(x: Tensor) -> Tensor:
    if x.numel() <= CHECKED_ELEMENTS:
        return x
    count = max(1, CHECKED_ELEMENTS * x.shape[0] // x.numel())
    return x[torch.linspace(0, x.shape[0] - 1, count, dtype=torch.float64).long().to(x.device)]


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Return the relative RMS error; NaN, which passes no comparison, where only one is NaN."""
    got, want = got.double().cpu(), want.double().cpu()
    if want.numel() == 0 or torch.equal(got, want):
        return 0.0
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
