"""Two processes on the CPU: rows of a loss divided, and the tied table under FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.norms import assert_same_gradients
from helpers.ranks import run_ranks
from torch import Tensor, nn

from stlm_kernels import linear_cross_entropy
from stlm_models import TiedEmbedding

WORLD, ROWS, WIDTH, VOCAB = 2, 12, 8, 40


class Tiny(nn.Module):
    """Table, one layer, the same table again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = TiedEmbedding(VOCAB, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        loss, _ = self.table.loss(self.block(self.table.embed(ids)), targets)
        return loss


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(0, VOCAB, (ROWS,), generator=rng) for _ in range(2))
    targets[:4] = -100  # the ranks count different numbers of rows
    hidden = torch.randn(ROWS, WIDTH, generator=rng)
    weight = torch.randn(VOCAB, WIDTH, generator=rng)
    return ids, targets, hidden, weight


def rank(index: int) -> None:
    own_rows = slice(index * ROWS // WORLD, (index + 1) * ROWS // WORLD)
    divided_rows_give_the_whole_gradient(own_rows)
    the_root_group_holds_the_table(own_rows)
    a_sharded_table_is_refused()


def divided_rows_give_the_whole_gradient(own_rows: slice) -> None:
    _, targets, hidden, weight = data()
    whole_h, whole_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    whole = linear_cross_entropy(whole_h, whole_w, targets)
    whole.backward()

    part_h, part_w = hidden[own_rows].clone().requires_grad_(), weight.clone().requires_grad_()
    count = (targets[own_rows] != -100).sum()
    dist.all_reduce(count)
    loss = linear_cross_entropy(part_h, part_w, targets[own_rows], reduction="sum") / count
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    dist.all_reduce(part_w.grad)
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(part_w.grad, whole_w.grad)
    torch.testing.assert_close(part_h.grad, whole_h.grad[own_rows])


def the_root_group_holds_the_table(own_rows: slice) -> None:
    from torch.distributed.fsdp import fully_shard

    ids, targets, _, _ = data()
    alone, sharded = Tiny(), Tiny()
    alone(ids, targets).backward()
    fully_shard(sharded.block)
    fully_shard(sharded)
    sharded(ids[own_rows], targets[own_rows]).backward()
    # FSDP averages over the ranks; the losses are sums.
    got = {n: p.grad.full_tensor() * WORLD for n, p in sharded.named_parameters()}
    assert_same_gradients(got, {name: p.grad for name, p in alone.named_parameters()})


def a_sharded_table_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    ids, targets, hidden, _ = data()
    table = fully_shard(TiedEmbedding(VOCAB, WIDTH))
    for call in (
        lambda: table.embed(ids),
        lambda: table.loss(hidden, targets),
        lambda: table.logits(hidden),
        lambda: table.sample(hidden),
    ):
        with pytest.raises(ValueError, match=r"got a DTensor; .* root's group"):
            call()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes(tmp_path: Path) -> None:
    run_ranks(rank, tmp_path, world=WORLD)
