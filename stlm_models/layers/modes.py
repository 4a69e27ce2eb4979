"""Modes of a model, for work that leaves them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn


class HasModes(Protocol):
    """A module, as far as its modes go."""

    training: bool

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


@contextmanager
def eval_mode(model: HasModes) -> Iterator[None]:
    """Put a model in eval mode; then each of its modules is in the mode that it was in before."""
    before = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in before):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train(before[0][1])  # modules with a `train` of their own are told
        for module, training in before:
            module.training = training
