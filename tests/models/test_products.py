"""Linear maps of a layer by few products: the same results and gradients as one by one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import runtime
from stlm_models import STLM
from stlm_models.generation.engine import CachedRun
from stlm_models.layers.linear import FEW_ROWS, Products, keeping
from stlm_models.presets import preset

SIZES = ((6, 2, 2), (8,))


def layer() -> list[list[nn.Linear]]:
    torch.manual_seed(0)
    return [[nn.Linear(8, size, bias=False) for size in sizes] for sizes in SIZES]


def states(rows: int = 2 * FEW_ROWS) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def results(maps: list[list[nn.Linear]], x: Tensor, *, one_by_one: bool) -> list[Tensor]:
    if one_by_one:
        first = [each(x) for each in maps[0]]
        return [*first, maps[1][0](x.tanh())]
    products = Products(x, *maps)
    return [*products(0, x), *products(1, x.tanh())]


def gradients(maps: list[list[nn.Linear]], x: Tensor, outs: list[Tensor]) -> list[Tensor]:
    leaves = [x, *(each.weight for group in maps for each in group)]
    return list(torch.autograd.grad([out.float().square().sum() for out in outs], leaves))


@pytest.fixture(params=["cpu", "gpu"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of a GPU is that of any device that says it is one."""
    monkeypatch.setattr(runtime, "on_gpu", lambda device: request.param == "gpu")
    return str(request.param)


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
def test_results_and_gradients_are_those_of_the_maps(place: str, cast: bool) -> None:
    maps, x = layer(), states()
    with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
        got, want = (results(maps, x, one_by_one=way) for way in (False, True))
    # A product beside others may add in another order.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if cast else {"rtol": 1e-5, "atol": 1e-5}
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(gradients(maps, x, got), gradients(maps, x, want), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= (1e-2 if cast else 1e-5) * b.norm()


def calls_of_linear(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    seen: list[torch.Size] = []
    plain = F.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(weight.shape)
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    return seen


TOGETHER = [(10, 8), (8, 8)]
APART = [(6, 8), (2, 8), (2, 8), (8, 8)]


def test_maps_that_read_the_same_are_one_product(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls_of_linear(monkeypatch)
    results(layer(), states(), one_by_one=False)
    assert seen == TOGETHER
    seen.clear()
    results(layer(), states(1), one_by_one=False)
    assert seen == (TOGETHER if place == "gpu" else APART)


def hooked(maps: list[list[nn.Linear]]) -> None:
    maps[0][1].register_forward_hook(lambda module, args, out: out)


def subclassed(maps: list[list[nn.Linear]]) -> None:
    class Adapted(nn.Linear): ...

    maps[0][1].__class__ = Adapted


def with_bias(maps: list[list[nn.Linear]]) -> None:
    maps[0][1].bias = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("change", [hooked, subclassed, with_bias])
def test_a_map_that_is_not_plain_is_called(
    change: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, seen = layer(), calls_of_linear(monkeypatch)
    change(maps)
    with torch.autocast("cpu", torch.bfloat16):
        results(maps, states(), one_by_one=False)
    assert seen == APART


def test_what_is_frozen_takes_no_gradient(place: str) -> None:
    maps, x = layer(), states()
    maps[0][1].weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        outs = results(maps, x, one_by_one=False)
    sum(out.float().sum() for out in outs[:3]).backward()
    assert maps[0][0].weight.grad is not None
    assert maps[0][1].weight.grad is None
    assert maps[1][0].weight.grad is None, "nothing asked for it"


def test_gradients_have_gradients(place: str) -> None:
    maps, x = layer(), states()

    def penalty(*, one_by_one: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outs = results(maps, x, one_by_one=one_by_one)
        total = sum(out.float().square().sum() for out in outs)
        leaves = [each.weight for group in maps for each in group]
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    for a, b in zip(penalty(one_by_one=False), penalty(one_by_one=True), strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_weights_are_kept_while_told_and_without_gradients() -> None:
    maps, x, weights = layer(), states(1), {}
    with keeping(weights):
        results(maps, x, one_by_one=False)
        assert weights == {}
        with torch.no_grad():
            got = results(maps, x, one_by_one=False)
            (kept,) = weights.values()
            assert kept.shape == (10, 8)
            again = results(maps, x, one_by_one=False)
    assert list(weights.values()) == [kept]
    for a, b in zip(got, again, strict=True):
        assert torch.equal(a, b)


def test_a_restart_takes_weights_anew() -> None:
    model = STLM(preset("demo")).eval()
    nn.init.normal_(model.to_output.weight)
    run = CachedRun(model, [[1, 2, 3]])
    run.step(torch.tensor([4]), [0])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_()
    run.restart([0], [[1, 2, 3, 4]])
    run.step(torch.tensor([5]), [0])
    fresh = CachedRun(model, [[1, 2, 3, 4, 5]])
    torch.testing.assert_close(run.hidden, fresh.hidden, rtol=1e-3, atol=1e-3)
