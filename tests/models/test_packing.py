"""Work that is done once per stream of a forward, and handed to every layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import TEXT, TINY, ids_of, packed, scrambled
from torch import Tensor

from stlm_kernels import _checks
from stlm_kernels.runtime import check_ids, checked_ids
from stlm_models import PRESETS, STLM, Attention, ModelConfig
from stlm_models.generation.engine import CachedRun
from stlm_models.layers import packing as packing_module
from stlm_models.layers import rotary
from stlm_models.layers.packing import Packing
from stlm_models.layers.transformer import PatchCore, TransformerBlock

SHAPE_50M = dataclasses.replace(
    PRESETS["50m"],
    byte_dim=16,
    ngram_buckets=64,
    ngram_dim=16,
    decoder_heads=2,
    decoder_kv_heads=2,
    decoder_ff=16,
    core_dim=16,
    core_heads=2,
    core_kv_heads=1,
    core_ff=16,
    context=64,
)
"""A config of as many layers as the 50m preset, each of them small."""
TEXTS = [TEXT, b"another document", TEXT[:20]]


@pytest.fixture(name="counts")
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often rows are placed, tables are gathered and values of ids are read."""
    found: Counter[str] = Counter()

    def count(module: Any, name: str, key: Callable[..., str]) -> None:
        original = getattr(module, name)

        def call(*args: Any) -> Any:
            found[key(*args)] += 1
            return original(*args)

        monkeypatch.setattr(module, name, call)

    count(packing_module, "document_starts", lambda *args: "document_starts")
    count(packing_module, "unused_rows", lambda *args: "unused_rows")
    count(packing_module, "rotary_tables", lambda *args: "rotary_tables")
    count(_checks, "ids_within", lambda ids, low, high: f"ids in [{low}, {high})")
    return found


def model_50m() -> STLM:
    model = scrambled(SHAPE_50M)
    blocks = [block for block in model.modules() if isinstance(block, TransformerBlock)]
    assert len(blocks) == 21  # what the counts below would be if each layer did the work
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_packed_forward_does_the_work_of_each_stream_once(
    counts: Counter[str], training: bool
) -> None:
    model = model_50m().train(training)
    ids, cu_seqlens = packed(TEXTS)
    n_patches = len(model.patcher(ids, cu_seqlens).cu_patchlens) - 1
    with torch.set_grad_enabled(training):
        logits = model(ids, cu_seqlens=cu_seqlens)
    if training:
        logits.sum().backward()
    assert counts == {
        "document_starts": 2,  # bytes and patches
        "unused_rows": 2,
        "rotary_tables": 2,
        "ids in [0, 257)": 1,  # bytes, for table, n-grams and pooling at once
        f"ids in [-1, {n_patches})": 1,  # what each byte reads
    }


def test_a_loss_takes_the_unused_rows_of_the_forward(counts: Counter[str]) -> None:
    ids, cu_seqlens = packed(TEXTS)
    model_50m()(ids, ids.long().masked_fill(ids == 256, -100), cu_seqlens=cu_seqlens)
    assert counts["document_starts"] == counts["unused_rows"] == 2


def test_dense_bytes_are_placed_by_their_index_alone(counts: Counter[str]) -> None:
    ids = torch.stack([ids_of(TEXT), ids_of(TEXT[::-1])])
    model_50m()(ids)
    assert counts["document_starts"] == 1  # the patches are packed
    assert counts["ids in [0, 257)"] == 1


def test_encoder_and_decoder_share_the_stream_of_bytes(counts: Counter[str]) -> None:
    config = dataclasses.replace(TINY, encoder_layers=2, encoder_heads=2, encoder_kv_heads=2)
    ids, cu_seqlens = packed(TEXTS)
    scrambled(config)(ids, cu_seqlens=cu_seqlens)
    assert counts["document_starts"] == counts["unused_rows"] == counts["rotary_tables"] == 2


def test_given_patches_are_checked_by_the_same_rows(counts: Counter[str]) -> None:
    model = model_50m()
    ids, cu_seqlens = packed(TEXTS)
    patches = model.patcher(ids, cu_seqlens)
    model(ids, cu_seqlens=cu_seqlens, patches=patches)
    assert counts["document_starts"] == 2


def test_generation_places_the_rows_of_a_prompt_once(counts: Counter[str]) -> None:
    run = CachedRun(model_50m(), [ids_of(text).tolist() for text in TEXTS])
    assert counts["document_starts"] == 2
    counts.clear()
    run.step(torch.tensor([97, 98, 32]), range(3))
    assert counts["document_starts"] == 0


def test_a_compiled_graph_searches_once_per_stream() -> None:
    searches: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        searches.append(sum("searchsorted" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model = scrambled(dataclasses.replace(TINY, max_patches=40)).train()
    ids, cu_seqlens = packed(TEXTS)
    expected = model(ids, cu_seqlens=cu_seqlens)
    found = torch.compile(model, backend=backend, fullgraph=True)(ids, cu_seqlens=cu_seqlens)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert searches == [2]


@pytest.mark.parametrize("window", [None, 3])
def test_rows_that_are_handed_in_change_nothing(window: int | None) -> None:
    torch.manual_seed(0)
    layer = Attention(16, 2, window=window)
    x = torch.randn(12, 16)
    cu_seqlens = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    rows = layer.new_rows(x, Packing(cu_seqlens, len(x)))
    alone = layer(x, cu_seqlens=cu_seqlens)
    assert torch.equal(layer(x, cu_seqlens=cu_seqlens, rows=rows), alone)
    dense = x.view(2, 6, 16)
    assert torch.equal(layer(dense, rows=layer.new_rows(dense)), layer(dense))
    cache, other = layer.new_cache(2), layer.new_cache(2)
    for step in range(4):
        one = dense[:, step : step + 1]
        rows = layer.new_rows(one, cache=cache)
        found, expected = layer(one, cache=cache, rows=rows), layer(one, cache=other)
        assert torch.equal(found, expected)


def test_positions_count_from_the_start_of_each_document() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    rows = Packing(cu_seqlens, 9).rows(8, 100.0)
    cos, sin = rotary.rotary_tables(9, 8, 100.0, torch.device("cpu"))
    places = [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert torch.equal(rows.cos, cos[places])
    assert torch.equal(rows.sin, sin[places])
    assert rows.unused is not None
    assert rows.unused[:, 0].tolist() == [False] * 7 + [True] * 2


@pytest.mark.parametrize("offsets", [[0, 50, 4], [3, 9], [0, -4, 9], [0, 90]])
def test_boundaries_that_are_none_are_refused_by_name(offsets: list[int]) -> None:
    layer = Attention(16, 2)
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        layer(torch.randn(9, 16), cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


class TestCheckedIds:
    """`runtime.checked_ids`: within the block the ids, and parts of them, are not read again."""

    def test_parts_are_known_and_others_are_not(self, counts: Counter[str]) -> None:
        ids = torch.tensor([1, 2, 256, 4], dtype=torch.int32)
        with checked_ids(ids, 257):
            check_ids(ids, 257)
            check_ids(ids[1:3], 300)
            assert counts.total() == 1
            for other in (ids.clone(), ids.long(), ids[::2]):
                check_ids(other, 257)
            assert counts.total() == 4
            with pytest.raises(IndexError, match=r"byte_ids: expected values in \[0, 255\]"):
                check_ids(ids, 256)  # a narrower range than the one that was checked
        counts.clear()
        check_ids(ids, 257)
        assert counts.total() == 1

    def test_a_bad_id_is_refused_at_the_door(self) -> None:
        with (
            pytest.raises(IndexError, match="got 300 at position 1"),
            checked_ids(torch.tensor([1, 300]), 257),
        ):
            raise AssertionError("the block ran")
        check_ids(torch.tensor([1, 2]), 257)

    def test_the_block_of_another_thread_knows_nothing(self, counts: Counter[str]) -> None:
        from threading import Thread

        ids = torch.tensor([1, 2, 3])
        with checked_ids(ids, 257):
            thread = Thread(target=check_ids, args=(ids, 257))
            thread.start()
            thread.join()
        assert counts.total() == 2


def test_blocks_clear_unused_rows_once_and_their_gradient() -> None:
    """A NaN there reaches neither the result nor the gradient of a weight."""
    core = PatchCore(ModelConfig(core_dim=64, core_heads=4, core_kv_heads=4, core_layers=2))
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(6, 64)
    x[4:] = torch.nan
    out = core(x.requires_grad_(), torch.tensor([0, 2, 4], dtype=torch.int32))
    assert out[:4].isfinite().all()
    assert not out[4:].any()
    upstream = torch.ones_like(out)
    upstream[4:] = torch.nan
    out.backward(upstream)
    assert all(parameter.grad.isfinite().all() for parameter in core.parameters())
    assert x.grad is not None
    assert not x.grad[4:].any()
