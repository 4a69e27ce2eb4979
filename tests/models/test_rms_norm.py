"""rms_norm on a CPU: its own gradient, gradients of it, and transforms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_models.layers.norms import EPS, rms_norm

SHAPES = [(3, 5), (2, 3, 8), (0, 4), (6, 1)]


def states(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    x = states(*shape)
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, shape[-1:], eps=EPS))
    assert torch.autograd.gradcheck(rms_norm, x)
    assert torch.autograd.gradgradcheck(rms_norm, x)


def test_rows_of_zeros_have_finite_gradients() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, EPS**-0.5))
    assert again.isfinite().all()


def test_sixteen_bits() -> None:
    x = states(64, 96, dtype=torch.float32)
    narrow = x.detach().bfloat16().requires_grad_()
    assert rms_norm(narrow).dtype == torch.bfloat16
    upstream = torch.randn_like(x)
    (want,) = torch.autograd.grad(rms_norm(x), x, upstream)
    (grad,) = torch.autograd.grad(rms_norm(narrow), narrow, upstream.bfloat16())
    assert grad.dtype == torch.bfloat16
    # Each of a handful of roundings is at most 2^-8 of a value.
    assert (grad - want).norm() < 5 * 2**-8 * want.norm()


def test_small_states_of_float16_do_not_overflow() -> None:
    x = (states(4, 64, dtype=torch.float32).detach() * 4e-3).half().requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm(x), x, torch.randn_like(x))
    assert grad.isfinite().all()


def test_strided_and_expanded_operands() -> None:
    x = states(8, 6).t()
    wanted = torch.autograd.grad(F.rms_norm(x, x.shape[-1:], eps=EPS).sum(), x)
    # The gradient of a sum is expanded from one number.
    torch.testing.assert_close(torch.autograd.grad(rms_norm(x).sum(), x), wanted)


def test_transforms() -> None:
    x = states(4, 6)
    plain = partial(F.rms_norm, normalized_shape=(6,), eps=EPS)
    for change in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(change(rms_norm)(x), change(plain)(x))
    grads = torch.eye(24, dtype=x.dtype).view(24, 4, 6)
    (batched,) = torch.autograd.grad(rms_norm(x), x, grads, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.func.jacrev(plain)(x).flatten(0, 1))
