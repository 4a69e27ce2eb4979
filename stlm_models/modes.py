"""Modes of a model and of torch, for work that leaves both as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
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


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode and without gradients, whatever mode the caller is in.

    Not in torch's inference mode: what is kept from here could not be changed outside of it, nor
    could a module that keeps a tensor of its own from its first call be trained later.
    """
    with eval_mode(model), torch.inference_mode(False), torch.no_grad():
        yield
