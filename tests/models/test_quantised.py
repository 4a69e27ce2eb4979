"""Quantised linear maps have no weight to read a dtype or device off: forward and generate."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cached import seen_ids, varied, write_greedily
from helpers.models import TINY, ids_of
from torch import Tensor, nn

from stlm_models import Attention, bits_per_byte
from stlm_models.generation.engine import CachedRun
from stlm_models.layers.router import Router

FLAT = {"patch_rule": "none", "core_layers": 0}
CONFIGS = {
    "plain": TINY,
    "no norm of queries and keys": dataclasses.replace(TINY, qk_norm=False),
    "causal encoder, shared": dataclasses.replace(
        TINY, encoder_layers=1, encoder_ff=24, share_ff=True, pooling="max"
    ),
    "patch encoder": dataclasses.replace(
        TINY, encoder="patch", encoder_layers=1, encoder_kv_heads=1, encoder_ff=24
    ),
    "attention pooling, ema": dataclasses.replace(
        TINY, pooling="attention", pooling_heads=2, unpooling="ema", byte_ngrams=True
    ),
    "parallel": dataclasses.replace(TINY, output="parallel", tied=False, decoder_window=None),
    "flat": dataclasses.replace(TINY, **FLAT),
}
PROMPTS = [b"ab c", b"", b"a longer prompt, with patches"]


class Int8Weight(nn.Module):
    """Case f05: weights in int8, as weight-only quantisers keep them; no `in_features`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 127 + 1e-9
        self.register_buffer("weight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scales.to(x.dtype))


class Hidden(Int8Weight):
    """Packed weights, as torch.ao has them: neither parameters nor buffers tell their dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.packed = [self.weight, self.scales]
        del self.weight, self.scales

    def forward(self, x: Tensor) -> Tensor:
        weight, scales = self.packed
        return F.linear(x, weight.to(x.dtype) * scales.to(x.dtype))


def with_linear(module: Any, kind: type[Int8Weight]) -> Any:
    """The module with its linear maps replaced, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            with_linear(child, kind)
    return module


@pytest.mark.parametrize("kind", [Int8Weight, Hidden])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_in_int8(name: str, kind: type[Int8Weight]) -> None:
    model = with_linear(varied(CONFIGS[name]), kind)
    with torch.no_grad():
        expected = write_greedily(model, seen_ids(PROMPTS), 12)
    assert model.generate_batch(PROMPTS, max_new_bytes=12, temperature=0) == expected
    assert 0 < bits_per_byte(model, b"some bytes") < 100


@pytest.mark.parametrize("name", CONFIGS)
def test_dynamic_int8(name: str) -> None:
    """Activations are quantised too, by the range of a whole call: no two calls agree."""
    if torch.backends.quantized.engine in ("none", ""):
        pytest.skip("this torch has no engine for quantised linear maps")
    model = varied(CONFIGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao tells of torchao
        quantised = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )
    assert not isinstance(quantised.to_output, nn.Linear)
    ids = ids_of(b"some bytes")[None]
    expected = model(ids)
    assert (quantised(ids) - expected).norm() < 0.5 * expected.norm()
    written = quantised.generate_batch(PROMPTS, max_new_bytes=12, temperature=0)
    assert [len(text) for text in written] == [12, 12, 12]
    run, same = (CachedRun(m, seen_ids(PROMPTS)) for m in (quantised, model))
    assert (run.hidden - same.hidden).norm() < 0.5 * same.hidden.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_have_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    layer = with_linear(Attention(16, 2), Int8Weight).to(dtype)  # int8 stays
    cache = layer.new_cache(2)
    layer(torch.randn(5, 16, dtype=dtype), cu_seqlens=torch.tensor([0, 2, 5]).int(), cache=cache)
    assert cache.k.dtype == cache.v.dtype == dtype
    stepped = layer.new_cache(2)
    layer(torch.randn(2, 1, 16, dtype=dtype), cache=stepped)
    assert stepped.k.dtype == stepped.v.dtype == dtype


def test_under_autocast_keys_and_values_have_its_dtype() -> None:
    layer = Attention(16, 2)
    cache = layer.new_cache(1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer(torch.randn(5, 16), cache=cache)
    assert cache.k.dtype == torch.bfloat16


def test_a_router() -> None:
    x = torch.randn(7, 16)
    router = Router(16)
    expected = router(x).probs
    got = with_linear(router, Int8Weight)(x).probs
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05)
