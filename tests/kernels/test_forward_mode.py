"""Forward-mode AD: the torch paths have it, the kernels refuse it and name the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.ops import (
    first_cases,
    gradients,
    inputs_of,
    map_tensors,
    op_cases,
    results,
    shrunk_cases,
    skip_unless_covered,
    upstream_of,
)
from torch import Tensor
from torch.autograd import forward_ad

from stlm_kernels import explain, linear_cross_entropy, segment_pool, unpool
from stlm_kernels.spec import Case, Inputs, OpSpec

TORCH = Way("torch", "cpu", torch.float64)
Outputs = Callable[..., tuple[Tensor, ...]]


def of_leaves(spec: OpSpec, inputs: Inputs, impl: str) -> tuple[Outputs, tuple[Tensor, ...]]:
    """The float results as a function of the differentiable arguments, and those."""
    names = [name for name in spec.grad_args if inputs.get(name) is not None]
    fixed = map_tensors(inputs, lambda x: x.detach())

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = fixed | dict(zip(names, leaves, strict=True))
        found = results(spec.op(**given, impl=impl)).values()
        return tuple(x for x in found if x.is_floating_point())

    return function, tuple(fixed[name] for name in names)


def by_jvp(function: Outputs, leaves: Any, tangents: Any) -> tuple[Tensor, ...]:
    return torch.func.jvp(function, leaves, tangents)[1]


def by_linearize(function: Outputs, leaves: Any, tangents: Any) -> tuple[Tensor, ...]:
    return torch.func.linearize(function, *leaves)[1](*tangents)


def by_dual_numbers(function: Outputs, leaves: Any, tangents: Any) -> tuple[Tensor, ...]:
    """Forward-mode gradients, of leaves that reverse mode wants gradients of as well."""
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.clone().requires_grad_(), dx)
            for x, dx in zip(leaves, tangents, strict=True)
        ]
        return tuple(forward_ad.unpack_dual(x).tangent.detach() for x in function(*duals))


def by_vmap(function: Outputs, leaves: Any, tangents: Any) -> tuple[Tensor, ...]:
    both = tuple(torch.stack([dx, -dx]) for dx in tangents)
    found = torch.func.vmap(lambda *dx: by_jvp(function, leaves, dx))(*both)
    for x in found:
        torch.testing.assert_close(x[1], -x[0])
    return tuple(x[0] for x in found)


WAYS = [by_jvp, by_linearize, by_dual_numbers, by_vmap]


def random_like(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(3)
    return tuple(torch.randn(x.shape, generator=rng).to(x) for x in tensors)


@pytest.mark.parametrize("take", WAYS)
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke"))
def test_tangents_agree_with_gradients(spec: OpSpec, case: Case, take: Any) -> None:
    """u . (J v) = (J^T u) . v, with what the tests of every op hold to the reference."""
    skip_unless_covered(spec, TORCH, grad=True)
    inputs = inputs_of(spec, case, TORCH)
    function, leaves = of_leaves(spec, inputs, "torch")
    tangents = random_like(leaves)
    found = take(function, leaves, tangents)
    outputs = results(spec.op(**inputs, impl="torch"))
    ups = upstream_of(outputs)
    grads = gradients(spec, inputs, outputs, ups).values()
    forward = sum((u * x).sum() for u, x in zip(ups.values(), found, strict=True))
    backward = sum((grad * dx).sum() for grad, dx in zip(grads, tangents, strict=True))
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("spec", "case"), op_cases("edge"))
def test_edges_too(spec: OpSpec, case: Case) -> None:
    test_tangents_agree_with_gradients(spec, case, by_jvp)


@pytest.mark.parametrize(("spec", "case"), first_cases())
def test_forward_over_reverse(spec: OpSpec, case: Case) -> None:
    """A Hessian's product with a vector, by tangents of a gradient and by two gradients."""
    skip_unless_covered(spec, TORCH, grad=True)
    function, leaves = of_leaves(spec, inputs_of(spec, case, TORCH), "torch")
    tangents = random_like(leaves)

    def loss(*leaves: Tensor) -> Tensor:
        return sum((x.sin() * x).sum() for x in function(*leaves))  # type: ignore[return-value]

    every = tuple(range(len(leaves)))
    _, found = torch.func.jvp(torch.func.grad(loss, every), leaves, tangents)
    again = [x.clone().requires_grad_() for x in leaves]
    first = torch.autograd.grad(loss(*again), again, create_graph=True)
    want = torch.autograd.grad(first, again, tangents, materialize_grads=True)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", ["mean", "max", "min"])
def test_hessian(mode: str) -> None:
    """torch.func.hessian is forward over reverse, many directions at once."""
    x = torch.randn(6, 2, dtype=torch.float64)
    boundaries = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

    def loss(x: Tensor) -> Tensor:
        return segment_pool(x, boundaries, mode=mode).pow(3).sum()

    want = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), want)
    vectorised = torch.autograd.functional.hessian(
        loss, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    )
    torch.testing.assert_close(vectorised, want)


def test_one_argument_alone() -> None:
    """The others carry nothing, whichever it is."""
    states, null = torch.randn(3, 2), torch.randn(2)
    ids, residual = torch.tensor([-1, 0, 0, 2]), torch.randn(4, 2)
    for name, x in {"patch_states": states, "null_state": null, "residual": residual}.items():
        given = {"patch_states": states, "null_state": null, "residual": residual}

        def call(value: Tensor, name: str = name, given: Any = given) -> Tensor:
            return unpool(**{**given, name: value}, read_ids=ids)

        _, tangent = torch.func.jvp(call, (x,), (torch.ones_like(x),))
        want = call(x + 1) - call(x)  # it is linear
        torch.testing.assert_close(tangent, want)


@pytest.mark.parametrize("autocast", [False, True])
def test_rounded_operands(autocast: bool) -> None:
    """fp32 weights beside 16-bit inputs, and under autocast."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=rng)
    hidden = hidden if autocast else hidden.bfloat16()
    table, dtable = torch.randn(2, 20, 8, generator=rng).unbind()
    target = torch.randint(0, 20, (6,), generator=rng)

    def loss(table: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(hidden, table, target)

    grad = torch.func.grad(loss)(table)
    _, tangent = torch.func.jvp(loss, (table,), (dtable,))
    torch.testing.assert_close(tangent, (grad * dtable).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.one_dtype
@pytest.mark.parametrize("take", WAYS)
@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_the_kernels_refuse(spec: OpSpec, case: Case, take: Any, way: Way) -> None:
    skip_unless_covered(spec, way, grad=True)
    function, leaves = of_leaves(spec, inputs_of(spec, case, way), "triton")
    message = f"^{spec.name}: impl='triton' cannot run this call: .*only impl='torch' has"
    for wanted in range(len(leaves)):  # each argument alone

        def alone(x: Tensor, wanted: int = wanted) -> tuple[Tensor, ...]:
            return function(*leaves[:wanted], x, *leaves[wanted + 1 :])

        with pytest.raises(NotImplementedError, match=message):
            take(alone, (leaves[wanted],), (torch.ones_like(leaves[wanted]),))
    function(*leaves)  # and only there


def test_explain_says_so() -> None:
    x, boundaries = torch.randn(4, 2), torch.tensor([0, 4], dtype=torch.int32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert any("forward-mode" in reason for reason in explain("segment_pool", dual, boundaries))
        assert not any(
            "forward-mode" in reason for reason in explain("segment_pool", x, boundaries)
        )
