"""Shared by the tests over the registry: inputs of a case, results by name, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.lanes import Way
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, Inputs, OpSpec


def op_cases(*tags: str) -> list[Any]:
    """(spec, case) parameters of every op's cases with one of `tags`, with readable ids."""
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in OPS.values()
        for case in spec.tagged(*tags)
    ]


def first_cases() -> list[Any]:
    """One small case of every op."""
    return [pytest.param(spec, spec.tagged("smoke")[0], id=name) for name, spec in OPS.items()]


def shrunk_cases() -> list[Any]:
    """A case of every op smaller than any of its own: for what no size changes."""
    return [
        pytest.param(spec, shrunk(spec.tagged("smoke")[0]), id=name) for name, spec in OPS.items()
    ]


def shrunk(case: Case) -> Case:
    most = {"B": 2, "T": 24, "P": 5, "N": 12, "D": 20, "C": 28}  # no two alike
    sizes = {key: min(x, most[key]) if key in most else x for key, x in case.sizes.items()}
    return Case(sizes, case.tags)


def sized_for(way: Way, case: Case) -> Case:
    """Return the case; one of fewer programs where triton's interpreter walks them one by one."""
    return shrunk(case) if (way.impl, way.device) == ("triton", "cpu") else case


def skip_unless_covered(spec: OpSpec, way: Way, *, grad: bool = False) -> None:
    if way.impl == "triton" and not spec.kernels:
        pytest.skip("this op has no kernel yet")
    if grad and not spec.grad_args:
        pytest.skip("this op is not differentiable")


def inputs_of(spec: OpSpec, case: Case, way: Way, seed: int = 0) -> Inputs:
    """The case's arguments, differentiable ones asking for gradients."""
    inputs = spec.make_inputs(case, way.dtype, torch.device(way.device), seed)
    return require_grads(spec, inputs)


def require_grads(spec: OpSpec, inputs: Inputs) -> Inputs:
    for name in spec.grad_args:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].detach().requires_grad_()
    return inputs


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return {
        name: change(value) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def in_fp64(spec: OpSpec, inputs: Inputs) -> Inputs:
    """The stored values, widened, on the CPU, as new leaves."""

    def widen(x: Tensor) -> Tensor:
        x = x.detach().cpu()
        return x.double() if x.is_floating_point() else x

    return require_grads(spec, map_tensors(inputs, widen))


def as_leaves(spec: OpSpec, inputs: Inputs) -> Inputs:
    return require_grads(spec, map_tensors(inputs, lambda x: x.detach().clone()))


def results(out: Any) -> dict[str, Tensor]:
    """The outputs of an op by name."""
    if isinstance(out, Tensor):
        return {"out": out}
    names = getattr(out, "_fields", None) or [f"out{i}" for i in range(len(out))]
    return dict(zip(names, out, strict=True))


def upstream_of(outputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """A random gradient for every float output, of eighths, which every dtype holds exactly."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(x.shape, generator=rng) * 8).round().div(8).to(x.device, x.dtype)
        for name, x in outputs.items()
        if x.is_floating_point()
    }


def gradients(
    spec: OpSpec, inputs: Inputs, outputs: dict[str, Tensor], upstream: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradient of every differentiable argument by name."""
    leaves = {name: inputs[name] for name in spec.grad_args if inputs.get(name) is not None}
    heads = [name for name in upstream if outputs[name].requires_grad]
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if heads:
        grads = torch.autograd.grad(
            [outputs[name] for name in heads],
            list(leaves.values()),
            [upstream[name].to(outputs[name]) for name in heads],
            allow_unused=True,
        )
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def terms_of(spec: OpSpec, wide: Inputs, outputs: dict[str, Tensor], seed: int = 1) -> Any:
    """Absolute terms of what may cancel, for the random upstream gradient of `seed`."""
    fixed = map_tensors(wide, torch.Tensor.detach)
    with torch.no_grad():
        return spec.terms(upstream_of(outputs, seed), **fixed)


def run(
    spec: OpSpec, function: Callable[..., Any], inputs: Inputs, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and, for a random upstream gradient, the gradients."""
    outputs = results(function(**inputs, **options))
    if not spec.grad_args:
        return outputs, {}
    return outputs, gradients(spec, inputs, outputs, upstream_of(outputs))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit, NaN equal to NaN."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=0, equal_nan=True)


class LargestTensor(TorchDispatchMode):
    """The most elements that any result of an aten op has, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and not func.is_view:
                self.elements = max(self.elements, x.numel())
        return out


class ElementsMade(TorchDispatchMode):
    """Count of elements in results of aten ops, without views and what is written in place.

    An index op's operands do not count: it reads and writes few of their rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            self.elements += sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out
