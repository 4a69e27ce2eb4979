"""Optimisers and the parameters that they move: each once, by its identity."""

from __future__ import annotations

import pytest
import torch
from helpers.models import TINY
from torch import Tensor, nn

from stlm_models import STLM, TiedEmbedding
from stlm_models.training.optim import Optimizers

WIDTH = 16


def parts_of(model: nn.Module) -> dict[str, set[str]]:
    """The names of what each optimiser moves; nothing may be there twice."""
    optimizers = Optimizers(model, muon_lr=0.02, adamw_lr=0.004)
    parts = {}
    for part, optimizer in optimizers.parts.items():
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        names = [optimizers.names[parameter] for parameter in moved]
        assert len(set(names)) == len(names)
        parts[part] = set(names)
    assert not parts["muon"] & parts["adamw"]
    return parts


class Square(nn.Linear):
    """A layer that torch does not have."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=True)
        self.gain = nn.Parameter(torch.ones(WIDTH, WIDTH))


def plain() -> nn.ModuleDict:
    table = TiedEmbedding(20, WIDTH, pad_to=1)
    return nn.ModuleDict({"table": table, "a": nn.Linear(WIDTH, WIDTH), "b": Square()})


def test_matrices_and_the_rest() -> None:
    parts = parts_of(plain())
    assert parts["muon"] == {"a.weight", "b.weight"}
    assert parts["adamw"] == {"table.weight", "a.bias", "b.bias", "b.gain"}


def test_a_model_of_ours_is_split_as_ever() -> None:
    model = STLM(TINY)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parts = parts_of(model)
    assert parts["muon"] == {f"{name}.weight" for name in linear}
    assert parts["muon"] | parts["adamw"] == {name for name, _ in model.named_parameters()}


def test_a_weight_that_linear_layers_share_moves_once() -> None:
    model, alone = plain(), plain()
    model["b"].weight = model["a"].weight
    assert parts_of(model)["muon"] == {"a.weight"}
    model["c"] = model["a"]  # the layer itself, under two names
    assert parts_of(model)["muon"] == {"a.weight"}
    alone.load_state_dict(model.state_dict(), strict=False)
    for each in (model, alone):
        each["a"].weight.grad = torch.eye(WIDTH)
        Optimizers(each, muon_lr=0.02, adamw_lr=0.004, muon_dtype=torch.float32).step(1.0)
    assert torch.equal(model["a"].weight, alone["a"].weight)
    assert not torch.equal(model["a"].weight, plain()["a"].weight)


@pytest.mark.parametrize("linear_first", [False, True])
def test_a_table_that_a_linear_layer_shares_is_adamws(linear_first: bool) -> None:
    model = plain()
    head = nn.Linear(WIDTH, 20, bias=False)
    head.weight = model["table"].weight
    if linear_first:
        parts = parts_of(nn.ModuleDict({"head": head, **model}))
        assert parts["muon"] == {"a.weight", "b.weight"}
        assert "head.weight" in parts["adamw"]
    else:
        model["head"] = head
        assert "table.weight" in parts_of(model)["adamw"]


def test_a_weight_with_another_name_beside_is_adamws() -> None:
    """Lists and modules of other kinds may do anything with it."""
    model = plain()
    model["list"] = nn.ParameterList([model["a"].weight])
    assert parts_of(model)["muon"] == {"b.weight"}
    normed = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))})
    assert parts_of(normed)["muon"] == set()


def test_frozen_parameters_stay() -> None:
    model = plain()
    model["a"].requires_grad_(False)
    model["table"].requires_grad_(False)
    parts = parts_of(model)
    assert parts == {"muon": {"b.weight"}, "adamw": {"b.bias", "b.gain"}}
    optimizers = Optimizers(model, muon_lr=0.02, adamw_lr=0.004)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1.0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"b.weight", "b.bias", "b.gain"}


def test_one_optimiser_may_have_nothing_to_do() -> None:
    bare = nn.Linear(WIDTH, WIDTH, bias=False)
    for model in (bare, TiedEmbedding(20, WIDTH)):
        (parameter,) = model.parameters()
        before: Tensor = parameter.detach().clone()
        optimizers = Optimizers(model, muon_lr=0.02, adamw_lr=0.004)
        parameter.grad = torch.randn_like(parameter)
        optimizers.step(1.0)
        assert not torch.equal(parameter, before)
        optimizers.load_state_tensors(optimizers.state_tensors())
    with pytest.raises(ValueError, match="model: expected a parameter that requires a gradient"):
        Optimizers(bare.requires_grad_(False), muon_lr=0.02, adamw_lr=0.004)


def test_quantised_layers_have_no_matrix() -> None:
    model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)
    parts = parts_of(model)
    assert "table.weight" in parts["adamw"]
    assert "a.weight" not in parts["muon"]
