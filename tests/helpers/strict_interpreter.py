"""Refusals of newer triton, under the interpreter of the installed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def refuse_masks_that_are_not_bool(patch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 reads and writes under bool masks alone; before, integers passed.

    A scalar comparison of integers becomes integers again when it spreads over a block, in every
    release, so that `scalar & block` is no mask.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        patch.setattr(InterpreterBuilder, name, _strict(getattr(InterpreterBuilder, name), place))


def _strict(access: Callable[..., Any], place: int) -> Callable[..., Any]:
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        mask = args[place]
        assert mask.data.dtype == np.bool_, f"a mask of {mask.data.dtype}: triton 3.9 refuses it"
        return access(self, *args, **options)

    return checked
