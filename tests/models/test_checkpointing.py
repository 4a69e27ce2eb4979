"""Blocks that keep their input alone: the same gradients from less memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.models import TEXT, TINY, ids_of, scrambled

from stlm_models import STLM, ModelConfig
from stlm_models.data.corpus import Corpus
from stlm_models.training.throughput import flops_per_byte
from stlm_models.training.trainer import Trainer, TrainOptions

CONFIGS: dict[str, ModelConfig] = {
    "pooled": TINY,
    "shared feed-forward": dataclasses.replace(TINY, share_ff=True),
    "encoder": dataclasses.replace(TINY, encoder_layers=2, encoder_ff=24),
    "parallel": dataclasses.replace(TINY, output="parallel", decoder_window=None),
    "flat": dataclasses.replace(TINY, patch_rule="none", core_layers=0, max_patch_len=None),
}
CORPUS = Corpus("text", [TEXT * 40], [])


def kept_bytes_and_gradients(model: STLM) -> tuple[int, dict[str, Any]]:
    """Bytes that a step keeps for its backward pass, each storage once, and its gradients."""
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    ids = ids_of(TEXT * 8)[None]
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_sum, _ = model.train()(ids[:, :-1], ids[:, 1:].long())
    loss_sum.backward()
    n_bytes = sum(x.untyped_storage().nbytes() for x in kept.values())
    return n_bytes, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_gradients_from_less_memory(name: str) -> None:
    model = scrambled(CONFIGS[name])
    plainly, expected = kept_bytes_and_gradients(model)
    model.checkpointing = True
    sparing, gradients = kept_bytes_and_gradients(model)
    assert sparing < 0.6 * plainly
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient)


def test_config_and_options_set_it() -> None:
    config = dataclasses.replace(TINY, checkpointing=True)
    assert STLM(config).checkpointing
    assert ModelConfig(**config.to_dict()) == config
    model = STLM(TINY)
    assert not model.checkpointing
    model.checkpointing = True
    assert all(block.checkpointing for block in [*model.core.blocks, *model.decoder])
    with pytest.raises(ValueError, match="checkpointing: expected bool, got 1"):
        dataclasses.replace(TINY, checkpointing=1)


def test_our_own_loop_trains_alike_and_counts_what_a_byte_needs() -> None:
    trained, counted = [], []
    for checkpointing in (False, True):
        options = TrainOptions(steps=2, batch_size=2, checkpointing=checkpointing)
        trainer = Trainer(TINY, CORPUS, options)
        assert trainer.model.checkpointing == checkpointing
        trainer.run()
        counted.append(flops_per_byte(trainer))
        assert trainer.model.checkpointing == checkpointing
        trained.append(trainer.model.state_dict())
    assert counted[0] == counted[1]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor)
