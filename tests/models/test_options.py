"""Every pair of options, in a few tiny models: shapes, leaks, gradients, generation, JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.cached import seen_ids, varied, write_greedily
from helpers.models import TEXT, TINY, ids_of, packed, scrambled
from helpers.norms import assert_same_gradients, assert_same_rows
from helpers.options import CHOICES, EXCLUDED, OPTIONS, PAIRS, caller, config_of, pairs_of

from stlm_kernels import find_patches
from stlm_kernels.testing import assert_causal
from stlm_models import PRESETS, STLM, ModelConfig
from stlm_models.config import config_from_dict
from stlm_models.parallel import apply_fsdp2
from stlm_models.training.optim import Optimizers


@pytest.fixture(params=CHOICES, ids=lambda c: "-".join(c.values()), name="model")
def model_of_each_choice(request: pytest.FixtureRequest) -> STLM:
    return varied(config_of(request.param))


def test_every_allowed_pair_occurs() -> None:
    assert len(CHOICES) <= 30
    assert set().union(*map(pairs_of, CHOICES)) == PAIRS
    every = {
        pair
        for (a, xs), (b, ys) in itertools.combinations(OPTIONS.items(), 2)
        for pair in itertools.product([(a, x) for x in xs], [(b, y) for y in ys])
    }
    assert every - PAIRS == EXCLUDED
    for (a, x), (b, y) in EXCLUDED:
        with pytest.raises(ValueError, match="expected"):
            config_of({a: x, b: y})


def test_json(model: STLM) -> None:
    assert ModelConfig(**json.loads(json.dumps(model.config.to_dict()))) == model.config


def test_nothing_leaks(model: STLM) -> None:
    assert_causal(caller(model.double()), 257, length=10)


@torch.no_grad()
def test_documents_and_rows(model: STLM) -> None:
    call = caller(model)
    ids, cu_seqlens = packed([TEXT, b"", b"x y"])
    together = call(ids, None, cu_seqlens)
    assert together.shape == (len(ids), 257)
    assert_same_rows(together[-4:], call(ids_of(b"x y")))
    if model.config.patch_rule != "external":
        dense = model(ids_of(TEXT)[None])[0]
        assert_same_rows(dense, together[: len(TEXT) + 1])


def test_every_parameter_gets_a_gradient(model: STLM) -> None:
    # Without id 256 and its closed patch, the first bytes read the null state.
    ids = ids_of(TEXT)[2:]
    loss_sum, n_valid = caller(model.train())(ids, ids.long())
    (loss_sum / n_valid).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert len(model.state_dict()) == len([*model.parameters(), *model.buffers()])


@torch.no_grad()
def test_capacity_in_training(model: STLM) -> None:
    """Enough slots give what exact patches give; the mode changes nothing else but the loss."""
    ids = ids_of(TEXT)
    call = caller(model)
    expected = call(ids)
    assert_same_rows(caller(model.train())(ids), expected)


@torch.no_grad()
def test_greedy_writing_is_that_of_full_runs(model: STLM) -> None:
    if model.config.patch_rule == "external":
        with pytest.raises(ValueError, match=r"patch_rule: expected a rule to generate"):
            model.generate(TEXT, max_new_bytes=1)
        return
    model.double()  # where rounding decides nothing
    prompts = [b"", b"ab c", TEXT]
    expected = write_greedily(model, seen_ids(prompts), 14)
    assert model.generate_batch(prompts, max_new_bytes=14, temperature=0) == expected


class TestParallel:
    CONFIG = dataclasses.replace(TINY, output="parallel", decoder_window=None)

    def test_the_slot_of_each_byte(self) -> None:
        """Logits of a byte come from the state read before it, at its place there."""
        model = scrambled(self.CONFIG)
        ids = ids_of(b"ab cdefgh i")[1:]
        with torch.no_grad():
            logits = model(ids)
            patches = model.patcher(ids)
            ngrams = model.ngram_rows(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
            inputs = model.core_inputs(*model.pool(ids, ids, patches, ngrams))
            states = model.core_states(model.core(inputs, patches.cu_seqlens), inputs)
            starts = patches.cu_patchlens.tolist()
            # "cdefgh " is cut at five bytes; the first two bytes read the null state.
            assert starts == [0, 3, 8, 10, 11]
            for t in range(len(ids)):
                own = max(p for p in range(4) if starts[p] <= t)
                closes = t + 1 == starts[own + 1] and own < 3
                read, slot = (own, 0) if closes else (own - 1, t + 1 - starts[own])
                state = states[read] if read >= 0 else model.head.null_state
                slots = model.decode_slots(state[None])[0]
                want = model.embedding.logits(model.output_states(slots[slot]))
                assert_same_rows(logits[t], want)

    def test_reconstruction_counts_bytes_alone(self) -> None:
        model = scrambled(self.CONFIG)
        ids = ids_of(TEXT)
        targets = ids.long().roll(-1)
        targets[-3:] = -100
        plain, n_valid = model(ids, targets)
        both, _ = model.train()(ids, targets)
        patches = model.patcher(ids)
        boundaries = torch.tensor([0, len(ids)], dtype=torch.int32)
        ngrams = model.ngram_rows(ids, boundaries)
        inputs = model.core_inputs(*model.pool(ids, ids, patches, ngrams))
        slots = model.embedding.logits(model.output_states(model.decode_slots(inputs)))
        nats = []
        for t in range(1, len(ids)):  # the first id stands before the document
            patch = int(patches.patch_ids[t])
            row = slots[patch, t - int(patches.cu_patchlens[patch])]
            nats.append(-row.log_softmax(-1)[int(ids[t])])
        want = plain + torch.stack(nats).mean() * n_valid
        assert_same_rows(both, want)
        light = dataclasses.replace(self.CONFIG, reconstruction_weight=0.0)
        assert_same_rows(scrambled(light).train()(ids, targets)[0], plain)

    def test_patches_longer_than_the_slots_are_refused(self) -> None:
        ids = ids_of(TEXT)
        config = dataclasses.replace(self.CONFIG, patch_rule="external")
        with pytest.raises(ValueError, match="patches: expected patches of at most 5 bytes"):
            scrambled(config)(ids, patches=find_patches(ids, rule="fixed", patch_size=7))

    def test_boundaries_that_are_known_too_late_are_refused(self) -> None:
        """Two documents' own ends need no boundary."""
        ids, cu_seqlens = packed([b"ab", b"e fg"])
        model = scrambled(dataclasses.replace(self.CONFIG, patch_rule="external"))
        closes = find_patches(ids, patch_end_mask=ids == ord(" "), cu_seqlens=cu_seqlens)
        model(ids, cu_seqlens=cu_seqlens, patches=closes)
        starts = find_patches(ids, patch_start_mask=ids == ord("f"), cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match=r"patches: expected a rule that closes .* byte 5 "):
            model(ids, cu_seqlens=cu_seqlens, patches=starts)


class TestSharedFeedForward:
    CONFIG = dataclasses.replace(TINY, share_ff=True, encoder_layers=2)

    def test_it_is_stored_and_moved_once(self) -> None:
        model = scrambled(self.CONFIG)
        names = [name for name in model.state_dict() if "feed_forward.gate_up" in name]
        assert names == [
            "encoder_feed_forward.gate_up.weight",
            "core.feed_forward.gate_up.weight",
            "decoder_feed_forward.gate_up.weight",
        ]
        optimizers = Optimizers(model, muon_lr=0.1, adamw_lr=0.1)
        groups = [group for part in optimizers.parts.values() for group in part.param_groups]
        moved = [parameter for group in groups for parameter in group["params"]]
        assert len(moved) == len({id(p) for p in moved}) == len(list(model.parameters()))

    def test_it_adds_the_same_map_in_every_layer(self) -> None:
        own = scrambled(dataclasses.replace(self.CONFIG, share_ff=False))
        shared = scrambled(self.CONFIG)
        values = shared.state_dict()
        copies = {}
        for name in own.state_dict():
            before, _, weight = name.partition(".feed_forward.")
            # core.blocks.1 -> core, decoder.1 -> decoder
            stack = before.removesuffix(".0").removesuffix(".1").removesuffix(".blocks")
            joint = (
                f"core.feed_forward.{weight}"
                if stack == "core"
                else (f"{stack}_feed_forward.{weight}")
            )
            copies[name] = values[joint if weight else name]
        own.load_state_dict(copies)
        assert_same_rows(own(ids_of(TEXT)), shared(ids_of(TEXT)))

    def test_sharded_parameters(self, tmp_path: Path) -> None:
        ids = ids_of(TEXT)
        expected = scrambled(self.CONFIG)
        expected(ids, ids.long())[0].backward()
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", rank=0, world_size=1, store=store)
        try:
            sharded = apply_fsdp2(scrambled(self.CONFIG))
            sharded(ids, ids.long())[0].backward()
            grads = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
        finally:
            dist.destroy_process_group()
        assert_same_gradients(grads, {n: p.grad for n, p in expected.named_parameters()})


def test_shapes_of_training_with_a_capacity_are_static() -> None:
    model = scrambled(dataclasses.replace(TINY, max_patches=12)).train()
    shapes = []
    model.core.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    for text in (b"a b c d", b"abcdefg"):
        model(ids_of(text))
    assert shapes == [(12, TINY.core_dim)] * 2
    # More patches than slots: the rest reads the last of them, and nothing fails.
    assert model(ids_of(TEXT * 2)).isfinite().all()
    assert len(model.patcher(ids_of(TEXT * 2)).cu_patchlens) > 13


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tied": 1}, "tied: expected bool, got 1"),
        ({"max_patches": 0}, "max_patches: expected at least 1, got 0"),
        ({"pooling": "attention"}, "pooling_heads: expected a divisor of 128"),
        ({"pooling": "attention", "pooling_heads": 3}, "pooling_heads: expected a divisor of 128"),
        ({"pooling_heads": 2}, 'pooling_heads: expected None with pooling "mean", got 2'),
        ({"encoder": "both"}, "encoder: expected one of"),
        ({"encoder_layers": -1}, "encoder_layers: expected at least 0, got -1"),
        ({"encoder_layers": 1, "encoder_heads": 3, "encoder_kv_heads": 1}, "encoder_heads: expect"),
        ({"encoder_ff": 0}, "encoder_ff: expected at least 1, got 0"),
        ({"unpooling": "mean"}, "unpooling: expected one of"),
        ({"output": "both"}, "output: expected one of"),
        ({"output": "parallel"}, 'decoder_window: expected None with output "parallel", got 128'),
        (
            {"output": "parallel", "decoder_window": None, "max_patch_len": None},
            'max_patch_len: expected at least 1 with output "parallel", got None',
        ),
        (
            {"reconstruction_weight": -1.0},
            "reconstruction_weight: expected a finite number of at least 0",
        ),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


def test_configs_written_before_these_options_existed() -> None:
    values = {
        name: TINY.to_dict()[name]
        for name in (
            "vocab_size", "byte_dim", "patch_rule", "patch_size", "max_patch_len", "pooling",
            "ngram_sizes", "ngram_buckets", "ngram_dim", "core_layers", "core_dim", "core_heads",
            "core_kv_heads", "core_ff", "decoder_layers", "decoder_heads", "decoder_kv_heads",
            "decoder_ff", "decoder_window", "qk_norm", "rope_base", "logit_scale", "softcap",
            "context",
        )
    }  # fmt: skip
    assert config_from_dict(json.loads(json.dumps(values))) == TINY


def test_hash_functions_of_a_config() -> None:
    """Each adds a table for each size, behind those of the functions before it."""
    models = {n: scrambled(dataclasses.replace(TINY, ngram_hashes=n)) for n in (1, 3)}
    names = {n: [*model.state_dict()] for n, model in models.items()}
    added = [f"ngrams.tables.{i}" for i in range(2, 6)]
    assert sorted(names[3]) == sorted([*names[1], *added])
    ngrams = models[3].ngrams
    assert ngrams is not None
    assert ngrams.multipliers == (1_000_000_007,) * 2 + (5_915_587_277,) * 2 + (1_500_450_271,) * 2


def test_the_papers_own_order() -> None:
    config = PRESETS["paper-byte"]
    with torch.device("meta"):
        size = sum(p.numel() for p in STLM(config).parameters())
    assert 40e6 < size < 55e6
    small = dataclasses.replace(
        config, byte_dim=16, core_dim=16, core_layers=1, encoder_layers=1, decoder_layers=1
    )
    assert_causal(caller(varied(small).double()), 257, length=14)
