"""Attention of a batch on a CPU: by torch's flash attention and by products, which must agree."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.attention import assert_close_to_reference, example
from helpers.lanes import Way
from helpers.ops import LargestTensor
from helpers.tensors import ints
from torch import Tensor

from stlm_kernels import attention
from stlm_kernels.ops.attention import cpu

BF16 = Way("torch", "cpu", torch.bfloat16)
DOCUMENTS = ints(0, 3, 3, 70, 110, 150, 160, 169, 400)


def may_round() -> None:
    """Allow the rounding, until a fixture forbids it again."""
    torch.set_float32_matmul_precision("medium")


def operands(sizes: tuple[int, int, int, int, int], width: int = 8) -> list[Tensor]:
    """q, k, v and the gradient of the output, of (N, H, H_kv, L, L_k)."""
    n, heads, kv_heads, length, keys = sizes
    shapes = [(n, heads, length), *[(n, kv_heads, keys)] * 2, (n, heads, length)]
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*x, width, generator=draw) for x in shapes]


def masks(n: int, length: int, keys: int) -> Tensor:
    """Some keys hidden from each row, never all."""
    hidden = torch.rand(n, 1, length, keys, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[..., 0] = False
    return torch.zeros(n, 1, length, keys).masked_fill(hidden, -torch.inf)


CALLS = [
    ((3, 2, 2, 20, 33), cpu.Call(None, False, 0.3)),
    ((3, 4, 2, 300, 33), cpu.Call(masks(3, 300, 33), False, 0.3)),
    ((3, 4, 2, 20, 33), cpu.Call(masks(1, 20, 33), False, 0.3)),
    ((2, 6, 2, 300, 300), cpu.Call(None, True, 0.3)),
    ((1, 1, 1, 1, 1), cpu.Call(None, True, 2.0)),
]


@pytest.mark.parametrize("weights", [1, 40_000, 1 << 19])
@pytest.mark.parametrize(("sizes", "call"), CALLS, ids=lambda x: str(x)[:24])
def test_products_are_attention(
    sizes: tuple[int, int, int, int, int],
    call: cpu.Call,
    weights: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of one head, of some heads, and of some of the batch."""
    monkeypatch.setattr(cpu, "CHUNK", weights)
    q, k, v, grad = operands(sizes)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    mask = None if call.mask is None else call.mask.double()
    want = F.scaled_dot_product_attention(
        *wide, mask, is_causal=call.causal, scale=call.scale, enable_gqa=True
    )
    grads = torch.autograd.grad(want, wide, grad.double())
    out = cpu._attend_by_products(q, k, v, call)
    found = cpu._gradients_by_products(grad, q, k, v, call)
    for got, right in zip((out, *found), (want, *grads), strict=True):
        torch.testing.assert_close(got.double(), right.detach(), rtol=1e-5, atol=1e-5)


def test_products_where_torch_may_round() -> None:
    q, k, v, _ = operands((2, 2, 1, 20, 20))
    call = cpu.Call(None, True, 0.3)
    assert cpu.attend(q, k, v, call)[1] is not None
    may_round()
    assert cpu.attend(q, k, v, call)[1] is None
    wide = [x.double() for x in (q, k, v)]
    assert cpu.attend(wide[0], wide[1], wide[2], call)[1] is not None


@pytest.mark.parametrize(
    "options",
    [
        {"window": 40},
        {"window": 40, "cu_seqlens": DOCUMENTS},
        {"causal": False, "window": (9, 30), "cu_seqlens": DOCUMENTS},
        {"cu_seqlens": DOCUMENTS},
        {"causal": False, "cu_seqlens": DOCUMENTS},
    ],
    ids=str,
)
@pytest.mark.parametrize("allowed", [(True, True), (True, False), (False, True)])
def test_the_op_by_products(
    options: dict[str, Any], allowed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients hold, also where the permission changes between the two."""
    inputs = example((400,), 4, 2, 16, BF16)
    taken: list[str] = []
    by_products = cpu._attend_by_products, cpu._gradients_by_products

    def attend(*arguments: Any) -> Tensor:
        taken.append("forward")
        return by_products[0](*arguments)

    def gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        taken.append("backward")
        return by_products[1](*arguments)

    monkeypatch.setattr(cpu, "_attend_by_products", attend)
    monkeypatch.setattr(cpu, "_gradients_by_products", gradients)
    answers = iter(allowed)
    if all(allowed):
        may_round()
        assert_close_to_reference(inputs, BF16, **options)
        assert set(taken) == {"forward", "backward"}
        return
    leaves = [x.requires_grad_() for x in inputs]
    if next(answers):
        may_round()
    out = attention(*leaves, **options)
    torch.set_float32_matmul_precision("medium" if next(answers) else "highest")
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert set(taken) == ({"forward", "backward"} if allowed[0] else set())
    assert all(bool(x.isfinite().all()) for x in grads)


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("window", [40, None])
def test_what_a_call_keeps_for_its_backward(by_products: bool, window: int | None) -> None:
    """Its 16-bit operands, there anyway, numbers a row, and an fp32 output if it is read."""
    if by_products:
        may_round()
    inputs = [x.requires_grad_() for x in example((400,), 4, 2, 16, BF16)]
    given, kept = {x.untyped_storage().data_ptr() for x in inputs}, []

    def note(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in given:
            kept.append(x)
        return x

    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is Tensor}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = attention(*inputs, window=window, cu_seqlens=DOCUMENTS)
    rows, size = out.shape[0] * out.shape[1], out.numel()
    assert [x.dtype for x in kept if x.numel() > rows] == [torch.float32] * (not by_products)
    held = [x for x in gc.get_objects() if type(x) is Tensor and id(x) not in before]
    large = [x for x in held if x.dtype == torch.float32 and x.numel() >= size]
    assert len(large) <= (not by_products)


def test_products_form_nothing_large() -> None:
    may_round()
    inputs = [torch.randn(2048, 8, 16, requires_grad=True) for _ in range(3)]
    with LargestTensor() as largest:
        out = attention(*inputs, cu_seqlens=ints(0, 2048))
        torch.autograd.grad(out.sum(), inputs)
    assert largest.elements <= max(cpu.CHUNK, cpu.ROWS * 2048)
