"""Weights of several matrices: moved as these by themselves, and loaded from them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.models import TINY, ids_of, scrambled
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stlm_models import STLM
from stlm_models.checkpoint import load_tensors
from stlm_models.layers.joined import Joined, join_parts, row_splits
from stlm_models.layers.linear import keeping
from stlm_models.layers.norms import rms_norm
from stlm_models.layers.transformer import SwiGLU
from stlm_models.training.muon import Muon
from stlm_models.training.optim import Optimizers

HEIGHTS = {"wide": 8, "tall": 24}


class Pair(Joined):
    """Two matrices of 8 columns in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = {"both": HEIGHTS}
        self.both = nn.Linear(8, 32, bias=False)


class Apart(nn.Module):
    """Matrices as before, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = (nn.Linear(8, rows, bias=False) for rows in HEIGHTS.values())


def models() -> tuple[Any, Any]:
    """A model of each kind with equal values."""
    torch.manual_seed(0)
    apart = nn.ModuleDict({"a": Apart(), "last": nn.Linear(8, 8, bias=False)})
    joined = nn.ModuleDict({"a": Pair(), "last": nn.Linear(8, 8, bias=False)})
    joined.load_state_dict(apart.state_dict())
    return joined, apart


def whole(model: Any) -> Tensor:
    if "both" in model["a"]._modules:
        return model["a"].both.weight
    return torch.cat([model["a"].wide.weight, model["a"].tall.weight])


def step(model: Any, optimizers: Optimizers, seed: int) -> None:
    grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    if "both" in model["a"]._modules:
        model["a"].both.weight.grad = grad
    else:
        model["a"].wide.weight.grad, model["a"].tall.weight.grad = grad.split([8, 24])
    optimizers.step(1.0)


def test_it_loads_as_one_and_by_its_parts() -> None:
    joined, apart = models()
    assert torch.equal(whole(joined), whole(apart))
    again = copy.deepcopy(models()[0])
    load_tensors(again, apart.state_dict())
    assert torch.equal(whole(again), whole(apart))
    load_tensors(again, joined.state_dict())
    named = join_parts(joined, apart.state_dict())
    assert list(named) == ["last.weight", "a.both.weight"]
    own = joined["a"]
    own.load_state_dict(apart["a"].state_dict())
    missing, unexpected = own.load_state_dict({"wide.weight": torch.zeros(8, 8)}, strict=False)
    assert (missing, unexpected) == (["both.weight"], ["wide.weight"])


def test_each_matrix_moves_as_by_itself() -> None:
    """Muon makes each nearly orthogonal, not both together; the rates are those of their shapes."""
    joined, apart = models()
    start = whole(apart).clone()
    ours, theirs = (
        Optimizers(model, muon_lr=0.1, adamw_lr=0.1, muon_dtype=torch.float32)
        for model in (joined, apart)
    )
    for seed in range(3):
        step(joined, ours, seed)
        step(apart, theirs, seed)
    off, moved = (whole(joined) - whole(apart)).norm(), (whole(apart) - start).norm()
    assert off <= 1e-5 * moved
    plain = copy.deepcopy(joined)
    plain["a"].both.weight.data.copy_(start)
    together = Muon(plain.parameters(), lr=0.1, weight_decay=0.1, dtype=torch.float32)
    plain["a"].both.weight.grad = torch.randn(32, 8)
    together.step()
    assert (whole(plain) - whole(apart)).norm() > 0.1 * moved


def test_state_of_matrices_apart_goes_on() -> None:
    joined, apart = models()
    theirs = Optimizers(apart, muon_lr=0.1, adamw_lr=0.1, muon_dtype=torch.float32)
    step(apart, theirs, 0)
    ours = Optimizers(joined, muon_lr=0.1, adamw_lr=0.1, muon_dtype=torch.float32)
    ours.load_state_tensors(theirs.state_tensors())
    load_tensors(joined, apart.state_dict())
    assert ours.state_tensors().keys() == {"muon.a.both.weight.momentum_buffer"}
    step(joined, ours, 1)
    step(apart, theirs, 1)
    torch.testing.assert_close(whole(joined), whole(apart))
    with pytest.raises(ValueError, match=r"muon\.a\.wide.* belongs to no"):
        ours.load_state_tensors({"muon.a.wide.weight.momentum_buffer": torch.zeros(8, 8)})


def test_rows_that_do_not_add_up_and_weights_of_another_kind() -> None:
    joined, _ = models()
    parameter = joined["a"].both.weight
    with pytest.raises(ValueError, match=r"row_splits: expected all rows .*, got \[8, 8\] of 32"):
        Muon([parameter], lr=0.1, weight_decay=0.0, row_splits={parameter: (8, 8)})
    assert row_splits(joined) == {parameter: (8, 24)}
    joined["a"].both = nn.Identity()  # as quantisers leave maps without a parameter
    assert row_splits(joined) == {}


def test_sharded_matrices_move_alike(tmp_path: object) -> None:
    store = dist.FileStore(f"{tmp_path}/store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(3))
        plain = nn.Parameter(torch.ones(32, 8))
        sharded: Any = nn.Parameter(distribute_tensor(torch.ones(32, 8), mesh, [Shard(0)]))
        plain.grad, sharded.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
        for parameter in (plain, sharded):
            optimizer = Muon(
                [parameter], lr=0.1, weight_decay=0.1, dtype=torch.float32,
                row_splits={parameter: (8, 24)},
            )  # fmt: skip
            optimizer.step()
        assert sharded.placements == (Shard(0),)
        torch.testing.assert_close(sharded.full_tensor(), plain.detach())
    finally:
        dist.destroy_process_group()


def test_a_model_that_was_saved_with_gate_and_up_apart() -> None:
    model = scrambled()
    apart: dict[str, Tensor] = {}
    for name, x in model.state_dict().items():
        if "gate_up" in name:
            apart |= {
                name.replace("gate_up", part): y
                for part, y in zip(("gate", "up"), x.chunk(2), strict=True)
            }
        else:
            apart[name] = x
    assert len(apart) > len(model.state_dict())
    again = STLM(TINY)
    load_tensors(again, apart)
    ids = ids_of(b"some bytes")
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_feed_forward_is_its_maps(cast: bool, watched: bool) -> None:
    """In one op, and map by map where one has a hook; the stream stays in fp32."""
    torch.manual_seed(0)
    layer = SwiGLU(16, 24)
    x = torch.randn(2, 5, 16)
    calls: list[int] = []
    with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
        gate, up = layer.gate_up(rms_norm(x)).chunk(2, -1)
        want = x + layer.down(F.silu(gate) * up)
        if watched:
            layer.down.register_forward_hook(lambda *_: calls.append(1))
        got = layer(x)
    assert got.dtype == want.dtype == torch.float32
    assert len(calls) == watched
    tolerance = 2e-2 if cast else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_weights_of_a_feed_forward_are_cast_once() -> None:
    """While they are kept, for calls without gradients."""
    layer, x = SwiGLU(16, 24), torch.randn(5, 16)
    kept: dict[Any, Tensor] = {}
    with torch.autocast("cpu", torch.bfloat16), keeping(kept):
        layer(x)
        assert kept == {}
        with torch.no_grad():
            first = layer(x)
            assert sorted(each.shape for each in kept.values()) == [(16, 24), (48, 16)]
            held = list(kept.values())
            assert torch.equal(layer(x), first)
    assert all(a is b for a, b in zip(kept.values(), held, strict=True))
