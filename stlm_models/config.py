"""What a model looks like: its options, the presets, and how they are read from JSON."""

from __future__ import annotations

import dataclasses

from .options import BOS_ID, BYTES, IGNORED, ModelConfig, check_heads
from .presets import PRESETS

__all__ = [
    "BOS_ID",
    "BYTES",
    "IGNORED",
    "PRESETS",
    "ModelConfig",
    "check_heads",
    "config_from_dict",
    "preset",
]


def config_from_dict(values: object) -> ModelConfig:
    """`ModelConfig(**values)`, with a ValueError for anything that is not a config."""
    if not isinstance(values, dict):
        raise ValueError(f"config: expected an object of named values, got {values!r}")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"config: expected the fields of ModelConfig, got also {unknown}")
    return ModelConfig(**values)


def preset(name: str) -> ModelConfig:
    """The config of a preset, with a ValueError that lists them for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
