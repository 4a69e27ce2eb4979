"""Models of several options on the kernels, interpreted: what the torch path gives."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.kernel_models import MODELS, SIZES
from helpers.models import packed, scrambled
from helpers.options import CHOICES, Choice, caller, config_of
from torch import Tensor

from stlm_kernels import _dispatch
from stlm_models import ModelConfig

pytestmark = pytest.mark.lanes("interpret")

KERNELS = {
    "defaults": {"byte_pool", "find_patches", "unpool", "attention", "segment_pool"},
    "flat": {"attention", "qkv_rope", "ngram_embedding"},
    "attention pooling of a causal encoder": {"attention_pool", "attention", "ema_unpool"},
    "a parallel output behind an encoder inside patches": {"patch_attention", "segment_pool"},
}


@pytest.fixture(name="on_kernels")
def dispatch_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Dispatch "auto" to the kernels from the call on, as on CUDA; gives the ops that took them."""
    used: set[str] = set()

    def use_triton(
        op: str,
        impl: str,
        device: torch.device,
        unsupported: Callable[..., list[str]],
        declined: Callable[..., list[str]] | None = None,
        **arguments: Any,
    ) -> bool:
        if declined is not None and declined(**arguments):
            return False
        takes = not _dispatch.machine_reasons(device.type, None) + unsupported(**arguments)
        used.update({op} if takes else ())
        return takes

    def switch() -> set[str]:
        for name, module in list(sys.modules.items()):
            if name.startswith("stlm_kernels.ops.") and hasattr(module, "use_triton"):
                monkeypatch.setattr(module, "use_triton", use_triton)
        return used

    return switch


def results(config: ModelConfig) -> dict[str, Tensor]:
    """The loss, and the gradient of each parameter."""
    model = scrambled(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.3  # far from saturation, where gradients would be nothing but rounding
    ids, cu_seqlens = packed([b" ab c,  de\n", b"Zo\xc3\xab x"])
    loss_sum, n_valid = caller(model)(ids, ids.long(), cu_seqlens)
    (loss_sum / n_valid).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss_sum.detach(), **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_kernels_give_what_the_torch_path_gives(
    name: str, on_kernels: Callable[[], set[str]]
) -> None:
    assert compared(MODELS[name], on_kernels) >= KERNELS[name] | {"linear_cross_entropy"}


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(c.values()))
def test_every_pair_of_options_on_kernels(
    choice: Choice, on_kernels: Callable[[], set[str]], full: bool
) -> None:
    if not full:
        pytest.skip("minutes: --full")
    config = dataclasses.replace(config_of(choice), **SIZES)
    assert "linear_cross_entropy" in compared(config, on_kernels)


def compared(config: ModelConfig, on_kernels: Callable[[], set[str]]) -> set[str]:
    """The ops that took kernels in a model which gave with them what it gave without."""
    expected = results(config)
    used = on_kernels()
    got = results(config)
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        # Both round in float32; a wrong kernel is off by as much as the tensor is large.
        off = (got[key] - want).norm() / want.norm().clamp(min=1e-6)
        assert off < 1e-4, f"{key}: {off}"
    return used
