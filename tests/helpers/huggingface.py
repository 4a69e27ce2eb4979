"""Shared by the tests of the Hugging Face extra."""

from __future__ import annotations

import dataclasses

import torch
import transformers
from torch import Tensor

from helpers.models import TINY, scrambled
from helpers.norms import assert_same_rows
from stlm_models import BOS_ID, STLM, ModelConfig
from stlm_models.huggingface import ByteTokenizer, STLMForCausalLM

PROMPTS = ["ab c", "Zoë and a longer prompt", ""]
KINDS: dict[str, ModelConfig] = {
    "pooled": TINY,
    "flat": dataclasses.replace(TINY, patch_rule="none", core_layers=0, max_patch_len=None),
    "untied": dataclasses.replace(TINY, tied=False, encoder_layers=1, encoder_ff=24),
    "parallel": dataclasses.replace(TINY, output="parallel", decoder_window=None),
}


def one_stlm(kind: str = "pooled") -> STLM:
    """One whose greedy bytes are not all alike, and that often finds id 256 the likeliest."""
    model = scrambled(KINDS[kind])
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    with torch.no_grad():
        model.embedding.weight[BOS_ID] *= 4
    return model


def one_model(kind: str = "pooled") -> STLMForCausalLM:
    return STLMForCausalLM.from_stlm(one_stlm(kind))


def left_padded(texts: list[str] = PROMPTS) -> dict[str, Tensor]:
    tokenizer = ByteTokenizer()
    return dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))


def collated(texts: list[str]) -> dict[str, Tensor]:
    tokenizer = ByteTokenizer()
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return dict(collator([tokenizer(text) for text in texts]))


def byte_logprobs(stlm: STLM, ids: list[int]) -> Tensor:
    """(T, 256) log-probabilities of the next byte, by plain torch."""
    return stlm(torch.tensor(ids))[:, :256].log_softmax(-1)


def assert_same(got: Tensor | float, want: Tensor | float) -> None:
    """Compare by norms of rows, and id 256's logits, the lowest of all numbers, exactly."""
    a, b = (torch.as_tensor(x, dtype=torch.float32).detach() for x in (got, want))
    if a.dim() and a.shape[-1] == 257:
        assert torch.equal(a[..., 256:], b[..., 256:])
        a, b = a[..., :256], b[..., :256]
    assert_same_rows(a, b)
