"""Types of `module(...)`, which torch declares as Any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Forward = TypeVar("Forward", bound=Callable[..., Any])


def typed_as(forward: Forward) -> Callable[[Callable[..., Any]], Forward]:
    """Let type checkers see a method as another one, overloads included; for annotations alone."""
    raise NotImplementedError(f"{forward.__name__}: only for type checkers")
