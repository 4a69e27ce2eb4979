"""Plain blocks beside texts that grow give what their modules give, and only where they may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.norms import assert_same_rows
from torch import Tensor, nn

from stlm_kernels import runtime
from stlm_kernels._torch import random_bits
from stlm_models import STLM, Attention
from stlm_models.generation import block_run
from stlm_models.generation.block_run import BlockRun
from stlm_models.generation.engine import CachedRun
from stlm_models.layers.transformer import TransformerBlock, new_caches
from stlm_models.presets import preset

WIDTH, BATCH = 16, 5


def blocks_of(window: int | None, *, qk_norm: bool = True) -> nn.ModuleList:
    torch.manual_seed(2)
    blocks = nn.ModuleList(
        TransformerBlock(Attention(WIDTH, 4, kv_heads=2, window=window, qk_norm=qk_norm), 24)
        for _ in range(2)
    )
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.5)
    return blocks


def begun(blocks: nn.ModuleList, lengths: list[int]) -> BlockRun:
    """A run whose rows have seen as many positions each."""
    caches = new_caches(blocks, BATCH)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.randn(int(cu_seqlens[-1]), WIDTH, generator=torch.Generator().manual_seed(3))
    for block, cache in zip(blocks, caches, strict=True):
        x = block(x, cu_seqlens, cache)
    return BlockRun(blocks, caches)


@pytest.fixture(name="taken")
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step that ran without modules."""
    taken, step = [], block_run._step

    def noted(layers: Any, x: Tensor, rows: Tensor) -> Tensor:
        taken.append(len(rows))
        return step(layers, x, rows)

    monkeypatch.setattr(block_run, "_step", noted)
    return taken


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lengths", [[3] * BATCH, [1, 9, 3, 3, 70]], ids=["even", "ragged"])
@torch.no_grad()
def test_as_modules_give(
    window: int | None, lengths: list[int], taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(window, qk_norm=window != 4)
    got, want = begun(blocks, lengths), begun(blocks, lengths)
    monkeypatch.setattr(want, "_plain_layers", lambda x: [])
    # All rows, most of them, few of them, one.
    for rows in ([0, 1, 2, 3, 4], [0, 1, 3, 4], [1, 4], [2], [0, 1, 2, 3, 4], [0, 2, 3]):
        x = torch.randn(len(rows), WIDTH)
        index = torch.tensor(rows)
        assert_same_rows(got.step(x, index), want.step(x, index))
        assert got.caches[0].lens.tolist() == want.caches[0].lens.tolist()
    assert taken == [5, 4, 2, 1, 5, 3]
    for cache, other in zip(got.caches, want.caches, strict=True):
        held = min(cache.capacity, other.capacity)
        torch.testing.assert_close(cache.by_head[:, :, :, :held], other.by_head[:, :, :, :held])


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_one_text(window: int | None, dtype: torch.dtype, taken: list[int]) -> None:
    """Steps of its own way, some of the modules in between, and a new text at the end."""
    blocks = blocks_of(window, qk_norm=window != 1).to(dtype)
    got, want = (BlockRun(blocks, new_caches(blocks, 1)) for _ in range(2))
    want._plain_layers = lambda x: []  # type: ignore[method-assign]
    row, ends = torch.tensor([0]), torch.tensor([0, 3], dtype=torch.int32)
    for length in (70, 9):
        text = torch.randn(3, WIDTH, dtype=dtype)
        for run in (got, want):
            x = text
            for block, cache in zip(blocks, run.caches, strict=True):
                x = block(x, ends, cache)
        for step in range(length):
            x = torch.randn(1, WIDTH, dtype=dtype)
            as_modules = step == 5
            run = BlockRun(blocks, got.caches) if as_modules else got
            if as_modules:
                run._plain_layers = lambda x: []  # type: ignore[method-assign]
            assert_same_rows(run.step(x, row), want.step(x, row))
            assert got.caches[1].lens.tolist() == [3 + step + 1] == want.caches[1].lens.tolist()
    assert not taken
    assert got._row is not None


@torch.no_grad()
def test_one_text_of_nan_warns_of_nothing() -> None:
    blocks = blocks_of(None)
    run, row = BlockRun(blocks, new_caches(blocks, 1)), torch.tensor([0])
    for value in (torch.nan, torch.inf):
        assert run.step(torch.full((1, WIDTH), value), row).isnan().any()


def watched(blocks: nn.ModuleList) -> None:
    blocks[1].attention.output.register_forward_hook(lambda *_: None)


def replaced(blocks: nn.ModuleList) -> None:
    forward = blocks[0].feed_forward.forward
    blocks[0].feed_forward.forward = lambda x: forward(x)


def of_another_class(blocks: nn.ModuleList) -> None:
    class Adapted(nn.Linear): ...

    blocks[0].attention.query_key_value.__class__ = Adapted


@pytest.mark.parametrize("change", [watched, replaced, of_another_class])
@torch.no_grad()
def test_modules_that_are_not_plain_run(
    change: Callable[[nn.ModuleList], None], taken: list[int]
) -> None:
    blocks, x, rows = blocks_of(4), torch.randn(BATCH, WIDTH), torch.arange(BATCH)
    change(blocks)
    run, plain = begun(blocks, [3] * BATCH), begun(blocks_of(4), [3] * BATCH)
    assert_same_rows(run.step(x, rows), plain.step(x, rows))
    assert taken == [BATCH]


@torch.no_grad()
def test_a_hook_added_later_sees_the_next_step(taken: list[int]) -> None:
    blocks, seen = blocks_of(None), []
    run, rows = begun(blocks, [3] * BATCH), torch.arange(BATCH)
    run.step(torch.randn(BATCH, WIDTH), rows)
    blocks[0].register_forward_hook(lambda *_: seen.append(1))
    run.step(torch.randn(BATCH, WIDTH), rows)
    assert (taken, seen) == ([BATCH], [1])
    assert run.caches[1].lens.tolist() == [5] * BATCH


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


@torch.no_grad()
def test_nothing_is_left_of_a_row_that_begins_anew() -> None:
    """NaN in a slot that no position holds would reach the others by a weight of zero."""
    blocks, rows = blocks_of(None), torch.arange(BATCH)
    run = begun(blocks, [9] * BATCH)
    run.step(torch.full((BATCH, WIDTH), torch.nan), rows)
    again = torch.tensor([0, 3])
    for block, cache in zip(blocks, run.caches, strict=True):
        block(torch.randn(5, WIDTH), torch.tensor([0, 2, 5], dtype=torch.int32), cache.at(again))
    out = run.step(torch.randn(BATCH, WIDTH), rows)
    assert out[again].isfinite().all()
    assert out[[1, 2, 4]].isnan().all()


def test_noise_on_the_host_is_that_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor(-(2**63) + 12345)
    rows, columns = torch.tensor([[0], [7], [2**40]]), torch.arange(300)
    got = random_bits.hashed(seed, rows, columns)
    monkeypatch.setattr(runtime, "values_visible", lambda *_: False)
    assert torch.equal(got, random_bits.hashed(seed, rows, columns))
