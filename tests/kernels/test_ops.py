"""Every op in every lane: values, gradients, layouts, repeatability, compile, limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.op_matches import assert_op_matches
from helpers.ops import (
    assert_same,
    first_cases,
    gradients,
    in_fp64,
    inputs_of,
    map_tensors,
    op_cases,
    require_grads,
    results,
    run,
    shrunk_cases,
    sized_for,
    skip_unless_covered,
    terms_of,
    upstream_of,
)
from torch import Tensor

from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec
from stlm_kernels.testing import GuardBand

RESULT_LANES = pytest.mark.lanes("cpu", "interpret", "gpu")
VALUE_LANES = pytest.mark.lanes("cpu", "interpret", "compiled", "gpu")
ONE_DTYPE = pytest.mark.one_dtype


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_a_name_is_one_case(spec: OpSpec) -> None:
    """Commands, tables and tests find a case by its name; one case may carry several tags."""
    names = [case.name for case in spec.cases]
    assert sorted(set(names)) == sorted(names)


@VALUE_LANES
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke", "edge"))
def test_values_and_gradients(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_covered(spec, way)
    assert_op_matches(spec, case, way)


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), op_cases("cancels"))
def test_what_cancels(spec: OpSpec, case: Case, way: Way, draw: int) -> None:
    """Gradients that are exactly zero: rounding alone decides what is left of them."""
    skip_unless_covered(spec, way)
    assert_op_matches(spec, case, way, draw)


class _Leak(torch.autograd.Function):
    """The identity, whose gradient is too large by a given one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leak: Tensor) -> Tensor:
        ctx.leak = leak
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad + ctx.leak.to(grad), None


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize("share", [1e-3, 1e-5])
@pytest.mark.parametrize(("spec", "case"), op_cases("cancels"))
def test_what_should_cancel_and_does_not_shows(
    spec: OpSpec, case: Case, way: Way, share: float
) -> None:
    """A small share of the terms, in each gradient by itself."""
    skip_unless_covered(spec, way)
    inputs = inputs_of(spec, case, way)
    wide = in_fp64(spec, inputs)
    terms = terms_of(spec, wide, results(spec.reference(**wide)))
    for name in terms.keys() & inputs.keys():

        def planted(name: str = name, **given: Any) -> Any:
            given[name] = _Leak.apply(given[name], share * terms[name])
            return spec.op(**given)

        with pytest.raises(AssertionError, match=f"gradient of {name}: "):
            assert_op_matches(replace(spec, op=planted), case, way)


@pytest.mark.lanes("cpu", "gpu")
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), op_cases("long"))
def test_long_cases(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_covered(spec, way)
    assert_op_matches(spec, case, way)


def strided(x: Tensor) -> Tensor:
    """Copy x to every other element of a larger buffer."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]


def offset(x: Tensor) -> Tensor:
    """Copy x one element into a larger buffer, so that nothing is aligned."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize("layout", [strided, offset])
@pytest.mark.parametrize(("spec", "case"), first_cases())
def test_layouts_change_nothing(spec: OpSpec, case: Case, way: Way, layout: Any) -> None:
    skip_unless_covered(spec, way)
    inputs = inputs_of(spec, sized_for(way, case), way)
    other = require_grads(spec, map_tensors(inputs, lambda x: layout(x.detach())))
    plain = run(spec, spec.op, inputs, impl=way.impl)
    moved = run(spec, spec.op, other, impl=way.impl)
    for before, after in zip(plain, moved, strict=True):
        if way.impl == "triton":
            assert_same(before, after)
        # Matrix products of the BLAS beneath the torch path round by alignment.
        eps = torch.finfo(way.dtype).eps
        for name, x in before.items():
            torch.testing.assert_close(x, after[name], rtol=64 * eps, atol=64 * eps)


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), first_cases())
def test_expanded_upstream(spec: OpSpec, case: Case, way: Way) -> None:
    """`sum().backward()` hands a gradient of stride 0 down."""
    skip_unless_covered(spec, way, grad=True)
    inputs = inputs_of(spec, sized_for(way, case), way)
    outputs = results(spec.op(**inputs, impl=way.impl))
    floats = {name: x for name, x in outputs.items() if x.is_floating_point()}
    ones = {name: torch.ones_like(x) for name, x in floats.items()}
    expanded = {name: x.new_ones(()).expand_as(x) for name, x in floats.items()}
    dense = spec.op(**inputs, impl=way.impl)
    assert_same(
        gradients(spec, inputs, results(dense), ones),
        gradients(spec, inputs, outputs, expanded),
    )


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), first_cases())
def test_repeats_bit_for_bit(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_covered(spec, way)
    inputs = inputs_of(spec, sized_for(way, case), way)
    before = {k: v.detach().clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    first, first_grads = run(spec, spec.op, inputs, impl=way.impl)
    for _ in range(100 if way.device == "cuda" else 1):
        again, again_grads = run(spec, spec.op, inputs, impl=way.impl)
        assert_same(first, again)
        assert_same(first_grads, again_grads)
    assert_same(before, {k: inputs[k].detach() for k in before})


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_retained_graph_gives_the_same_gradient_twice(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_covered(spec, way, grad=True)
    inputs = inputs_of(spec, case, way)
    outputs = results(spec.op(**inputs, impl=way.impl))
    leaves = [inputs[name] for name in spec.grad_args if name in inputs]
    heads = [x for x in outputs.values() if x.requires_grad]
    ups = [upstream_of(outputs)[name] for name, x in outputs.items() if x.requires_grad]
    first = torch.autograd.grad(heads, leaves, ups, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(heads, leaves, ups, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke"))
def test_guard_bands(spec: OpSpec, case: Case, way: Way) -> None:
    """No input's neighbourhood is read (its NaN would show) or written."""
    skip_unless_covered(spec, way)
    inputs = inputs_of(spec, sized_for(way, case), way)
    bands = {k: GuardBand(v) for k, v in inputs.items() if isinstance(v, Tensor)}
    guarded = {k: bands[k].tensor if k in bands else v for k, v in inputs.items()}
    plain, plain_grads = run(spec, spec.op, inputs, impl=way.impl)
    safe, safe_grads = run(spec, spec.op, guarded, impl=way.impl)
    assert_same(plain, safe)
    assert_same(plain_grads, safe_grads)
    for band in bands.values():
        band.assert_untouched()


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), first_cases())
def test_frozen_arguments(spec: OpSpec, case: Case, way: Way) -> None:
    """Each differentiable argument alone gets the gradient it gets among the others."""
    skip_unless_covered(spec, way, grad=True)
    inputs = inputs_of(spec, sized_for(way, case), way)
    _, together = run(spec, spec.op, inputs, impl=way.impl)
    for name in together:
        alone = map_tensors(inputs, lambda x: x.detach())
        alone[name] = alone[name].requires_grad_()
        outputs = results(spec.op(**alone, impl=way.impl))
        ups = {k: g for k, g in upstream_of(outputs).items() if outputs[k].requires_grad}
        (grad,) = torch.autograd.grad(
            [outputs[k] for k in ups], [alone[name]], list(ups.values()), allow_unused=True
        )
        assert torch.equal(together[name], torch.zeros_like(alone[name]) if grad is None else grad)
    frozen = map_tensors(inputs, lambda x: x.detach())
    assert not any(x.requires_grad for x in results(spec.op(**frozen, impl=way.impl)).values())


@RESULT_LANES
@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_compile_fullgraph(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_covered(spec, way)
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows what tracing does")
    torch._dynamo.reset()
    compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager")
    inputs = inputs_of(spec, case, way)
    plain, plain_grads = run(spec, spec.op, inputs, impl=way.impl)
    traced, traced_grads = run(spec, compiled, inputs, impl=way.impl)
    for name, x in plain.items():
        torch.testing.assert_close(x, traced[name])
    for name, x in plain_grads.items():
        torch.testing.assert_close(x, traced_grads[name], rtol=1e-5, atol=1e-5)


@RESULT_LANES
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke"))
def test_autocast(spec: OpSpec, case: Case, way: Way) -> None:
    """fp32 arguments are rounded when loaded: results as of 16-bit ones, gradients in fp32.

    Biases are not, nor is what another model gave.
    """
    skip_unless_covered(spec, way, grad=True)
    if way.dtype != torch.float32:
        pytest.skip("autocast is about fp32 arguments")
    # The interpreter computes bf16 wrongly.
    narrow = torch.float16 if way.impl == "triton" and way.device == "cpu" else torch.bfloat16
    inputs = inputs_of(spec, case, way)
    stored = {
        name: value.detach().to(narrow)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in spec.fp32_args
        else value
        for name, value in inputs.items()
    }
    want, want_grads = run(spec, spec.op, require_grads(spec, stored), impl=way.impl)
    with torch.autocast(way.device, narrow):
        got = results(spec.op(**inputs, impl=way.impl))
    assert_same(got, want)
    grads = gradients(spec, inputs, got, upstream_of(got))
    eps = torch.finfo(narrow).eps
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        scale = float(want_grads[name].abs().max())
        torch.testing.assert_close(grad, want_grads[name].float(), rtol=eps, atol=eps * scale)


@pytest.mark.lanes("cpu", "gpu")
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke"))
def test_backward_under_autocast(spec: OpSpec, case: Case, way: Way) -> None:
    """Gradients do not depend on autocast, as loops know that leave it late."""
    skip_unless_covered(spec, way, grad=True)
    inputs = inputs_of(spec, case, way)
    with torch.autocast(way.device, torch.bfloat16):
        _, inside = run(spec, spec.op, inputs, impl=way.impl)
        outputs = results(spec.op(**inputs, impl=way.impl))
    assert_same(inside, gradients(spec, inputs, outputs, upstream_of(outputs)))


@pytest.mark.parametrize(("spec", "case"), first_cases())
def test_gradcheck_of_the_torch_path(spec: OpSpec, case: Case) -> None:
    """First and second derivatives, against finite differences in fp64."""
    way = Way("torch", "cpu", torch.float64)
    skip_unless_covered(spec, way, grad=True)
    inputs = inputs_of(spec, case, way)
    names = [name for name in spec.grad_args if name in inputs]

    def function(*leaves: Tensor) -> list[Tensor]:
        given = {**inputs, **dict(zip(names, leaves, strict=True))}
        return [x for x in results(spec.op(**given, impl="torch")).values() if x.requires_grad]

    leaves = [inputs[name] for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(("spec", "case"), first_cases())
def test_gradcheck_of_the_reference(spec: OpSpec, case: Case) -> None:
    way = Way("torch", "cpu", torch.float64)
    skip_unless_covered(spec, way, grad=True)
    inputs = in_fp64(spec, inputs_of(spec, case, way))
    names = [name for name in spec.grad_args if name in inputs]

    def function(*leaves: Tensor) -> list[Tensor]:
        given = {**inputs, **dict(zip(names, leaves, strict=True))}
        return [x for x in results(spec.reference(**given)).values() if x.requires_grad]

    leaves = [inputs[name] for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@RESULT_LANES
@ONE_DTYPE
@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_double_backward(spec: OpSpec, case: Case, way: Way) -> None:
    """The kernels refuse a second derivative and name the way out."""
    skip_unless_covered(spec, way, grad=True)
    inputs = inputs_of(spec, case, way)
    outputs = results(spec.op(**inputs, impl=way.impl))
    upstream = {k: g.requires_grad_() for k, g in upstream_of(outputs).items()}
    leaves = [inputs[name] for name in spec.grad_args if name in inputs]
    heads = [outputs[name] for name in upstream]
    grads = torch.autograd.grad(heads, leaves, list(upstream.values()), create_graph=True)
    total = sum(g.float().square().sum() for g in grads)
    if way.impl == "triton":
        with pytest.raises(NotImplementedError, match=f"^{spec.name}: .*impl='torch'"):
            total.backward()
    else:
        total.backward()
        assert all(g.grad is not None and g.grad.isfinite().all() for g in upstream.values())


@RESULT_LANES
@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_torch_func(spec: OpSpec, case: Case, way: Way) -> None:
    """torch.func.grad, and vmap over it, agree with autograd."""
    skip_unless_covered(spec, way, grad=True)
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows what the transforms do")
    inputs = inputs_of(spec, case, way)
    name = spec.grad_args[0]
    fixed = map_tensors(inputs, lambda x: x.detach())

    def loss(leaf: Tensor) -> Tensor:
        outputs = results(spec.op(**{**fixed, name: leaf}, impl=way.impl))
        return sum(x.square().sum() for x in outputs.values() if x.is_floating_point())

    points = [inputs[name], (2 * fixed[name]).requires_grad_()]
    want = [torch.autograd.grad(loss(x), [x])[0] for x in points]
    torch.testing.assert_close(torch.func.grad(loss)(fixed[name]), want[0], rtol=1e-5, atol=1e-5)
    both = torch.func.vmap(torch.func.grad(loss))(torch.stack([x.detach() for x in points]))
    torch.testing.assert_close(both, torch.stack(want), rtol=1e-5, atol=1e-5)
