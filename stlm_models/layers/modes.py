"""Modes of a model, for work that leaves them as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Protocol

from torch import nn


class HasModes(Protocol):
    """A module, as far as its modes go."""

    training: bool

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


@contextmanager
def eval_mode(model: HasModes, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Put a model in eval mode; then each of its modules is in the mode that it was in before.

    Args:
        modules: all of the model's, from a caller that comes often: to find them takes long.
    """
    modules = list(model.modules()) if modules is None else modules
    if not any(map(attrgetter("training"), modules)):
        yield
        return
    before = [(module, module.training) for module in modules]
    model.eval()
    try:
        yield
    finally:
        model.train(before[0][1])  # modules with a `train` of their own are told
        for module, training in before:
            module.training = training
