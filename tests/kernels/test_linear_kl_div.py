"""Properties of linear_kl_div alone: agreement with torch, masks, memory, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.lanes import Way
from helpers.ops import LargestTensor
from torch import Tensor

from stlm_kernels import explain, linear_kl_div


def example(rows: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=rng)
    weight = torch.randn(vocab, width, generator=rng) / width**0.5
    teacher = 2 * torch.randn(rows, vocab, generator=rng)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_agrees_with_torch(way: Way, temperature: float) -> None:
    """Teacher first: KL(p || q), not the other way round."""
    hidden, weight, teacher = (x.detach().to(way.dtype) for x in example(30, 16, 40))
    wide = torch.promote_types(way.dtype, torch.float32)
    ours = linear_kl_div(hidden, weight, teacher, temperature=temperature)
    logq = (F.linear(hidden.to(wide), weight.to(wide)) / temperature).log_softmax(1)
    p = (teacher.to(wide) / temperature).softmax(1)
    baseline = F.kl_div(logq, p, reduction="batchmean") * temperature**2
    assert ours.dtype == wide
    torch.testing.assert_close(ours, baseline, rtol=1e-5, atol=1e-6)


def test_a_student_like_its_teacher_has_no_loss() -> None:
    hidden, weight, _ = example(20, 16, 40)
    teacher = 5 * torch.tanh(hidden @ weight.T * 0.5 / 5)
    loss = linear_kl_div(hidden, weight, teacher, softcap=5.0, logit_scale=0.5, temperature=2.0)
    assert abs(loss.item()) < 1e-6
    (grad,) = torch.autograd.grad(loss, hidden)
    assert float(grad.abs().max()) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_in_a_masked_row_reaches_nothing(reduction: str) -> None:
    hidden, weight, teacher = example(20, 16, 40)
    mask = torch.ones(20, dtype=torch.bool)
    mask[3] = mask[11] = False
    poisoned = hidden.detach().clone()
    poisoned[3], teacher[3], teacher[11] = float("nan"), float("nan"), float("inf")
    poisoned.requires_grad_()
    loss = linear_kl_div(poisoned, weight, teacher, mask=mask, reduction=reduction)
    assert loss.isfinite().all()
    got = torch.autograd.grad(loss.sum(), (poisoned, weight))
    assert (got[0][~mask] == 0).all()
    kept = hidden.detach()[mask].requires_grad_()
    alone = linear_kl_div(kept, weight, teacher[mask], reduction=reduction)
    want = torch.autograd.grad(alone.sum(), (kept, weight))
    torch.testing.assert_close(got[0][mask], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("where", ["input", "teacher_logits"])
def test_nan_in_a_counted_row_is_loud(where: str) -> None:
    hidden, weight, teacher = example(20, 16, 40)
    (hidden if where == "input" else teacher).data[3] = float("nan")
    loss = linear_kl_div(hidden, weight, teacher, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert grads[0].isnan().any(1).nonzero().flatten().tolist() == [3]
    assert grads[1].isnan().any()


def test_what_both_rule_out_costs_nothing() -> None:
    """A bias of -inf where the teacher's logit is -inf: the same as without the column."""
    hidden, weight, teacher = example(20, 16, 40)
    bias = torch.zeros(40)
    bias[30:], teacher[:, 30:] = -torch.inf, -torch.inf
    loss = linear_kl_div(hidden, weight, teacher, linear_bias=bias)
    want = linear_kl_div(hidden, weight[:30], teacher[:, :30])
    torch.testing.assert_close(loss, want)
    (again,), (grad,) = (torch.autograd.grad(x, hidden) for x in (loss, want))
    torch.testing.assert_close(again, grad)
    bias[3] = -torch.inf  # what only the student rules out costs everything
    assert linear_kl_div(hidden, weight, teacher, linear_bias=bias).isinf()


def test_no_row_counted() -> None:
    hidden, weight, teacher = example(6, 8, 20)
    none = torch.zeros(6, dtype=torch.bool)
    mean = linear_kl_div(hidden, weight, teacher, mask=none)
    total = linear_kl_div(hidden, weight, teacher, mask=none, reduction="sum")
    assert mean.isnan()
    assert total == 0
    for loss in (mean, total):
        for grad in torch.autograd.grad(loss, (hidden, weight)):
            assert (grad == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivatives(reduction: str) -> None:
    hidden, weight, teacher = (x.detach().double() for x in example(6, 4, 9))
    mask = torch.arange(6) != 2

    def loss(h: Tensor, w: Tensor) -> Tensor:
        options: dict[str, Any] = {"reduction": reduction, "temperature": 2.0, "softcap": 3.0}
        return linear_kl_div(h, w, teacher, mask=mask, **options)

    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


def test_the_teacher_takes_no_gradient() -> None:
    hidden, weight, teacher = example(6, 8, 20)
    teacher.requires_grad_()
    linear_kl_div(hidden, weight, teacher).backward()
    assert teacher.grad is None
    h, w = hidden.detach(), weight.detach()
    grad = torch.func.grad(lambda t: linear_kl_div(h, w, t))(teacher.detach())
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_of_another_precision(dtype: torch.dtype) -> None:
    hidden, weight, teacher = example(6, 8, 20)
    narrow = teacher.to(dtype)
    ours = linear_kl_div(hidden, weight, narrow)
    assert torch.equal(ours, linear_kl_div(hidden, weight, narrow.float()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_students_logits_never_exist(reduction: str) -> None:
    hidden, weight, teacher = example(20_000, 4, 257)
    with LargestTensor() as largest:
        linear_kl_div(hidden, weight, teacher, reduction=reduction).sum().backward()
    assert largest.elements <= 1 << 20


GOOD: dict[str, Any] = {
    "input": torch.zeros(3, 4),
    "linear_weight": torch.zeros(5, 4),
    "teacher_logits": torch.zeros(3, 5),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_logits": torch.zeros(3, 4)}, ValueError, r"expected shape \(3, 5\), got"),
        ({"valid_vocab": 4}, ValueError, r"teacher_logits: expected shape \(3, 4\), got \(3, 5\)"),
        (
            {"teacher_logits": torch.zeros(3, 5).double()},
            ValueError,
            "teacher_logits: expected dty",
        ),
        ({"teacher_logits": torch.zeros(3, 5).int()}, ValueError, "teacher_logits: expected dtype"),
        ({"mask": torch.ones(2).bool()}, ValueError, r"mask: expected shape \(3,\), got \(2,\)"),
        ({"mask": torch.ones(3)}, ValueError, "mask: expected dtype bool, got float32"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number > 0"),
        (
            {"reduction": "batchmean"},
            ValueError,
            "reduction: expected one of 'mean', 'sum', 'none'",
        ),
        ({"impl": "triton"}, NotImplementedError, "impl='triton' cannot run .* no Triton kernel"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_kl_div(**(GOOD | change))


def test_explain_says_that_there_is_no_kernel() -> None:
    assert any("no Triton kernel" in reason for reason in explain(linear_kl_div, **GOOD))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_a_gradient(reduction: str) -> None:
    """Dynamo calls the autograd functions itself where nothing wants a gradient."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(5, n, generator=rng) for n in (4, 4, 5))
    torch._dynamo.reset()
    compiled = torch.compile(linear_kl_div, fullgraph=True, backend="aot_eager")
    got = compiled(hidden, weight, teacher, reduction=reduction)
    torch.testing.assert_close(got, linear_kl_div(hidden, weight, teacher, reduction=reduction))
