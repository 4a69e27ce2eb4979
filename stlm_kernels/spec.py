"""Description of an op for tests, benchmarks, tuning and inspection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One set of shapes and options. Its name is made from its values, so it cannot lie.

    Args:
        sizes: named sizes and options, e.g. {"T": 4096, "D": 128, "mode": "mean"}.
        tags: "smoke" and "edge" are tested everywhere; "cancels", where gradients are exactly
            zero, with many seeds; "bench" is timed on a GPU, "bench_full" in its sweeps,
            "bench_cpu" on a CPU; "aot" is compiled ahead of time, "aot_full" in the lane's long
            form; "gpu" joins "smoke" in what only a GPU shows; "huge" has more than 2^31 elements.
    """

    sizes: Mapping[str, Any]
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        return "-".join(
            str(value) if isinstance(value, str) else f"{key}{value}"
            for key, value in self.sizes.items()
        )

    def __getitem__(self, key: str) -> Any:
        return self.sizes[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.sizes.get(key, default)


def case(*tags: str, **sizes: Any) -> Case:
    return Case(sizes, frozenset(tags))


@dataclass(frozen=True)
class OpSpec:
    """One op for everything that iterates over ops.

    Args:
        name: public name; also the folder under `ops/`.
        op: the public function.
        reference: the fp64 result; takes the op's arguments without `impl`, float tensors in fp64.
        yardstick: plain torch ops, fp32 accumulation, output in the tested dtype; same arguments
            as the op, and the measure of how much error is normal.
        make_inputs: (case, dtype, device, seed) -> keyword arguments of the op.
        cases: shapes to test and time.
        grad_args: differentiable arguments, in signature order.
        row_args: tables whose gradient is also judged row by row.
        fp32_args: float arguments that are never rounded, so stay fp32 beside 16-bit ones.
        exact: the outputs and gradients that must equal the reference bit for bit, by case.
        terms: (upstream gradients by output, fp64 inputs) -> the results and gradients that may
            cancel to nothing, by name, each as the sum of the absolute terms of its elements.
        bytes_moved: (case, dtype, pass) -> bytes that any implementation must move.
        flops: (case, pass) -> FLOPs that the op needs.
        kernels: names of the Triton kernels, without the `stlm_` prefix; empty: torch path only.
        mma_kernels: those that must run on the tensor cores for 16-bit inputs.
        arguments: (inputs) -> keyword arguments of the public op, where it takes sequences of
            tensors: `inputs` holds each tensor under its own name, and `op`, `reference` and
            `yardstick` above take them so.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    yardstick: Callable[..., Any]
    make_inputs: Callable[[Case, torch.dtype, torch.device, int], Inputs]
    cases: tuple[Case, ...]
    bytes_moved: Callable[[Case, torch.dtype, str], int]
    flops: Callable[[Case, str], int]
    grad_args: tuple[str, ...] = ()
    row_args: tuple[str, ...] = ()
    fp32_args: tuple[str, ...] = ()
    exact: Callable[[Case], frozenset[str]] = lambda case: frozenset()
    terms: Callable[..., Mapping[str, Tensor]] = lambda upstream, **inputs: {}
    kernels: tuple[str, ...] = ()
    mma_kernels: tuple[str, ...] = ()
    arguments: Callable[[Inputs], Inputs] = dict

    def tagged(self, *tags: str) -> list[Case]:
        """The cases that carry any of `tags`."""
        return [case for case in self.cases if case.tags & set(tags)]
