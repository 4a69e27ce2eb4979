"""A tiny model in which everything matters, and its input, for the tests of the model."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from stlm_models import STLM, ModelConfig
from stlm_models.config import BOS_ID

TINY = ModelConfig(
    byte_dim=16,
    max_patch_len=5,
    ngram_sizes=(2, 3),
    ngram_buckets=61,
    ngram_dim=4,
    core_layers=2,
    core_dim=24,
    core_heads=2,
    core_kv_heads=1,
    core_ff=32,
    decoder_layers=2,
    decoder_heads=2,
    decoder_kv_heads=2,
    decoder_ff=24,
    decoder_window=7,
    context=32,
)
# Every kind of boundary: forced ones, runs of spaces, UTF-8, a space at the very beginning and end.
TEXT = " ab c,  de\n\n extraordinarily(x) == 'Zoë'; 12_345 ".encode()

RULES = {
    "space": TINY,
    "space, patches of any length": dataclasses.replace(TINY, max_patch_len=None),
    "fixed": dataclasses.replace(TINY, patch_rule="fixed", patch_size=4, max_patch_len=None),
    "sum, no window, no n-grams": dataclasses.replace(
        TINY, pooling="sum", decoder_window=None, ngram_sizes=(), qk_norm=False, softcap=20.0
    ),
}
"""A model of each kind of boundary."""


def scrambled(config: ModelConfig = TINY, core: nn.Module | None = None) -> STLM:
    """A model whose every parameter matters: fresh ones begin with residual branches of zero."""
    torch.manual_seed(0)
    model = STLM(config, core)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.dim() > 1 else 1.0)
    if model.memory is not None:
        model.memory.remember([TEXT])
    return model.eval()


def ids_of(text: bytes) -> Tensor:
    return torch.tensor([BOS_ID, *text], dtype=torch.int16)


def packed(texts: list[bytes]) -> tuple[Tensor, Tensor]:
    parts = [ids_of(text) for text in texts]
    lengths = torch.tensor([0, *map(len, parts)])
    return torch.cat(parts), lengths.cumsum(0).int()
