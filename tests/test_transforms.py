"""What torch does with a call beside running it: shapes alone, many gradients at once, one tensor
for two arguments, many patch borders at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import Way
from model_helpers import TINY, scrambled
from op_helpers import inputs_of, map_tensors, results, upstream_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stlm_kernels import (
    attention,
    attention_pool,
    ngram_embedding,
    patch_attention,
    segment_pool,
)
from stlm_kernels._spec import OpSpec
from stlm_kernels.registry import OPS
from stlm_models.attention import rotary_tables

WAY = Way("torch", "cpu", torch.float32)
DIFFERENTIABLE = (
    "byte_pool", "segment_pool", "attention_pool", "unpool", "ema_unpool", "ngram_embedding",
)  # fmt: skip
RESULT_LANES = pytest.mark.lanes("cpu", "interpret", "gpu")
BORDERS = torch.tensor([0, 2, 5], dtype=torch.int32)
IDS = torch.arange(5)


def specs(*names: str) -> list[object]:
    return [pytest.param(OPS[name], id=name) for name in names]


@pytest.mark.parametrize("spec", specs(*DIFFERENTIABLE, "find_patches"))
def test_meta_tensors_give_shapes(spec: OpSpec) -> None:
    inputs = inputs_of(spec, spec.tagged("smoke")[0], WAY)
    shapes = map_tensors(inputs, lambda x: x.to("meta"))
    got = results(spec.op(**shapes))
    for name, x in results(spec.op(**inputs)).items():
        assert got[name].is_meta
        assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("spec", specs(*DIFFERENTIABLE))
def test_many_gradients_at_once(spec: OpSpec) -> None:
    """`is_grads_batched`, which torch.autograd.functional vectorises with: no torch.func there."""
    inputs = inputs_of(spec, spec.tagged("smoke")[0], WAY)
    out = results(spec.op(**inputs))
    upstream = upstream_of(out)["out"]
    leaves = [inputs[name] for name in spec.grad_args if inputs.get(name) is not None]
    several = torch.stack([upstream, 2 * upstream, upstream.flip(0)])
    batched = torch.autograd.grad(
        out["out"], leaves, several, is_grads_batched=True, retain_graph=True
    )
    for i, one in enumerate(several):
        alone = torch.autograd.grad(out["out"], leaves, one, retain_graph=True)
        for some, x in zip(batched, alone, strict=True):
            torch.testing.assert_close(some[i], x, rtol=1e-5, atol=1e-5)


TWICE: dict[str, Callable[..., Tensor]] = {
    "attention_pool": lambda x, **impl: attention_pool(x[0], x, x, BORDERS, **impl),
    "ngram_embedding": lambda x, **impl: ngram_embedding(IDS, [x[:, 0]] * 2, ns=[2, 3], **impl),
    "patch_attention": lambda x, **impl: patch_attention(x, x, x, BORDERS, **impl),
    "attention": lambda x, **impl: attention(*[x[None]] * 3, window=2, **impl),
}


@RESULT_LANES
@pytest.mark.one_dtype
@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_for_two_arguments_compiles(name: str, way: Way) -> None:
    """Dynamo refuses an autograd.Function that is given one tensor twice."""

    def fn(x: Tensor) -> Tensor:
        return TWICE[name](x, impl=way.impl)

    torch._dynamo.reset()
    x = torch.randn(5, 2, 16, device=way.device, requires_grad=True)
    want, got = fn(x), torch.compile(fn, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    (want,), (got,) = (torch.autograd.grad(out, x, upstream) for out in (want, got))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "first", "last"])
def test_borders_of_many_texts_at_once(mode: str) -> None:
    """vmap over the borders alone, and over them and the states."""
    x = torch.randn(2, 5, 3)
    several = torch.stack([BORDERS, torch.tensor([0, 0, 3], dtype=torch.int32)])

    def loss(x: Tensor, borders: Tensor) -> Tensor:
        return segment_pool(x, borders, mode=mode).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(x[0], several)
    for one, borders in zip(got, several, strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss)(x[0], borders))
    got = torch.func.vmap(torch.func.grad(loss))(x, several)
    for one, *arguments in zip(got, x, several, strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss)(*arguments))


def test_gradients_of_each_text_by_themselves() -> None:
    """vmap over a whole model: modules look at no values there, and keep nothing of it."""
    model = scrambled(replace(TINY, patch_capacity=24)).train()
    parameters = dict(model.named_parameters())
    texts = torch.randint(32, 123, (2, 20))

    def loss(parameters: dict[str, Tensor], text: Tensor) -> Tensor:
        total, count = torch.func.functional_call(model, parameters, (text, text.roll(-1)))
        return total / count

    several = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, texts)
    for i, text in enumerate(texts):
        wanted = torch.autograd.grad(loss(parameters, text), list(parameters.values()))
        for got, want in zip(several.values(), wanted, strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-5)


def test_tables_of_a_fake_mode_do_not_outlive_it() -> None:
    shape = (24, 8, 1234.0, torch.device("cpu"))
    with FakeTensorMode():
        assert rotary_tables(*shape)[0].shape == (24, 4)
    assert all(type(table) is Tensor for table in rotary_tables(*shape))
