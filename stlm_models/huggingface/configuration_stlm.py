"""The shape of a model as a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from stlm_models import ModelConfig

# transformers copies this file into saved folders: imports of stlm are absolute and public.


class STLMHFConfig(PretrainedConfig):
    """`config.json` of an `STLM`: the values of a `ModelConfig`, under the name "stlm".

    Args:
        stlm: a `ModelConfig`, or some of its values by name; None is its defaults.
        kwargs: of every `PretrainedConfig`.

    Raises:
        ValueError: for a value or a name that `ModelConfig` refuses.
    """

    model_type = "stlm"
    stlm: dict[str, Any]

    def __init__(self, stlm: ModelConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.stlm = as_model_config(stlm).to_dict()
        super().__init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        return as_model_config(self.stlm)

    # Names under which transformers and its users look for these.

    @property
    def vocab_size(self) -> int:
        return self.stlm["vocab_size"]

    @property
    def hidden_size(self) -> int:
        return self.stlm["byte_dim"]

    @property
    def max_position_embeddings(self) -> int:
        return self.stlm["context"]


def as_model_config(values: ModelConfig | Mapping[str, Any] | None) -> ModelConfig:
    """A `ModelConfig` of its values, with a ValueError for names that it does not have."""
    if isinstance(values, ModelConfig):
        return values
    try:
        return ModelConfig(**(values or {}))
    except TypeError as error:
        raise ValueError(f"stlm: expected the fields of ModelConfig, got {values!r}") from error


STLMHFConfig.register_for_auto_class()
