"""Triton's interpreter without work that it repeats: the same results in half the time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def patch_the_language_once(patch: pytest.MonkeyPatch) -> None:
    """Let device functions find the language as their launch has patched it.

    Triton replaces the members of `triton.language` at each launch, and again, though nothing of
    it is left to replace, at each call of a device function: `tl.sum` or one of our own.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language: Callable[..., Any] = interpreter._patch_lang
    patched: set[ModuleType] = set()  # since the launch began

    @functools.cache
    def languages(fn: Callable[..., Any]) -> frozenset[ModuleType]:
        return frozenset(x for x in fn.__globals__.values() if x is tl or x is tl.core)

    def once(fn: Callable[..., Any]) -> Any:
        wanted = languages(fn)
        if wanted and wanted <= patched:
            return interpreter._LangPatchScope()
        is_launch = not patched
        patched.update(wanted)
        scope = patch_language(fn)
        if is_launch:
            restore = scope.restore

            def end_of_launch() -> None:
                patched.clear()
                restore()

            scope.restore = end_of_launch
        return scope

    patch.setattr(interpreter, "_patch_lang", once)


def look_types_up_once(patch: pytest.MonkeyPatch) -> None:
    """Keep numpy's type for each of triton's, for which a table is made at every question."""
    import triton.language as tl
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    of_scalars = functools.cache(numpy_type)

    def cached(kind: Any) -> Any:
        scalar = kind.scalar  # of a block its elements'
        return numpy_type(kind) if isinstance(scalar, tl.pointer_type) else of_scalars(scalar)

    patch.setattr(interpreter, "_get_np_dtype", cached)
