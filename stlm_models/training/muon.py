"""Muon with a choice of the dtype it multiplies in, over matrices of one shape at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from stlm_kernels import runtime

from .stacks import ITERATIONS, map_stacked

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
CPU_ELEMENTS = 2**22
"""The most elements that move together on a CPU: 16 MB in fp32."""


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
        row_splits: of parameters that hold several matrices, one below the other, the rows of each:
            they move as these matrices would by themselves. Their state stays one tensor.

    Raises:
        ValueError: for a parameter that is no matrix, or not of so many rows, and a negative lr or
            weight_decay.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        parameters: ParamsT,
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype = torch.bfloat16,
        row_splits: Mapping[Tensor, Sequence[int]] | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:  # NaN neither
                raise ValueError(f"{name}: expected at least 0, got {value}")
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.dtype, self.row_splits = dtype, dict(row_splits or {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    got = tuple(parameter.shape)
                    raise ValueError(f"Muon: expected matrices, got a parameter of shape {got}")
                rows = self._heights(parameter)
                if sum(rows) != parameter.shape[0]:
                    raise ValueError(
                        "row_splits: expected all rows of the parameter, got"
                        f" {rows} of {parameter.shape[0]}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the parameters that have gradients; the closure's result, where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for parameters in _of_one_kind(moving):
                for some in _runs(parameters):
                    self._move(some, group["lr"], group["weight_decay"])
        return loss

    def _move(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Step parameters of one device and dtype: whatever runs over all of them is one call."""
        momenta = self._advanced_momenta(parameters)
        heights = [self._heights(p) for p in parameters]
        updates = self._orthogonalized(_split(momenta, heights))
        scaled = [-lr * math.sqrt(max(1, x.shape[0] / max(1, x.shape[1]))) for x in updates]
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_mul_(updates, scaled)
        if _is_sharded(parameters[0]):
            torch._foreach_add_(parameters, _joined(updates, heights, parameters))
        else:
            torch._foreach_add_(_split(parameters, heights), updates)

    def _heights(self, parameter: Tensor) -> list[int]:
        return list(self.row_splits.get(parameter, parameter.shape[:1]))

    def _orthogonalized(self, matrices: list[Tensor]) -> list[Tensor]:
        if _is_sharded(matrices[0]):
            return [orthogonalized(matrix, self.dtype).to(matrix.dtype) for matrix in matrices]
        on_gpu = runtime.on_gpu(matrices[0].device)
        return map_stacked(matrices, lambda stack: orthogonalized(stack, self.dtype), on_gpu=on_gpu)

    def _advanced_momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        """Nesterov's momentum of each after this step's gradient."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        return list(torch._foreach_lerp(gradients, momenta, MOMENTUM))


def _of_one_kind(parameters: list[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters in lists of one device and dtype; sharded ones by themselves."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        # A DTensor's parts lie on several devices.
        alone = id(parameter) if _is_sharded(parameter) else None
        alike[parameter.device, parameter.dtype, alone].append(parameter)
    return alike.values()


def _split(wholes: list[Tensor], heights: list[list[int]]) -> list[Tensor]:
    """Return views of the matrices of each, in order."""
    return [
        part
        for whole, rows in zip(wholes, heights, strict=True)
        for part in (whole.split(rows) if len(rows) > 1 else [whole])
    ]


def _joined(
    matrices: list[Tensor], heights: list[list[int]], parameters: list[Tensor]
) -> list[Tensor]:
    """Return the matrices of each sharded parameter below one another, laid out as it is."""
    left = iter(matrices)
    found = []
    for rows, parameter in zip(heights, parameters, strict=True):
        parts = [next(left) for _ in rows]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if len(parts) > 1:
            whole = cast(Any, whole).redistribute(placements=cast(Any, parameter).placements)
        found.append(whole)
    return found


def _runs(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """All parameters on a GPU, where a call more costs time; on a CPU some at a time, whose momenta
    and updates take little memory."""
    if runtime.on_gpu(parameters[0].device):
        yield parameters
        return
    run: list[Tensor] = []
    for parameter in parameters:
        if run and sum(x.numel() for x in [*run, parameter]) > CPU_ELEMENTS:
            yield run
            run = []
        run.append(parameter)
    yield run


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


def orthogonalized(
    matrices: Tensor,  # (..., M, N)
    dtype: torch.dtype,
) -> Tensor:  # (..., M, N) in dtype
    """Matrices with their singular values moved near 1, by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / norms.clamp(min=EPS)).to(dtype)
    x = x.mT if is_tall else x
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm  # rounds once, not three times
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
