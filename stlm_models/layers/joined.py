"""Weights that hold several matrices, one below the other, for one product of all that read alike.

A module names them; optimisers treat each matrix by itself, and tensors that were saved one matrix
at a time, as 0.1.0 saved them, are joined when they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Joined(nn.Module):
    """Module with linear maps whose weights hold several matrices each.

    `load_state_dict` takes the matrices apart as well, each by its own name.
    """

    joined: Mapping[str, Mapping[str, int]]
    """Names of such maps, each with the names of its matrices and their rows, in their order."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, parts in _weights_of(self, prefix):
            _join(state_dict, name, parts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def join_parts(
    model: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str = "", suffix: str = ""
) -> dict[str, Tensor]:
    """Tensors by name, matrices that the model holds in one weight joined where they come apart.

    Args:
        model: whose parameters have these names.
        tensors: such as a state dict.
        prefix, suffix: around the names of parameters, as an optimiser's state has them.
    """
    found = dict(tensors)
    for name, parts in _weights(model):
        _join(found, f"{prefix}{name}{suffix}", [f"{prefix}{part}{suffix}" for part in parts])
    return found


def row_splits(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Rows of the matrices of each parameter that holds several."""
    found: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        for name, parts in getattr(module, "joined", {}).items():
            weight = getattr(module.get_submodule(name), "weight", None)
            if isinstance(weight, nn.Parameter):  # not what a quantiser put there
                found[weight] = tuple(parts.values())
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    for path, module in model.named_modules():
        if isinstance(module, Joined):
            yield from _weights_of(module, f"{path}." if path else "")


def _weights_of(module: Joined, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Names of the joined weights, each with the names that its matrices have by themselves."""
    for name, parts in module.joined.items():
        yield f"{prefix}{name}.weight", [f"{prefix}{part}.weight" for part in parts]


def _join(tensors: dict[str, Any], name: str, parts: list[str]) -> None:
    if name in tensors or not all(part in tensors for part in parts):
        return
    matrices = [tensors.pop(part) for part in parts]
    # A count of steps is that of all.
    tensors[name] = torch.cat(matrices) if matrices[0].ndim else matrices[0]
