"""Triton's interpreter without work that it repeats or throws away: the same results sooner."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Arrays = list[np.ndarray]


def interpret_fast(patch: pytest.MonkeyPatch) -> None:
    """Change the interpreter of this process, until `patch` is undone."""
    _patch_the_language_once(patch)
    _look_types_up_once(patch)
    _describe_shapes_once(patch)
    _skip_unread_overflow_checks(patch)
    _combine_many_at_once(patch)


def _patch_the_language_once(patch: pytest.MonkeyPatch) -> None:
    """Let device functions find the language as their launch has patched it.

    Triton replaces the members of `triton.language` at each launch, and again, though nothing of
    it is left to replace, at each call of a device function: `tl.sum` or one of our own. What a
    launch replaces is found once, among all members of the language, for each way to import it.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language: Callable[..., Any] = interpreter._patch_lang
    patched: set[ModuleType] = set()  # since the launch began
    replacements: dict[frozenset[ModuleType], list[tuple[Any, str, Any]]] = {}

    @functools.cache
    def languages(fn: Callable[..., Any]) -> frozenset[ModuleType]:
        return frozenset(x for x in fn.__globals__.values() if x is tl or x is tl.core)

    def for_launch(fn: Callable[..., Any]) -> Any:
        wanted = languages(fn)
        if wanted not in replacements:
            scope = patch_language(fn)
            replacements[wanted] = [(x, name, getattr(x, name)) for x, name, _ in scope._changes]
            return scope
        scope = interpreter._LangPatchScope()
        for each in replacements[wanted]:
            scope.set_attr(*each)
        return scope

    def once(fn: Callable[..., Any]) -> Any:
        wanted = languages(fn)
        if wanted and wanted <= patched:
            return interpreter._LangPatchScope()
        is_launch = not patched
        patched.update(wanted)
        if not is_launch:
            return patch_language(fn)
        scope = for_launch(fn)
        restore = scope.restore

        def end_of_launch() -> None:
            patched.clear()
            restore()

        scope.restore = end_of_launch
        return scope

    patch.setattr(interpreter, "_patch_lang", once)


def _look_types_up_once(patch: pytest.MonkeyPatch) -> None:
    """Keep numpy's type for each of triton's, for which a table is made at every question."""
    import triton.language as tl
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    of_scalars = functools.cache(numpy_type)

    def cached(kind: Any) -> Any:
        scalar = kind.scalar  # of a block its elements'
        return numpy_type(kind) if isinstance(scalar, tl.pointer_type) else of_scalars(scalar)

    patch.setattr(interpreter, "_get_np_dtype", cached)


def _describe_shapes_once(patch: pytest.MonkeyPatch) -> None:
    """Keep what a shape means for a tensor and its type, which every value wraps anew."""
    import triton.language as tl

    describe_tensor, describe_type = tl.tensor.__init__, tl.block_type.__init__
    of_tensors: dict[str, dict[str, Any]] = {}
    of_types: dict[tuple[Any, ...], dict[str, Any]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in of_tensors:
            describe_tensor(self, handle, type)
            of_tensors[type.name] = {"numel": self.numel, "shape": self.shape}
        own = {"handle": handle, "type": type, "dtype": type.scalar}
        vars(self).update(of_tensors[type.name], **own)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *shape
        if key not in of_types:
            describe_type(self, element_ty, shape)
            of_types[key] = dict(vars(self))
        vars(self).update(of_types[key], element_ty=element_ty)

    patch.setattr(tl.tensor, "__init__", tensor)
    patch.setattr(tl.block_type, "__init__", block_type)


def _skip_unread_overflow_checks(patch: pytest.MonkeyPatch) -> None:
    """Leave out the sums in int64 that show an overflow: the assertion on them is for `debug`.

    Every sum, difference and product of integers is computed so once more, and compared with its
    type's range, in any release; without `debug` nothing reads the answer.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", options)


def _combine_many_at_once(patch: pytest.MonkeyPatch) -> None:
    """Reduce and scan by a function of our own in as many steps as a length has doublings.

    The interpreter calls the function, which treats all elements alike, once for each of them. A
    GPU combines in another order too: functions must be associative.
    """
    from triton.runtime.interpreter import ReduceOps, ScanOps

    def combined(self: Any, first: Arrays, second: Arrays, inputs: Any) -> Arrays:
        wrapped = (
            self.to_tensor(x, each.dtype)
            for arrays in (first, second)
            for x, each in zip(arrays, inputs, strict=True)
        )
        found = self.combine_fn.fn(*wrapped)
        found = found if isinstance(found, tuple) else (found,)
        arrays = (np.asarray(x.handle.data if hasattr(x, "handle") else x) for x in found)
        return [
            x.astype(old.dtype).reshape(old.shape) for x, old in zip(arrays, first, strict=True)
        ]

    def reduce(self: Any, inputs: Any) -> list[Any]:
        axis, shape = self.axis, inputs[0].handle.data.shape
        rows = [x.handle.data for x in inputs]
        rows = [x.reshape(-1) if axis is None else np.moveaxis(x, axis, 0) for x in rows]
        while len(rows[0]) > 1:
            rows = combined(self, [x[::2] for x in rows], [x[1::2] for x in rows], inputs)
        last = [x[0] for x in rows]
        if self.keep_dims:
            kept = [1 if axis in (None, i) else size for i, size in enumerate(shape)]
            last = [x.reshape(kept) for x in last]
        return [self.to_tensor(x, each.dtype) for x, each in zip(last, inputs, strict=True)]

    def scan(self: Any, inputs: Any) -> list[Any]:
        rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        step, count = 1, len(rows[0])
        while step < count:
            before = [np.roll(x, step, 0) for x in rows]
            after = combined(self, before, rows, inputs)
            rows = [np.concatenate([x[:step], y[step:]]) for x, y in zip(rows, after, strict=True)]
            step *= 2
        return [
            self.to_tensor(np.moveaxis(x, 0, self.axis), each.dtype)
            for x, each in zip(rows, inputs, strict=True)
        ]

    patch.setattr(ReduceOps, "generic_reduce", reduce)
    patch.setattr(ScanOps, "generic_scan", scan)
