"""Inputs for the tests of byte_pool, and a reference that shares nothing with the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.lanes import FP64, Way
from stlm_kernels import byte_pool
from stlm_kernels.ops.byte_pool.reference import yardstick
from stlm_kernels.spec import Inputs
from stlm_kernels.spec_inputs import random_ids
from stlm_kernels.testing import assert_matches, poisoned_memory

RESULT_LANES = pytest.mark.lanes("cpu", "interpret", "gpu")
ON_GPU = pytest.mark.lanes("gpu")
ON_CPU = pytest.mark.lanes("cpu")


def as_array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def looped(inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
    """Result and gradients by the definition, one byte after the other; bad ids give no gradient.

    A gain is rounded to the table's dtype, as the contract says.
    """
    weight, up = as_array(inputs["weight"]), as_array(upstream)
    gain = inputs.get("position_weight")
    gains = np.ones((1, weight.shape[1]))
    if gain is not None:
        gains = as_array(gain.to(inputs["weight"].dtype))
    ids, boundaries = inputs["byte_ids"].tolist(), inputs["cu_patchlens"].tolist()
    out = np.zeros((len(boundaries) - 1, weight.shape[1]))
    dweight, dgain = np.zeros_like(weight), np.zeros_like(gains)
    for p in range(len(boundaries) - 1):
        length = boundaries[p + 1] - boundaries[p]
        scale = 1.0 / max(length, 1) if inputs["mode"] == "mean" else 1.0
        for k in range(length):
            byte, slot = ids[boundaries[p] + k], min(k, len(gains) - 1)
            if not 0 <= byte < len(weight):
                out[p] = np.nan
                continue
            out[p] += scale * gains[slot] * weight[byte]
            dweight[byte] += scale * gains[slot] * up[p]
            dgain[slot] += scale * weight[byte] * up[p]
    found = {"out": out, "weight": dweight, "position_weight": dgain}
    return {name: torch.from_numpy(x) for name, x in found.items()}


def as_leaves(inputs: Inputs) -> Inputs:
    """Copy the arguments, those with a gradient as fresh leaves."""
    leaves = dict(inputs)
    for name in ("weight", "position_weight"):
        if leaves.get(name) is not None:
            leaves[name] = leaves[name].detach().clone().requires_grad_()
    return leaves


def with_gradients(
    op: Callable[..., Tensor], inputs: Inputs, upstream: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The result and the gradients by name."""
    leaves = as_leaves(inputs)
    out = op(**leaves, **options)
    names = [name for name in ("weight", "position_weight") if leaves.get(name) is not None]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], upstream.to(out))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in want.items():
        assert torch.equal(got[name].cpu(), x.cpu()), name


def upstream_for(inputs: Inputs, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
    weight = inputs["weight"]
    rng = torch.Generator().manual_seed(seed)
    shape = (inputs["cu_patchlens"].shape[0] - 1, weight.shape[1])
    return torch.randn(shape, generator=rng).to(weight.device, dtype or weight.dtype)


def assert_right(inputs: Inputs, impl: str, upstream: Tensor | None = None) -> None:
    """Result and gradients against the loop, by the tolerance rule."""
    upstream = upstream_for(inputs) if upstream is None else upstream
    with poisoned_memory():
        got = with_gradients(byte_pool, inputs, upstream, impl=impl)
    yard = with_gradients(yardstick, inputs, upstream)
    want = looped(inputs, upstream)
    for name, x in got.items():
        assert x.dtype == (inputs["weight"] if name == "out" else inputs[name]).dtype
        if x.dtype == FP64:
            # The loop rounds like the result, so the rule would compare two rounding errors.
            torch.testing.assert_close(x.cpu(), want[name], rtol=1e-12, atol=1e-12)
            continue
        assert_matches(x, want[name], yard[name], name=name, rows=name == "weight")


def pool_inputs(
    lengths: list[int],
    way: Way,
    *,
    tail: int = 0,
    vocab: int = 256,
    width: int = 24,
    mode: str = "mean",
    slots: int | None = None,
    ids: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Inputs:
    """Arguments with these patch lengths, and `tail` bytes that belong to no patch."""
    rng = torch.Generator().manual_seed(seed)
    used = min(vocab, 256) if ids == torch.uint8 else vocab
    boundaries = np.cumsum([0, *lengths])
    inputs: Inputs = {
        "byte_ids": random_ids(int(boundaries[-1]) + tail, used, ids, rng).to(way.device),
        "weight": torch.randn(vocab, width, generator=rng).to(way.device, way.dtype),
        "cu_patchlens": torch.from_numpy(boundaries).int().to(way.device),
        "mode": mode,
    }
    if slots is not None:
        gain = 1 + torch.randn(slots, width, generator=rng) / 2
        inputs["position_weight"] = gain.to(way.device, way.dtype)
    return inputs


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def interpreted(way: Way) -> bool:
    return way.impl == "triton" and way.device == "cpu"


def unseen(way: Way) -> Callable[..., Tensor]:
    """byte_pool where it cannot look at values: on a GPU anyway, on a CPU when compiled."""
    if way.device == "cuda":
        return byte_pool
    torch._dynamo.reset()
    return torch.compile(byte_pool, backend="aot_eager", fullgraph=True)
