"""Muon's step is that of torch's, in a dtype of choice, and whatever is stacked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stlm_models.training import muon, stacks
from stlm_models.training.muon import Muon, orthogonalized

SHAPES = [(24, 8), (8, 24), (8, 24), (16, 16), (8, 24)]
MODERATE = 5
"""Condition number of the test's gradients: Muon amplifies rounding in directions that vanish."""


def gradient(shape: tuple[int, int], seed: int) -> Tensor:
    """A matrix whose singular values lie between 1 and MODERATE."""
    generator = torch.Generator().manual_seed(seed)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.linspace(1, MODERATE, len(s))) @ v


def steps(optimizer: torch.optim.Optimizer, parameters: list[Tensor], count: int = 3) -> None:
    for step in range(count):
        for i, parameter in enumerate(parameters):
            parameter.grad = gradient(tuple(parameter.shape), 10 * step + i)
        optimizer.step()


def fresh() -> list[Tensor]:
    return [
        torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
        for i, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_is_that_of_torch(dtype: torch.dtype) -> None:
    ours, baseline, before = fresh(), fresh(), fresh()
    steps(Muon(ours, lr=0.1, weight_decay=0.2, dtype=dtype), ours)
    steps(torch.optim.Muon(baseline, lr=0.1, weight_decay=0.2), baseline)
    for got, want, start in zip(ours, baseline, before, strict=True):
        # Torch's multiplies in bf16, whatever ours does.
        off, moved = (got - want).norm(), (want - start).norm()
        assert off <= 4 * torch.finfo(torch.bfloat16).eps * moved


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalized(gradient((24, 8), 0), torch.float32))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_stack_is_its_matrices_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding alone tells them apart: products of other shapes may add in another order."""
    stacked, single, before = fresh(), fresh(), fresh()
    steps(Muon(stacked, lr=0.1, weight_decay=0.2, dtype=torch.float32), stacked)
    monkeypatch.setattr(stacks, "CPU_ELEMENTS", 1)
    steps(Muon(single, lr=0.1, weight_decay=0.2, dtype=torch.float32), single)
    for got, want, start in zip(stacked, single, before, strict=True):
        assert (got - want).norm() <= 1e-4 * (want - start).norm()


def test_parameters_that_move_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step, and no more elements at once than the limit or one parameter has."""
    monkeypatch.setattr(stacks, "CPU_ELEMENTS", 1)  # a matrix by itself adds in one order
    whole, parts = fresh(), fresh()
    steps(Muon(whole, lr=0.1, weight_decay=0.2, dtype=torch.float32), whole)
    moved: list[int] = []
    move = Muon._move

    def noted(self: Muon, parameters: list[Tensor], *rates: float) -> None:
        moved.append(sum(x.numel() for x in parameters))
        move(self, parameters, *rates)

    monkeypatch.setattr(muon, "CPU_ELEMENTS", 400)
    monkeypatch.setattr(Muon, "_move", noted)
    steps(Muon(parts, lr=0.1, weight_decay=0.2, dtype=torch.float32), parts, count=3)
    assert moved == [384, 192, 256, 192] * 3
    for got, want in zip(parts, whole, strict=True):
        assert torch.equal(got, want)


def test_equal_shapes_share_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    def spy(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(matrices.shape)
        return orthogonalized(matrices, dtype)

    monkeypatch.setattr(muon, "orthogonalized", spy)
    parameters = fresh()
    steps(Muon(parameters, lr=0.1, weight_decay=0.0), parameters, count=1)
    assert sorted(seen) == [(4, 8, 24), (16, 16)]


def test_zero_and_missing_gradients() -> None:
    parameters = fresh()[:2]
    before = [p.detach().clone() for p in parameters]
    parameters[0].grad = torch.zeros_like(parameters[0])
    Muon(parameters, lr=0.1, weight_decay=0.0, dtype=torch.float32).step()
    for parameter, start in zip(parameters, before, strict=True):
        assert torch.equal(parameter, start)


def test_state_of_torchs_muon_goes_on() -> None:
    """Checkpoints of runs that began with torch's optimiser hold the same momenta."""
    ours, baseline = fresh(), fresh()
    first = torch.optim.Muon(baseline, lr=0.1, weight_decay=0.2)
    steps(first, baseline, count=1)
    second = Muon(ours, lr=0.1, weight_decay=0.2, dtype=torch.float32)
    steps(second, ours, count=1)
    for a, b in zip(baseline, ours, strict=True):
        assert first.state[a].keys() == second.state[b].keys()
        torch.testing.assert_close(
            first.state[a]["momentum_buffer"], second.state[b]["momentum_buffer"]
        )


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"Muon: expected matrices, got a parameter of shape \(3,"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_negative_rates(name: str, value: float) -> None:
    rates = {"lr": 0.1, "weight_decay": 0.0, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected at least 0, got {value}"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3))], **rates)


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros(shape)
    Muon([parameter], lr=0.1, weight_decay=0.1).step()
    assert parameter.shape == shape
