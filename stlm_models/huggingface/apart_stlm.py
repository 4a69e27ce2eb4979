"""Saved folders with matrices apart that the model holds in one weight, as 0.1.0 saved them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from stlm_models.layers.joined import join_parts

_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_parts(
    model: nn.Module,
    info: dict[str, Any],
    pretrained_model_name_or_path: Any = None,
    **options: Any,
) -> None:
    """Fill weights that were missing with the matrices that were left over, and note it in info.

    Args:
        model: as `from_pretrained` loaded it.
        info: what that says of missing_keys and unexpected_keys.
        pretrained_model_name_or_path, options: of `from_pretrained`.
    """
    missing, rest = set(info["missing_keys"]), set(info["unexpected_keys"])
    if pretrained_model_name_or_path is None or not (missing and rest):
        return
    place = {key: options[key] for key in _PLACE if key in options}
    joined = join_parts(model, _tensors(pretrained_model_name_or_path, rest, place))
    found = {key: tensor for key, tensor in joined.items() if key in missing}
    with torch.no_grad():
        for key, tensor in found.items():
            model.get_parameter(key).copy_(tensor)
    info["missing_keys"] = missing - found.keys()
    info["unexpected_keys"] = rest & joined.keys()


def _tensors(name: Any, wanted: Iterable[str], place: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of the safetensors files of a folder or repository."""
    optional = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **place, **optional)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        with open(index, encoding="utf-8") as file:
            files = set(json.load(file)["weight_map"].values())
    found: dict[str, Tensor] = {}
    for each in sorted(files):
        path = cached_file(name, each, **place, **optional)
        if path is not None:
            with safe_open(path, "pt") as opened:
                found |= {key: opened.get_tensor(key) for key in opened.keys() if key in wanted}  # noqa: SIM118
    return found
