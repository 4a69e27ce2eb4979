"""Baseline ops in plain PyTorch, with the signatures that `stlm_models` calls.

Each is an eager peer from the benchmarks of its op. Its preparation is part of the step: lengths of
documents are asked for once, rotary tables are laid out for the positions in every layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import stlm_kernels
from stlm_kernels import Patches
from stlm_kernels.spec import Inputs, case

from ..peers import PEERS
from ..peers.entry import Entry

Ops = Mapping[str, Callable[..., Any]]


def _peer(op: str, name: str) -> Entry:
    return next(entry for entry in PEERS[op] if entry.name == name)


def _run(op: str, name: str, inputs: Inputs) -> Any:
    entry = _peer(op, name)
    return entry.function(**entry.convert(inputs))


def byte_pool(byte_ids: Tensor, weight: Tensor, cu_patchlens: Tensor, *, mode: str) -> Tensor:
    inputs = {"byte_ids": byte_ids, "weight": weight, "cu_patchlens": cu_patchlens, "mode": mode}
    return _run("byte_pool", "EmbeddingBag", inputs)


def segment_pool(x: Tensor, cu_patchlens: Tensor, *, mode: str) -> Tensor:
    inputs = {"x": x, "cu_patchlens": cu_patchlens, "mode": mode}
    return _run("segment_pool", "index_add", inputs)


def ngram_embedding(byte_ids: Tensor, tables: list[Tensor], **options: Any) -> Tensor:
    named = {f"table{i}": table for i, table in enumerate(tables)}
    inputs = named | {"byte_ids": byte_ids, **options}
    return _run("ngram_embedding", "shifts + F.embedding", inputs)


def find_patches(byte_ids: Tensor, **options: Any) -> Patches:
    inputs = {"byte_ids": byte_ids, **options}
    return Patches(*_run("find_patches", "running sums (H-Net's way)", inputs))


def unpool(patch_states: Tensor, read_ids: Tensor, **options: Any) -> Tensor:
    inputs = {"patch_states": patch_states, "read_ids": read_ids, **options}
    return _run("unpool", "index_select + add", inputs)


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    inputs = {"q": q, "k": k, "cos": cos, "sin": sin, "eps": 1e-6, **options}
    return _run("qk_norm_rope", "F.rms_norm + rotation", inputs)


def swiglu(
    x: Tensor, norm_weight: Tensor | None, gate_up: Tensor, down: Tensor, **options: Any
) -> Tensor:
    inputs = {
        "x": x,
        "norm_weight": norm_weight,
        "gate_up": gate_up,
        "down": down,
        "residual": True,
        "eps": 1e-6,
        **options,
    }
    return _run("swiglu", "F.rms_norm + F.linear + F.silu", inputs)


def qkv_rope(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    residual: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    inputs = {"x": x, "norm_weight": norm_weight, "weight": weight, "cos": cos, "sin": sin}
    found = _run("qkv_rope", "F.rms_norm + F.linear + rotation", inputs | options)
    return (*found, x) if residual else tuple(found)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, cu_seqlens: Tensor | None
) -> Tensor:
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast normalises in fp32
    inputs = {"q": q, "k": k, "v": v, "window": window, "scale": None}
    if cu_seqlens is None:
        return _run("attention", "SDPA" if window is None else "blocks of bmm", inputs)
    inputs["cu_seqlens"] = cu_seqlens
    varlen = _peer("attention", "varlen_attn")
    if v.dtype != torch.float32 and varlen.unsupported(case(T=q.shape[0])) is None:
        return _run("attention", varlen.name, inputs)
    return _run("attention", "SDPA by document" if window is None else "blocks of bmm", inputs)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int,
) -> Tensor:
    logits = (F.linear(input, linear_weight[:valid_vocab]) * logit_scale).float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return F.cross_entropy(
        logits.flatten(0, -2),
        target.flatten().long(),
        reduction=reduction,
        ignore_index=ignore_index,
    )


BASELINE_OPS: Ops = {
    function.__name__: function
    for function in (
        byte_pool,
        segment_pool,
        ngram_embedding,
        find_patches,
        unpool,
        qk_norm_rope,
        qkv_rope,
        swiglu,
        attention,
        linear_cross_entropy,
    )
}
"""The ops that a training step calls."""


def with_impl(impl: str) -> Ops:
    """Return the library's own ops, by one implementation."""
    return {name: partial(getattr(stlm_kernels, name), impl=impl) for name in BASELINE_OPS}


@contextmanager
def ops_replaced(ops: Ops) -> Iterator[None]:
    """Replace the library's ops of these names in every module of `stlm_models`."""
    with ExitStack() as stack:
        for path, module in list(sys.modules.items()):
            if not path.startswith("stlm_models."):
                continue
            for name, function in ops.items():
                if getattr(module, name, None) is getattr(stlm_kernels, name):
                    stack.enter_context(mock.patch.object(module, name, function))
        yield
