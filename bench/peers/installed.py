"""Functions of other libraries, used where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from stlm_kernels.spec import Case


@functools.cache  # called within what is timed
def _found(module: str, name: str) -> tuple[Any, str | None]:
    """Return a function of another library, or None and the reason."""
    library = module.split(".", 1)[0]
    if importlib.util.find_spec(library) is None:
        return None, f"no {library} is installed"
    try:
        return getattr(importlib.import_module(module), name), None
    except AttributeError:
        return None, f"{module} has no {name}"
    except Exception as error:  # a library may raise anything where it lacks something
        return None, f"{library} is installed, but {module} does not import: {error}"


def function_of(module: str, name: str) -> Any:
    """Return a function of another library, or None where this machine has none."""
    return _found(module, name)[0]


def why_missing(module: str, name: str) -> str | None:
    """Return the reason why `function_of` gives None, or None."""
    return _found(module, name)[1]


def own_keys(case: Case) -> str | None:
    """Refuse more keys than queries and two-sided windows, which these peers do not serve."""
    return "it is not used with other keys" if {"TK", "left"} & set(case.sizes) else None


def on_gpu(case: Case) -> str | None:
    return None if torch.cuda.is_available() else "it needs a CUDA device"
