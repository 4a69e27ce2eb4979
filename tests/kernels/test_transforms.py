"""Uses of a call beside running it: shapes alone, many gradients at once, one tensor
for two arguments, many patch boundaries at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.kernel_models import MODELS
from helpers.lanes import Way
from helpers.models import TINY, scrambled
from helpers.norms import assert_as_right
from helpers.ops import (
    as_leaves,
    gradients,
    in_fp64,
    inputs_of,
    map_tensors,
    op_cases,
    results,
    run,
    skip_unless_covered,
    terms_of,
    upstream_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stlm_kernels import (
    attention,
    attention_pool,
    ngram_embedding,
    patch_attention,
    segment_pool,
)
from stlm_kernels.spec import Case, Inputs, OpSpec
from stlm_kernels.testing import assert_matches
from stlm_models import STLM
from stlm_models.layers.rotary import rotary_tables

WAY = Way("torch", "cpu", torch.float32)
RESULT_LANES = pytest.mark.lanes("cpu", "interpret", "gpu")
BOUNDARIES = torch.tensor([0, 2, 5], dtype=torch.int32)
IDS = torch.arange(5)


def on_meta(inputs: Inputs) -> Inputs:
    return map_tensors(inputs, lambda x: x.detach().to("meta").requires_grad_(x.requires_grad))


def has_a_size(spec: OpSpec, case: Case) -> bool:
    """Patches are as many as the values make them, unless there is max_patches."""
    return spec.name != "find_patches" or "C" in case.sizes


SIZED = [param for param in op_cases("smoke") if has_a_size(*param.values)]


def assert_shapes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype), name


@pytest.mark.parametrize(("spec", "case"), SIZED)
def test_shapes_on_the_meta_device(spec: OpSpec, case: Case) -> None:
    inputs = inputs_of(spec, case, WAY)
    for found, expected in zip(
        run(spec, spec.op, on_meta(inputs)), run(spec, spec.op, inputs), strict=True
    ):
        assert_shapes(found, expected)
        assert all(x.is_meta for x in found.values())


@pytest.mark.parametrize(("spec", "case"), SIZED)
def test_shapes_in_a_fake_mode(spec: OpSpec, case: Case) -> None:
    inputs = inputs_of(spec, case, WAY)
    expected = run(spec, spec.op, inputs)
    with FakeTensorMode() as mode:
        found = run(spec, spec.op, map_tensors(inputs, mode.from_tensor))
    assert_shapes(found[0], expected[0])
    assert_shapes(found[1], expected[1])


Outputs = Callable[..., tuple[Tensor, ...]]


def by_autograd(function: Outputs, leaves: list[Tensor], ups: tuple[Tensor, ...]) -> Any:
    """Gradients as torch.autograd.functional vectorises them: no torch.func there."""
    return torch.autograd.grad(function(*leaves), leaves, ups, is_grads_batched=True)


def by_vmap(function: Outputs, leaves: list[Tensor], ups: tuple[Tensor, ...]) -> Any:
    heads = function(*leaves)
    return torch.func.vmap(lambda *ups: torch.autograd.grad(heads, leaves, ups))(*ups)


def by_vjp(function: Outputs, leaves: list[Tensor], ups: tuple[Tensor, ...]) -> Any:
    return torch.func.vmap(torch.func.vjp(function, *leaves)[1])(ups)


@pytest.mark.parametrize("take", [by_autograd, by_vmap, by_vjp])
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke"))
def test_many_gradients_at_once(spec: OpSpec, case: Case, take: Any) -> None:
    """Each row of them is held to the tolerance of a gradient taken by itself."""
    skip_unless_covered(spec, WAY, grad=True)
    inputs = inputs_of(spec, case, WAY)
    names = [name for name in spec.grad_args if inputs.get(name) is not None]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(results(spec.op(**inputs | dict(zip(names, leaves, strict=True)))).values())

    def alone(judge: Any, given: Inputs, ups: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients(spec, given, results(judge(**given)), ups)

    ups = [upstream_of(results(spec.op(**inputs)), seed) for seed in (1, 2)]
    together = tuple(torch.stack([up[name] for up in ups]) for name in ups[0])
    found = take(function, [inputs[name] for name in names], together)
    wide = in_fp64(spec, inputs)
    for i, up in enumerate(ups):
        want = alone(spec.reference, wide, up)
        terms = terms_of(spec, wide, results(spec.reference(**wide)), i + 1)
        allowed = alone(spec.yardstick, as_leaves(spec, inputs), up)
        for name, grads in zip(names, found, strict=True):
            judged = {"exact": name in spec.exact(case), "rows": name in spec.row_args}
            judged |= {"name": name, "terms": terms.get(name)}
            assert_matches(grads[i], want[name], allowed[name], **judged)


TWICE: dict[str, Callable[..., Tensor]] = {
    "attention_pool": lambda x, **impl: attention_pool(x[0], x, x, BOUNDARIES, **impl),
    "ngram_embedding": lambda x, **impl: ngram_embedding(
        IDS, [x[:, 0]] * 2, ngram_sizes=[2, 3], **impl
    ),
    "patch_attention": lambda x, **impl: patch_attention(x, x, x, BOUNDARIES, **impl),
    "attention": lambda x, **impl: attention(*[x[None]] * 3, window=2, **impl),
}


@RESULT_LANES
@pytest.mark.one_dtype
@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_for_two_arguments_compiles(name: str, way: Way) -> None:
    """Dynamo refuses an autograd.Function that is given one tensor twice.

    Compiled, the call may be as wrong as it is eager.
    """

    def fn(x: Tensor) -> Tensor:
        return TWICE[name](x, impl=way.impl)

    torch._dynamo.reset()
    x = torch.randn(5, 2, 16, device=way.device, requires_grad=True)
    wide = x.detach().cpu().double().requires_grad_()
    outs = TWICE[name](wide, impl="torch"), fn(x), fn(x)
    compiled = torch.compile(fn, fullgraph=True, backend="eager")(x)
    assert_matches(compiled, *outs[:2])
    upstream = torch.randn_like(compiled)
    (want,) = torch.autograd.grad(outs[0], wide, upstream.cpu().double())
    (eager,), (got,) = (torch.autograd.grad(out, x, upstream) for out in (outs[1], compiled))
    assert_matches(got, want, eager)
    if way.impl == "torch":
        assert_matches(*torch.autograd.grad(outs[2], x, upstream, create_graph=True), want, eager)


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "min", "first", "last"])
def test_boundaries_of_many_texts_at_once(mode: str) -> None:
    """vmap over the boundaries alone, and over them and the states."""
    x = torch.randn(2, 5, 3)
    several = torch.stack([BOUNDARIES, torch.tensor([0, 0, 3], dtype=torch.int32)])

    def loss(x: Tensor, boundaries: Tensor) -> Tensor:
        return segment_pool(x, boundaries, mode=mode).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(x[0], several)
    for one, boundaries in zip(got, several, strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss)(x[0], boundaries))
    got = torch.func.vmap(torch.func.grad(loss))(x, several)
    for one, *arguments in zip(got, x, several, strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss)(*arguments))


def test_gradients_of_each_text_by_themselves() -> None:
    """vmap over a whole model: modules look at no values there, and keep nothing of it.

    Its gradients, and those of torch.func.grad, may be as wrong as autograd's.
    """
    model = scrambled(replace(TINY, max_patches=24)).train()
    parameters = dict(model.named_parameters())
    wide = {name: x.detach().double().requires_grad_() for name, x in parameters.items()}
    texts = torch.randint(32, 123, (2, 20))

    def loss(parameters: dict[str, Tensor], text: Tensor) -> Tensor:
        total, count = torch.func.functional_call(model, parameters, (text, text.roll(-1)))
        return total / count

    several = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, texts)
    for i, text in enumerate(texts):
        eager, exact = (
            dict(zip(leaves, torch.autograd.grad(loss(leaves, text), leaves.values()), strict=True))
            for leaves in (parameters, wide)
        )
        assert_as_right({name: x[i] for name, x in several.items()}, eager, exact)
        assert_as_right(torch.func.grad(loss)(parameters, text), eager, exact)


@pytest.mark.parametrize(("where", "packed"), [("meta", False), ("fake", True)])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_shapes_alone(name: str, where: str, packed: bool) -> None:
    """A training step, and logits."""
    config = MODELS[name]
    if config.patch_rule != "none":
        config = replace(config, max_patches=24)
    with torch.device("meta") if where == "meta" else FakeTensorMode():
        model = STLM(config).train()
        ids = torch.randint(32, 123, (40,) if packed else (2, 20))
        boundaries = torch.tensor([0, 7, 40], dtype=torch.int32) if packed else None
        loss, count = model(ids, ids, cu_seqlens=boundaries)
        loss.backward()
        logits = model(ids, cu_seqlens=boundaries)
    assert loss.shape == count.shape == ()
    assert logits.shape == (*ids.shape, config.vocab_size)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in model.parameters())


def test_tables_of_a_fake_mode_do_not_outlive_it() -> None:
    shape = (24, 8, 1234.0, torch.device("cpu"))
    with FakeTensorMode():
        assert rotary_tables(*shape)[0].shape == (24, 4)
    assert all(type(table) is Tensor for table in rotary_tables(*shape))
