"""Few numbers of rows: products on a CPU keep memory for each that they have seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stlm_models import STLM, ModelConfig
from stlm_models.evaluation import bits_per_byte
from stlm_models.layers import BytePatcher
from stlm_models.layers.packing import recurring_size
from stlm_models.layers.patching import with_recurring_slots

PARALLEL = {"output": "parallel", "max_patch_len": 12, "decoder_window": None}
CONFIG = ModelConfig(core_layers=1, decoder_layers=1, context=64)


def watched(model: STLM, module: nn.Module) -> list[int]:
    """Numbers of rows that a module of the model will have been given."""
    found: list[int] = []
    module.register_forward_pre_hook(lambda _, given: found.append(len(given[0])))
    return found


def text(length: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (length,), generator=random)


def test_sizes_are_few_and_little_more() -> None:
    sizes = [recurring_size(count) for count in range(40_000)]
    for count, size in enumerate(sizes):
        assert count <= size <= count + count // 16
    assert len(set(sizes)) < 300
    assert sizes == sorted(sizes)
    assert all(recurring_size(size) == size for size in set(sizes))


def test_slots_are_added_behind_the_patches() -> None:
    patches = BytePatcher("space")(text(900, 0), torch.tensor([0, 500, 900], dtype=torch.int32))
    more = with_recurring_slots(patches)
    count = len(patches.cu_patchlens)
    assert len(more.cu_patchlens) - 1 == recurring_size(count - 1) > count - 1
    assert torch.equal(more.cu_patchlens[:count], patches.cu_patchlens)
    assert bool((more.cu_patchlens[count:] == patches.cu_patchlens[-1]).all())
    for one, other in zip(more[1:], patches[1:], strict=True):
        assert one is other


def test_core_meets_few_numbers_of_rows() -> None:
    model = STLM(CONFIG)
    rows = watched(model, model.core)
    for seed in range(64):
        model(text(600, seed))
    assert rows
    assert all(recurring_size(count) == count for count in rows)
    assert len(set(rows)) <= 6


def test_core_of_the_caller_meets_the_patches_alone() -> None:
    class Core(nn.Module):
        def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
            return x

    model = STLM(CONFIG, core=Core())
    rows = watched(model, model.core)
    ids = text(600, 0)
    model(ids)
    assert rows == [len(BytePatcher("space", max_patch_len=16)(ids).cu_patchlens) - 1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"unpooling": "ema"}, {"pooling": "max"}, PARALLEL],
)
def test_added_slots_change_no_result(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = STLM(ModelConfig(core_layers=1, decoder_layers=1, context=64, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids, cu_seqlens = text(600, 1), torch.tensor([0, 250, 600], dtype=torch.int32)

    def results() -> list[Tensor]:
        loss_sum, _ = model(ids, ids.roll(-1), cu_seqlens=cu_seqlens)
        return [loss_sum, *torch.autograd.grad(loss_sum, list(model.parameters()))]

    with_slots = results()
    monkeypatch.setattr("stlm_models.model.with_recurring_slots", lambda patches: patches)
    torch.testing.assert_close(with_slots, results(), rtol=1e-9, atol=1e-9)


def test_evaluation_reads_few_numbers_of_bytes() -> None:
    model = STLM(CONFIG)
    rows = watched(model, model.embedding)
    bits = [bits_per_byte(model, bytes(text(300 + 7 * seed, seed).tolist())) for seed in range(40)]
    assert all(recurring_size(count) == count for count in rows)
    assert len(set(rows)) < 20
    assert all(7 < each < 9 for each in bits)
