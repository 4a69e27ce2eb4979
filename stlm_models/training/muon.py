"""Muon with a choice of the dtype it multiplies in, over matrices of one shape at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
STACK_ELEMENTS = 2**22
"""The most elements that are orthogonalised together, which bounds the memory of a step."""


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal by Newton-Schulz iterations.

    The step is that of `torch.optim.Muon` (Nesterov momentum, learning rates scaled by
    sqrt(max(1, rows / columns))), and so is its state. That one always multiplies in bfloat16,
    which CPUs without instructions for it emulate slowly, and it takes
    one matrix at a time; this one multiplies in a dtype of choice and stacks equal shapes.

    Args:
        parameters: matrices, 2-D, or groups of them; a group may be empty.
        lr: learning rate.
        weight_decay: decoupled, times lr.
        dtype: in which the iterations multiply.

    Raises:
        ValueError: for a parameter that is no matrix, and a negative lr or weight_decay.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        parameters: ParamsT,
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:  # NaN neither
                raise ValueError(f"{name}: expected at least 0, got {value}")
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    got = tuple(parameter.shape)
                    raise ValueError(f"Muon: expected matrices, got a parameter of shape {got}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the parameters that have gradients; the closure's result, where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _stacks([p for p in group["params"] if p.grad is not None]):
                self._move(parameters, group["lr"], group["weight_decay"])
        return loss

    def _move(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Step matrices of one shape, which are orthogonalised as one stack."""
        momenta = [self._advanced_momentum(parameter) for parameter in parameters]
        if len(parameters) == 1:
            updates: Iterable[Tensor] = [orthogonalized(momenta[0], self.dtype)]
        else:
            updates = orthogonalized(torch.stack(momenta), self.dtype)
        n_rows, n_columns = parameters[0].shape
        step_size = lr * math.sqrt(max(1, n_rows / max(1, n_columns)))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-step_size)

    def _advanced_momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's momentum after this step's gradient."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def _stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in lists of one shape, device and dtype; sharded ones by themselves."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if hasattr(parameter, "full_tensor"):  # a DTensor, whose parts lie on several devices
            yield [parameter]
        else:
            alike[parameter.shape, parameter.device, parameter.dtype].append(parameter)
    for group in alike.values():
        size = max(1, STACK_ELEMENTS // max(1, group[0].numel()))
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def orthogonalized(
    matrices: Tensor,  # (..., M, N)
    dtype: torch.dtype,
) -> Tensor:  # (..., M, N) in dtype
    """Matrices with their singular values moved near 1, by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    norms = matrices.square().sum((-2, -1), keepdim=True).sqrt()
    x = (matrices / norms.clamp(min=EPS)).to(dtype)
    x = x.mT if is_tall else x
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm  # rounds once, not three times
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
