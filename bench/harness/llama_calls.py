"""Generation by transformers' Llama, timed as in `generation_calls`, in eager mode and fp32.

Its layers are those of the flat baseline of the preset, which has as many parameters as the preset.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from . import turns
from .generation_calls import prompts_of


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model = llama_of(settings["config"]).eval()
    print(json.dumps(sum(each.numel() for each in model.parameters())), flush=True)
    prompts = prompts_of(settings["batch_size"])
    ids, mask = padded(prompts)

    def write() -> turns.Record:
        new = settings["new_bytes"]
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0,
            min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        return {"n_bytes": out[:, ids.shape[1] :].numel()}

    turns.answer(lambda: turns.timed(write))


def llama_of(config: turns.Record) -> Any:
    """Return a Llama over bytes in the shape of a flat model's config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=config["byte_dim"],
            intermediate_size=config["decoder_ff"],
            num_hidden_layers=config["decoder_layers"],
            num_attention_heads=config["decoder_heads"],
            num_key_value_heads=config["decoder_kv_heads"],
            max_position_embeddings=config["context"],
            tie_word_embeddings=True,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def padded(prompts: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and their mask, (B, T), padded on the left as generation wants them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(text)) + [*text] for text in prompts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in prompts])
    return ids, mask
