"""The losses above 512 columns: chunks of rows, products by torch, one kernel between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.op_matches import assert_op_matches
from helpers.ops import LargestTensor, assert_same
from helpers.tensors import projection
from torch import Tensor

from stlm_kernels import _launch, linear_cross_entropy, linear_logprobs, linear_sample
from stlm_kernels.ops.linear_logprobs import config
from stlm_kernels.registry import OPS
from stlm_kernels.spec import case

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
ON_KERNELS = pytest.mark.lanes("interpret", "gpu")


def example(way: Way, vocab: int = 520) -> tuple[Tensor, Tensor, Tensor]:
    """Return operands of seven rows, one of them ignored."""
    hidden, weight, target = projection(7, 16, vocab, way)
    target[2] = -100
    return hidden, weight, target


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four rows at a time, in blocks of 256 columns."""
    monkeypatch.setattr(config, "chunk_rows", lambda valid: 4)
    with _launch.overriding({"linear_logprobs_chunk": {"BLOCK": 256, "num_warps": 4}}):
        yield


@ON_KERNELS
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("linear_cross_entropy", {"reduction": "mean", "bias": 1, "smoothing": 0.1, "z": 1e-2}),
        ("linear_cross_entropy", {"reduction": "sum", "valid": 513, "cap": 5.0, "ignored": 0.3}),
        ("linear_cross_entropy", {"reduction": "none", "bias": 1, "scale": 2.0}),
        ("linear_logprobs", {"cap": 5.0, "ignored": 0.3, "bias": 1}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)),
)
def test_several_chunks_of_several_blocks(
    way: Way, op: str, sizes: dict[str, Any], many_chunks: None
) -> None:
    assert_op_matches(OPS[op], case("edge", N=10, D=20, V=600, **sizes), way)


@ON_KERNELS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_as_on_one_tile(
    way: Way, reduction: str, monkeypatch: pytest.MonkeyPatch, many_chunks: None
) -> None:
    """Both families take a vocabulary of 300, and agree."""
    hidden, weight, target = example(way, vocab=300)

    def found() -> list[Tensor]:
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl="triton")
        return [loss, *torch.autograd.grad(loss.sum(), (hidden, weight))]

    tile = found()
    monkeypatch.setattr(config, "MAX_VOCAB", 16)
    eps = torch.finfo(way.dtype).eps
    for a, b in zip(found(), tile, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * scale)


@EVERY_LANE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_behave(way: Way, reduction: str) -> None:
    """Retained, repeated, expanded, of one argument alone; nothing saved is mutated."""
    hidden, weight, target = example(way)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, target, reduction=reduction, impl=way.impl)

    out = loss(hidden, weight)
    first = torch.autograd.grad(out.sum(), (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad((4 * out).sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (hidden, weight))
    assert_same(dict(enumerate(first)), dict(enumerate(again)))
    for x, y in zip(first, scaled, strict=True):
        torch.testing.assert_close(
            4 * x, y, rtol=0, atol=2.0**-22 if way.dtype.itemsize == 2 else 0
        )
    (alone,) = torch.autograd.grad(loss(hidden, weight.detach()).sum(), hidden)
    assert torch.equal(alone, first[0])
    (alone,) = torch.autograd.grad(loss(hidden.detach(), weight).sum(), weight)
    assert torch.equal(alone, first[1])
    assert not loss(hidden.detach(), weight.detach()).requires_grad


@EVERY_LANE
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bad_and_ignored_rows(way: Way, reduction: str) -> None:
    """NaN of an ignored row reaches nothing; an unchecked bad target is loud."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows where it goes")
    hidden, weight, target = example(way)
    hidden.data[2] = float("nan")

    def grads(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss.sum(), (hidden, weight))

    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=way.impl)
    dh, dw = grads(loss)
    assert loss.isfinite().all()
    assert dw.isfinite().all()
    assert (dh[2] == 0).all()
    assert (dh[0] != 0).any()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def unseen(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, t, reduction=reduction, impl=way.impl)

    torch._dynamo.reset()
    again = unseen(hidden, weight, target)
    torch.testing.assert_close(again, loss)
    for a, b in zip(grads(again), (dh, dw), strict=True):
        torch.testing.assert_close(a, b)
    target[5] = 520
    loss = unseen(hidden, weight, target)
    dh, dw = grads(loss)
    assert loss.isnan().any()
    assert dh.isnan().any(1).nonzero().flatten().tolist() == [5]
    assert dw.isnan().any()


@ON_KERNELS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(way: Way, reduction: str) -> None:
    hidden, weight, target = example(way)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl="triton")
    (grad,) = torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^linear_cross_entropy: .*impl='torch'"):
        grad.float().square().sum().backward()


@ON_KERNELS
def test_a_second_derivative_of_linear_logprobs_is_refused_in_its_name(way: Way) -> None:
    hidden, weight, target = example(way)
    logprob, _ = linear_logprobs(hidden, weight, target, impl="triton")
    (grad,) = torch.autograd.grad(logprob.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^linear_logprobs: .*impl='torch'"):
        grad.float().square().sum().backward()


@EVERY_LANE
def test_transforms(way: Way) -> None:
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows what the transforms do")
    hidden, weight, target = example(way)

    def loss(h: Tensor) -> Tensor:
        return linear_cross_entropy(h, weight.detach(), target, impl=way.impl)

    both = torch.stack([hidden.detach(), 2 * hidden.detach()])
    got = torch.func.vmap(torch.func.grad(loss))(both)
    for x, grad in zip(both, got, strict=True):
        x = x.requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(loss(x), x)[0])


@ON_KERNELS
def test_registration(way: Way) -> None:
    """Schema and Meta kernel of each pass."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows the shapes")
    hidden, weight, target = (x.detach() for x in example(way))
    bias, classes = torch.zeros(520, device=way.device), torch.ones(520, device=way.device)
    options = (torch.float32, -100, 0.0, 1.0, 515, 0.1, 0.0)
    upstream = torch.ones(7, device=way.device)
    ops, checks = torch.ops.stlm, ("test_schema", "test_faketensor")
    head = (hidden, weight, target)
    for op, arguments in (
        (ops.linear_logprobs_chunked_fwd, (*head, None, None, *options)),
        (
            ops.linear_logprobs_chunked_bwd,
            (upstream, upstream, *head, bias, classes, *options, True, True, True),
        ),
        (ops.linear_cross_entropy_chunked_fwd, (*head, bias, classes, *options, True, False, True)),
        (ops.linear_cross_entropy_chunked_fwd, (*head, None, None, *options, False, True, False)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


@ON_KERNELS
def test_a_bias_that_rules_out_whole_blocks(way: Way, many_chunks: None) -> None:
    hidden, weight, target = example(way)
    bias = torch.zeros(520, device=way.device, dtype=way.dtype)
    bias[:300] = -torch.inf
    target[target >= 0] = 400
    loss = linear_cross_entropy(hidden, weight, target, linear_bias=bias, impl="triton")
    baseline = linear_cross_entropy(hidden, weight[300:], target.clamp(max=100), impl="torch")
    torch.testing.assert_close(loss, baseline, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("valid", [513, 8192, 50_257, 128_256, 1_000_000])
def test_the_scratch_is_bounded(valid: int) -> None:
    rows, pitch = config.chunk_rows(valid), config.pitch_of(valid)
    assert pitch % 128 == 0
    assert valid <= pitch < valid + 128
    assert rows % 128 == 0
    assert rows * pitch * 4 <= max(config.SCRATCH_BYTES, 128 * pitch * 4)
    assert config.fits_on_chip(512)
    assert not config.fits_on_chip(valid)


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}], ids=["plain", "cut"])
def test_sampling_takes_a_chunk_at_a_time(options: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(0)  # small integers: every product is exact
    hidden, weight = (torch.randint(-3, 4, (n, 2), generator=rng).float() for n in (400, 8000))
    with LargestTensor() as largest:
        ids = linear_sample(hidden, weight, seed=1, **options)
    assert largest.elements <= 1 << 20
    assert torch.equal(ids[:100], linear_sample(hidden[:100], weight, seed=1, **options))


@ON_KERNELS
def test_log_probabilities_and_sums_agree(way: Way, many_chunks: None) -> None:
    hidden, weight, target = example(way)
    logprob, lse = linear_logprobs(hidden, weight, target, impl="triton")
    total = linear_cross_entropy(hidden, weight, target, reduction="sum", impl="triton")
    torch.testing.assert_close(-logprob.sum(), total)
    assert lse[2] == logprob[2] == 0
