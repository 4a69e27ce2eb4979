"""Choice of the implementation: `impl="auto" | "triton" | "torch"`.

An explicit wish is obeyed or refused with all reasons. "auto" takes the torch path on every device
but CUDA; on CUDA it warns once per op and set of reasons when the kernels cannot take a case.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch.utils._pytree import tree_flatten

from . import runtime
from ._checks import require_choice
from ._errors import named_errors
from ._launch import is_recording
from .runtime import carries_tangents, forward_ad_runs

Impl = Literal["auto", "triton", "torch"]
Reasons = Callable[..., list[str]]
_Function = TypeVar("_Function", bound=Callable[..., Any])

IMPLS = ("auto", "triton", "torch")
MIN_CAPABILITY = (8, 0)
_warned: set[tuple[str, ...]] = set()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def kernels_interpreted() -> bool:
    """Return whether triton decorated our kernels for its interpreter, so that they run on CPU."""
    if not has_triton():
        return False
    from ._triton import tiles

    return tiles.INTERPRETED


def interpreter_reasons() -> list[str]:
    """List the reasons why triton's interpreter cannot run with what is installed here."""
    import numpy as np
    import triton

    if _release(triton.__version__) < (3, 7) and _release(np.__version__) >= (2, 4):
        return [
            f"the interpreter of triton {triton.__version__} needs numpy below 2.4, "
            f"got numpy {np.__version__} (pip install 'numpy<2.4', or triton 3.7.1 or later)"
        ]
    return []


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def constant_while_traced(function: _Function) -> _Function:
    """Have torch.compile call a function while it traces, and take the result as a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but imports all of torch._dynamo,
    and with it triton, for that.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_traced
def machine_reasons(device_type: str, index: int | None) -> list[str]:
    """List the reasons why no kernel of ours can run on this device, whatever the arguments."""
    if not has_triton():
        on_linux = sys.platform == "linux"
        hint = " (pip install triton)" if on_linux else ", and is released for Linux only"
        return [f"triton is not installed{hint}"]
    if device_type == "cpu":
        if is_recording():
            return []
        if kernels_interpreted():
            return interpreter_reasons()
        return ["the tensors are on cpu and the kernels run on CUDA devices"]
    if device_type != "cuda":
        return [f"the tensors are on {device_type} and the kernels run on CUDA devices"]
    if torch.version.hip is not None:
        return ["the kernels were never run on ROCm"]
    capability = _capability(index)
    if capability < MIN_CAPABILITY:
        return [f"compute capability {capability} is below {MIN_CAPABILITY}"]
    return []


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def use_triton(
    op: str,
    impl: Impl,
    device: torch.device,
    unsupported: Reasons,
    declined: Reasons | None = None,
    **arguments: Any,
) -> bool:
    """Decide between the kernels (True) and the torch path (False).

    Args:
        op: public name of the op, for messages.
        impl: the caller's wish.
        device: where the op's tensors live.
        unsupported: `config.unsupported_reasons` of the op; called with `arguments`.
        declined: the op's reasons to prefer the torch path although (or because) a library does
            the case better. "auto" then takes the torch path and nothing warns.
        arguments: the public arguments of the op.

    Raises:
        ValueError: `impl` is none of the three.
        NotImplementedError: impl="triton" and some reason speaks against it; lists all.
    """
    require_choice("impl", impl, IMPLS)
    if impl == "torch" or (impl == "auto" and not runtime.on_gpu(device)):
        return False
    reasons = machine_reasons(device.type, device.index) + unsupported(**arguments)
    if forward_ad_runs():
        reasons += transform_reasons(arguments)
    if impl == "triton":
        if reasons:
            raise NotImplementedError(_refusal(op, reasons))
        return True
    if declined is not None and declined(**arguments):
        return False
    if reasons:
        _warn_once(op, reasons)
    return not reasons


def transform_reasons(arguments: dict[str, Any]) -> list[str]:
    """List the reasons why the kernels cannot serve what differentiates this call."""
    tensors, _ = tree_flatten(arguments)
    if carries_tangents(*(x for x in tensors if isinstance(x, torch.Tensor))):
        return ["forward-mode AD asks for a derivative that only impl='torch' has"]
    return []


def without_kernel(op: str, impl: Impl, device: torch.device) -> None:
    """The dispatch of an op that has a torch path only."""
    require_choice("impl", impl, IMPLS)
    if impl == "triton":
        raise NotImplementedError(_refusal(op, [*machine_reasons(device.type, None), NO_KERNEL]))


NO_KERNEL = "this op has no Triton kernel yet"


@named_errors
def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """List the reasons why a call would not run our Triton kernels; empty if it would.

    Args:
        op: a public op of `stlm_kernels`, or its name.
        args, kwargs: the arguments of the call, `impl` included.

    Returns: one sentence for each reason.
    Raises: ValueError for an op that does not exist; TypeError for arguments that do not fit its
        signature.

    >>> ids, boundaries = torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.int32)
    >>> explain(byte_pool, ids, torch.ones(256, 8), boundaries, impl="torch")[0]
    "impl='torch' was asked for"
    """
    name = op if isinstance(op, str) else op.__name__
    package = f"{__package__}.ops.{name}"
    if not name.isidentifier() or importlib.util.find_spec(package) is None:
        raise ValueError(f"op: expected a public op, got {name!r}")
    function = getattr(importlib.import_module(package), name)
    arguments = inspect.signature(function).bind(*args, **kwargs)
    arguments.apply_defaults()
    impl = arguments.arguments.pop("impl")
    require_choice("impl", impl, IMPLS)
    return _reasons_against(package, impl, arguments.arguments)


def _reasons_against(package: str, impl: Impl, arguments: dict[str, Any]) -> list[str]:
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    reasons = machine_reasons(device.type, device.index)
    if impl == "torch":
        reasons = ["impl='torch' was asked for", *reasons]
    if impl == "auto" and device.type == "cpu" and not reasons:
        reasons = ["impl='auto' takes the torch path on cpu tensors"]
    if importlib.util.find_spec(f"{package}.config") is None:
        return [*reasons, NO_KERNEL]
    config = importlib.import_module(f"{package}.config")
    declined = getattr(config, "declined_reasons", None)
    if declined is not None and impl == "auto":
        reasons = reasons + declined(**arguments)
    reasons = reasons + config.unsupported_reasons(**arguments) + transform_reasons(arguments)
    return list(dict.fromkeys(reasons))


def _refusal(op: str, reasons: list[str]) -> str:
    return f"{op}: impl='triton' cannot run this call: " + "; ".join(reasons)


def _warn_once(op: str, reasons: list[str]) -> None:
    key = (op, *reasons)
    if key in _warned or torch.compiler.is_compiling():
        return
    _warned.add(key)
    text = f"{op}: taking the torch path: " + "; ".join(reasons)
    warnings.warn(text, RuntimeWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The `stacklevel` of the first frame outside this package, for a warning of our caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__package__", "").startswith(
        "stlm_kernels"
    ):
        level, frame = level + 1, frame.f_back
    return level
