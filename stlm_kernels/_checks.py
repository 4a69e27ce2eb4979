"""Argument checks of every public op, with one message form: name, expected, got.

Shapes, dtypes, devices and scalars are checked always. *Values* of tensors are checked only where
looking at them is free of a device synchronisation and of graph breaks: see
`runtime.values_visible`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

ID_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
OFFSET_DTYPES = (torch.int32,)
KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*KERNEL_FLOATS, torch.float64)


_WEIGHT_DTYPES = {x: (x, torch.float32) for x in (torch.bfloat16, torch.float16)}


MOST_SIGNATURES = 1024
"""Signatures that one check keeps; texts of ever new lengths begin anew then."""
_OPTIONS = frozenset((int, float, bool, str))
_NEW = object()
_Check = TypeVar("_Check", bound=Callable[..., Any])


def once_per_signature(check: _Check) -> _Check:
    """Run a check once for all calls of the same shapes, dtypes, devices and options.

    Args:
        check: takes all by position, looks at nothing else but autocast, and gives what may be
            given again.
    """
    kept: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(check)
    def call(*args: Any) -> Any:
        signature = None if torch.compiler.is_compiling() else _signature(args)
        if signature is None:
            return check(*args)
        found = kept.get(signature, _NEW)  # hashing shapes and devices takes as long as reading
        if found is _NEW:
            found = check(*args)
            if len(kept) >= MOST_SIGNATURES:
                kept.clear()
            kept[signature] = found
        return found

    return cast(_Check, call)


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return what shape checks look at, or None for arguments that it does not sum up."""
    entries: list[Any] = []
    if torch._C._is_any_autocast_enabled():
        entries += map(torch.is_autocast_enabled, ("cuda", "cpu"))
    for x in args:
        if x is None:
            entries.append(x)
            continue
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            entries += (x.shape, x.dtype, x.device)
        elif kind in _OPTIONS:
            entries += (kind, x)  # 1 and True are equal
        else:
            return None
    return tuple(entries)


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
    """Refuse a scale of attention's products that is neither None nor a finite number."""
    ok = value is None or is_finite(value)
    require_number(ok, "scale", "None or a finite number", value)


def require_softcap(value: Any) -> None:
    """Refuse a bound of scores or logits that is neither None nor a finite number > 0."""
    ok = value is None or (is_number(value) and 0 < value < math.inf)
    require_number(ok, "softcap", "None or a finite number > 0", value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a number is finite, by comparing: a traced number has no math.isfinite."""
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
    if not isinstance(x, Tensor):
        require(False, name, "a Tensor", type(x).__name__)
    if not _fits(x.shape, shape):
        wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
    require_dtype(name, x, dtypes)
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def require_dtype(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {wanted}, got {str(x.dtype)[6:]}")


def _fits(have: Sequence[int], want: Sequence[int | str]) -> bool:
    if len(have) != len(want):
        return False
    for size, wanted in zip(have, want, strict=True):  # a generator would cost more than the rest
        if type(wanted) is not str and size != wanted:
            return False
    return True


def require_ids(name: str, ids: Any, device: torch.device | None = None) -> None:
    """1-D ids of any accepted integer type."""
    require_tensor(name, ids, ("T",), ID_DTYPES, device)


def require_offsets(name: str, offsets: Any, device: torch.device) -> None:
    """1-D int32 prefix sums with at least one entry."""
    require_tensor(name, offsets, ("n+1",), OFFSET_DTYPES, device)
    require(offsets.shape[0] >= 1, name, "at least 1 entry", "0 entries")


def dtype_reasons(name: str, x: Tensor) -> list[str]:
    """List why the kernels cannot take the dtype of an argument; empty if they can."""
    if x.dtype in KERNEL_FLOATS:
        return []
    return [f"{name} is {x.dtype}; the kernels take float32, bfloat16 and float16"]


def weight_dtypes(activation: torch.dtype) -> tuple[torch.dtype, ...]:
    """A weight has the activation's dtype, or fp32 beside a 16-bit activation."""
    return _WEIGHT_DTYPES.get(activation) or (activation,)


def check_id_values(name: str, ids: Tensor, low: int, high: int) -> None:
    """IndexError unless low <= ids < high; reads the values, so on a GPU it synchronises."""
    if _are_known(ids, low, high) or ids_within(ids, low, high):
        return
    wide = ids.long().flatten()
    position = int(((wide < low) | (wide > high - 1)).nonzero()[0])
    raise IndexError(
        f"{name}: expected values in [{low}, {high - 1}], got {int(wide[position])} "
        f"at position {position}"
    )


known_ids: ContextVar[tuple[Tensor, int] | None] = ContextVar("known_ids", default=None)
"""Contiguous ids and the vocabulary that they are known to lie in: see `runtime.checked_ids`."""


def _are_known(ids: Tensor, low: int, high: int) -> bool:
    """Return whether ids are a contiguous part of those that were checked for a narrower range."""
    known = known_ids.get()
    if known is None:
        return False
    whole, vocab = known
    if low > 0 or high < vocab or ids.dtype != whole.dtype or not ids.is_contiguous():
        return False
    offset = ids.data_ptr() - whole.data_ptr()
    return 0 <= offset <= whole.nbytes - ids.nbytes


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
