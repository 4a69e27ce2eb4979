"""Attention with one weight for queries, keys and values, and with norm and residual within."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.norms import assert_same_rows
from torch import Tensor, nn

from stlm_models import Attention
from stlm_models.checkpoint import load_tensors
from stlm_models.layers.norms import rms_norm
from stlm_models.training.optim import Optimizers

CU_SEQLENS = torch.tensor([0, 30, 30, 77, 90], dtype=torch.int32)
ROWS = 90


def layer(qk_norm: bool = True) -> Attention:
    torch.manual_seed(0)
    made = Attention(32, 4, kv_heads=2, window=9, qk_norm=qk_norm)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def results(
    attention: Attention, x: Tensor, *, apart: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return x plus attention over its norm, and the gradients."""
    x = x.detach().requires_grad_()
    if apart:
        out = x + attention(rms_norm(x), cu_seqlens=cu_seqlens)
    else:
        out = attention(x, residual=True, cu_seqlens=cu_seqlens)
    leaves = {"x": x, **dict(attention.named_parameters())}
    grads = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    return out, dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_residual_is_the_norm_before_and_the_sum_after(
    documents: bool, watched: bool, qk_norm: bool
) -> None:
    """Maps that others watch are called, and see what they would have seen."""
    attention = layer(qk_norm)
    seen: list[torch.Size] = []
    if watched:
        for each in (attention.query_key_value, attention.output):
            each.register_forward_hook(lambda each, args, out: seen.append(out.shape))
    x = torch.randn(ROWS, 32) if documents else torch.randn(2, ROWS, 32)
    cu_seqlens = CU_SEQLENS if documents else None
    out, grads = results(attention, x, apart=False, cu_seqlens=cu_seqlens)
    assert len(seen) == (2 if watched else 0)
    want, want_grads = results(attention, x, apart=True, cu_seqlens=cu_seqlens)
    assert_same_rows(out, want)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        assert (grad - want_grads[name]).norm() <= 1e-4 * want_grads[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_a_residual_keeps_its_precision(dtype: torch.dtype, cast: bool) -> None:
    """The sum is fp32 where the residual is, in autocast too."""
    attention = layer()
    if not cast:
        attention = attention.to(dtype)
    x = torch.randn(2, ROWS, 32).to(dtype)
    for scale in (1, 0):
        with torch.no_grad():
            attention.output.weight *= scale
        with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
            out, want = attention(x, residual=True), x + attention(rms_norm(x))
        assert out.dtype == want.dtype
        assert_same_rows(out.bfloat16(), want.bfloat16())
    assert torch.equal(out, x)  # without an output, whose cast loses more


def test_a_step_beside_a_cache() -> None:
    attention, x = layer(), torch.randn(2, 12, 32)
    cache = attention.new_cache(2)
    steps = [attention(x[:, t : t + 1], cache=cache, residual=True) for t in range(12)]
    assert_same_rows(torch.cat(steps, 1), attention(x, residual=True))


def apart_of(attention: Attention) -> dict[str, Tensor]:
    """The state dict as 0.1.0 saved it."""
    found = attention.state_dict()
    sizes = attention.joined["query_key_value"]
    parts = found.pop("query_key_value.weight").split(list(sizes.values()))
    return found | {f"{name}.weight": part for name, part in zip(sizes, parts, strict=True)}


@pytest.mark.parametrize("loader", ["load_state_dict", "load_tensors"])
def test_weights_that_were_saved_apart_are_loaded(loader: str) -> None:
    saved, loaded = layer(), Attention(32, 4, kv_heads=2, window=9)
    if loader == "load_state_dict":
        loaded.load_state_dict(apart_of(saved))
    else:
        load_tensors(loaded, apart_of(saved))
    x = torch.randn(5, 32)
    assert torch.equal(loaded(x), saved(x))


def test_an_incomplete_set_of_weights_is_refused() -> None:
    some = apart_of(layer())
    del some["key.weight"]
    with pytest.raises(ValueError, match=r"key_value\.weight is missing|query\.weight"):
        load_tensors(layer(), some)


def test_muon_moves_three_matrices() -> None:
    """Each update has singular values near one, which those of all rows together would not."""
    attention = layer()
    before = attention.query_key_value.weight.detach().clone()
    optimizers = Optimizers(attention, muon_lr=1.0, adamw_lr=0.0, muon_dtype=torch.float32)
    for parameter in attention.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step(1.0)
    moved = attention.query_key_value.weight.detach() - before * (1 - 0.1)
    for rows, part in zip((32, 16, 16), moved.split([32, 16, 16]), strict=True):
        values = torch.linalg.svdvals(part)
        assert part.shape == (rows, 32)
        assert 0.2 < float(values.min()) <= float(values.max()) < 1.8, values
