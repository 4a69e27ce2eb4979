"""The shape of a model as a Hugging Face configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from stlm_models import BOS_ID, ModelConfig

# transformers copies this file into saved folders: imports of stlm are absolute and public.

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _field(name: str) -> property:
    """A value of the `ModelConfig` under the name by which transformers looks for it."""

    def get(self: STLMHFConfig) -> Any:
        return self.stlm[name]

    def put(self: STLMHFConfig, value: Any) -> None:
        self.stlm = as_model_config({**self.stlm, name: value}).to_dict()

    return property(get, put)


class STLMHFConfig(PretrainedConfig):
    """`config.json` of an `STLM`: the values of a `ModelConfig`, under the name "stlm".

    `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads` and
    `intermediate_size` are those of the decoder over bytes; setting one changes the value in
    `stlm`. Id 256 begins a document, ends it and pads.

    Args:
        stlm: a `ModelConfig`, or some of its values by name; None is its defaults.
        kwargs: of every `PretrainedConfig`, and values of `ModelConfig` in place of those in stlm.

    Raises:
        ValueError: for a value or a name that `ModelConfig` refuses.
    """

    model_type = "stlm"
    stlm: dict[str, Any]

    def __init__(self, stlm: ModelConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        own = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        self.stlm = as_model_config({**as_model_config(stlm).to_dict(), **own}).to_dict()
        super().__init__(**{**dict.fromkeys(SPECIAL_IDS, BOS_ID), **kwargs})

    @property
    def model_config(self) -> ModelConfig:
        return as_model_config(self.stlm)

    # Names under which transformers and its users look for these.
    vocab_size = _field("vocab_size")
    hidden_size = _field("byte_dim")
    num_hidden_layers = _field("decoder_layers")
    num_attention_heads = _field("decoder_heads")
    num_key_value_heads = _field("decoder_kv_heads")
    intermediate_size = _field("decoder_ff")
    max_position_embeddings = _field("context")
    tie_word_embeddings = _field("tied")
    logit_scale = _field("logit_scale")
    final_logit_softcapping = _field("softcap")


def as_model_config(values: ModelConfig | Mapping[str, Any] | None) -> ModelConfig:
    """A `ModelConfig` of its values, with a ValueError for names that it does not have."""
    if isinstance(values, ModelConfig):
        return values
    try:
        return ModelConfig(**(values or {}))
    except TypeError as error:
        raise ValueError(f"stlm: expected the fields of ModelConfig, got {values!r}") from error


STLMHFConfig.register_for_auto_class()
