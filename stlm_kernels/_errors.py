"""Error messages of the public ops: each begins with the op's name, some end with a hint."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
Correct = Callable[[dict[str, Any]], dict[str, Any]]
"""Arguments of a call as they may have been meant, from those given."""

NAMED = (ValueError, IndexError, TypeError, NotImplementedError)


def named_errors(op: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Begin every error message of a public op with the op's name.

    Where the shapes alone make a call wrong, and one of the mistakes in `HINTS` explains them, the
    message ends with the hint. Valid calls are never looked at.
    """
    name = op.__name__

    @functools.wraps(op)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        if torch.compiler.is_dynamo_compiling():  # which traces no change of a message
            return op(*args, **kwargs)
        try:
            return op(*args, **kwargs)
        except NAMED as error:
            text = str(error)
            if not text.startswith((f"{name}:", f"{name}()")):
                text = f"{name}: {text}"
            if isinstance(error, ValueError):
                text += _hint(op, args, kwargs)
            error.args = (text,)
            raise

    return call


def _hint(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The text of the first mistake whose correction makes the shapes of a call fit, or ""."""
    given = inspect.signature(op).bind(*args, **kwargs).arguments
    for names, correct, text in HINTS:
        concerns = all(isinstance(given.get(name), Tensor) for name in names)
        if concerns and not _shapes_fit(op, given, dict) and _shapes_fit(op, given, correct):
            return f" ({text})"
    return ""


def _shapes_fit(op: Callable[..., Any], given: dict[str, Any], correct: Correct) -> bool:
    """Return whether an op accepts corrected arguments as far as shapes go, without running it.

    On the meta device there are no values to check, and ops check `impl` last. Tensors that cannot
    be corrected or moved there, such as nested or quantized ones, do not fit.
    """
    try:
        arguments = given | correct(given)
        on_meta = {name: _on_meta(x) for name, x in arguments.items()}
        op(**on_meta | {"impl": "none"})
    except Exception as error:
        return str(error).startswith("impl: ")
    return False


def _on_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def _heads_after_positions(given: dict[str, Any]) -> dict[str, Any]:
    names = ("q", "k", "v")
    tensors = {name: given[name] for name in names if isinstance(given.get(name), Tensor)}
    return {name: x.transpose(-3, -2) for name, x in tensors.items() if x.ndim >= 3}


def _cached_heads_after_positions(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.transpose(1, 2) for name in ("k_cache", "v_cache") if (x := given[name]).ndim == 4
    }


def _input_first(given: dict[str, Any]) -> dict[str, Any]:
    return {"input": given["linear_weight"], "linear_weight": given["input"]}


HINTS: tuple[tuple[tuple[str, ...], Correct, str], ...] = (
    (
        ("q", "k"),
        _heads_after_positions,
        "these shapes fit with heads before positions; here positions come first, as in "
        "(B, T, H, K): x.transpose(-3, -2)",
    ),
    (
        ("k_cache", "v_cache"),
        _cached_heads_after_positions,
        "these shapes fit with heads before positions; here caches are (B, C, H_kv, K): "
        "x.transpose(1, 2)",
    ),
    (
        ("input", "linear_weight"),
        _input_first,
        "these shapes fit with the first two arguments swapped; here the order is "
        "input, linear_weight",
    ),
)
"""Common mistakes: the tensors they concern, the corrected arguments, what to tell the caller."""
