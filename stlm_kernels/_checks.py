"""Argument checks of every public op, with one message form: name, expected, got.

Shapes, dtypes, devices and scalars are checked always. *Values* of tensors are checked only where
looking at them is free of a device synchronisation and of graph breaks: see `values_visible`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ID_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*KERNEL_FLOATS, torch.float64)


def require(ok: bool, name: str, expected: str, got: Any) -> None:
    """Raise the project's ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def require_number(ok: bool, name: str, expected: str, value: Any) -> None:
    """`require`, with the repr of what was given made late: a number that is traced has none."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: expected one of {wanted}, got {value!r}")


def require_int(name: str, value: Any) -> None:
    if not _is_int(value):  # a traced int has no repr to prepare
        raise ValueError(f"{name}: expected an int, got {value!r}")


def require_int_at_least(name: str, value: Any, minimum: int) -> None:
    if not (_is_int(value) and value >= minimum):
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value!r}")


def require_int64(name: str, value: Any) -> None:
    if not (_is_int(value) and -(2**63) <= value < 2**63):
        raise ValueError(f"{name}: expected an int in [-2^63, 2^63 - 1], got {value!r}")


def require_scale(value: Any) -> None:
    """Of attention's products: a finite number, or None for the default."""
    ok = value is None or is_finite(value)
    require_number(ok, "scale", "None or a finite number", value)


def require_softcap(value: Any) -> None:
    """Of scores or logits: a bound, or None for none."""
    ok = value is None or (is_number(value) and 0 < value < math.inf)
    require_number(ok, "softcap", "None or a finite number > 0", value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for a finite number; a comparison, as a traced number knows no math.isfinite."""
    return is_number(value) and -math.inf < value < math.inf


def _is_int(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def require_tensor(
    name: str,
    x: Any,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """`shape` holds a size, or a letter for a size that is free."""
    require(isinstance(x, Tensor), name, "a Tensor", type(x).__name__)
    fits = x.ndim == len(shape)
    if fits:
        for have, want in zip(x.shape, shape, strict=True):
            fits = fits and (isinstance(want, str) or have == want)
    if not fits:
        wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {wanted}, got {str(x.dtype)[6:]}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def require_ids(name: str, ids: Any, device: torch.device | None = None) -> None:
    """1-D ids of any accepted integer type."""
    require_tensor(name, ids, ("T",), ID_DTYPES, device)


def require_offsets(name: str, offsets: Any, device: torch.device) -> None:
    """1-D int32 prefix sums with at least one entry."""
    require_tensor(name, offsets, ("n+1",), (torch.int32,), device)
    require(offsets.shape[0] >= 1, name, "at least 1 entry", "0 entries")


def weight_dtypes(activation: torch.dtype) -> tuple[torch.dtype, ...]:
    """A weight has the activation's dtype, or fp32 beside a 16-bit activation."""
    if activation in (torch.bfloat16, torch.float16):
        return (activation, torch.float32)
    return (activation,)


def activation_dtypes(activation: Tensor) -> tuple[torch.dtype, ...]:
    """What a second activation may have: the first one's dtype; under autocast any it rounds."""
    if _is_autocast(activation):
        return KERNEL_FLOATS
    return (activation.dtype,)


def output_dtype(activation: Tensor) -> torch.dtype:
    """The activation's dtype; under autocast the autocast dtype (fp64 is never touched)."""
    if _is_autocast(activation):
        return torch.get_autocast_dtype(activation.device.type)
    return activation.dtype


def _is_autocast(x: Tensor) -> bool:
    if x.dtype == torch.float64 or x.is_meta:  # there is no autocast of shapes alone
        return False
    return torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block that chooses the dtypes of its products itself."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()  # an autocast costs as much as a small product
    return torch.autocast(x.device.type, enabled=False)


def inside_torch_func() -> bool:
    """True while a torch.func transform runs (and False while compiling, whatever runs)."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def carries_tangents(*tensors: Tensor | None) -> bool:
    """True where forward-mode AD may ask for a derivative: for tensors with a tangent, and in any
    torch.func transform within torch.func.jvp or what is built on it.

    Custom Functions have no such derivative here; a plain composition has.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    if inside_torch_func():
        return True
    return any(x is not None and has_tangent(x) for x in tensors)


def has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def needs_composition(*tensors: Tensor | None) -> bool:
    """True where only ops that torch differentiates itself will do, and none in place."""
    return inside_torch_func() or carries_tangents(*tensors)


def as_output(x: Tensor) -> Tensor:
    """What a Function's forward returns where it may have been written in place.

    Compiled by torch 2.11, such a tensor itself has gradients of zero; a view of it has them right.
    """
    return x.view_as(x) if torch.compiler.is_compiling() else x


def values_visible(*tensors: Tensor) -> bool:
    """True where reading values is free: plain CPU tensors, eager, outside torch.func."""
    for x in tensors:  # a generator costs more than all the rest here
        if not x.is_cpu:
            return False
    return values_readable(*tensors)


def values_readable(*tensors: Tensor) -> bool:
    """True where values can be read, on a GPU at the price of a synchronisation.

    Shapes alone (the meta device, a FakeTensorMode), graphs and transforms have none.
    """
    if torch.compiler.is_compiling() or inside_torch_func() or _is_traced_by_fx():
        return False
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or _is_batched(x):
            return False
    return True


def _is_traced_by_fx() -> bool:
    """True within make_fx, and so within torch.func.linearize: a value read would be a constant."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def many_at_once(*grads: Tensor) -> bool:
    """True for gradients taken many at a time, by `is_grads_batched` or by torch.func.vmap."""
    return inside_torch_func() or any(map(_is_batched, grads))


_is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Of gradients that autograd takes many at a time (`is_grads_batched`), by no torch.func."""


def check_id_values(name: str, ids: Tensor, low: int, high: int) -> None:
    """IndexError unless low <= ids < high; reads the values, so on a GPU it synchronises."""
    if ids_within(ids, low, high):
        return
    wide = ids.long().flatten()
    position = int(((wide < low) | (wide > high - 1)).nonzero()[0])
    raise IndexError(
        f"{name}: expected values in [{low}, {high - 1}], got {int(wide[position])} "
        f"at position {position}"
    )


def ids_within(ids: Tensor, low: int, high: int) -> bool:
    if ids.numel() == 0 or (ids.dtype == torch.uint8 and low <= 0 and high > 255):
        return True
    smallest, largest = torch.aminmax(ids)
    return int(smallest) >= low and int(largest) < high


def check_offset_values(name: str, offsets: Tensor, total: int) -> int:
    """The last entry; ValueError unless they start at 0, never decrease and end by `total`."""
    values = offsets.numpy()  # a view; ten times cheaper than torch on a few thousand entries
    require(values[0] == 0, name, "first entry 0", values[0])
    falls = values[1:] < values[:-1]
    if falls.any():
        position = int(falls.argmax()) + 1
        raise ValueError(
            f"{name}: expected non-decreasing entries, got {values[position]} "
            f"after {values[position - 1]} at position {position}"
        )
    last = int(values[-1])
    if last > total:
        raise ValueError(f"{name}: expected last entry <= {total}, got {last}")
    return last


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Queries and a factor > 0 of the same scores; None is K^-0.5.

    The kernels and stock attention under a mask, which they scale as well, want no other.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if factor > 0:
        return q, factor
    return q * (-1 if factor < 0 else 0), -factor or 1.0


def clamped_bounds(offsets: Tensor, total: int) -> Tensor:
    """Offsets made safe without looking at them: within [0, total] and non-decreasing."""
    return offsets.clamp(0, total).cummax(0).values
