"""State of a call while an op or a module runs: whether values can be read, dtypes, transforms.

Public: models built on the ops ask the same questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks

PLAIN = (Tensor, torch.nn.Parameter)
"""Classes of tensors that torch itself makes, without a `__torch_dispatch__` of their own."""
VALUES = frozenset((int, float, bool, type(None), torch.dtype))
"""Classes of plain arguments: to ask whether one of them is a Tensor takes longer."""
_PLAIN_ARGUMENTS = VALUES.union(PLAIN)
_BATCHED_GRADIENTS: Any = torch._C._parse_dispatch_key("VmapMode")
"""Key of the block in which autograd takes gradients many at a time (`is_grads_batched`)."""


def on_gpu(device: torch.device) -> bool:
    """Return whether ops on this device are launches of kernels, so that few of them are better."""
    return device.type == "cuda"


def values_visible(*tensors: Tensor) -> bool:
    """Return whether reading values is free: plain CPU tensors, eager, outside torch.func."""
    for x in tensors:  # a generator costs more than all the rest here
        if not x.is_cpu:
            return False
    return values_readable(*tensors)


def values_readable(*tensors: Tensor) -> bool:
    """Return whether values can be read, on a GPU at the price of a synchronisation.

    Shapes alone (the meta device, a FakeTensorMode), graphs and transforms have none.
    """
    if torch.compiler.is_compiling() or inside_torch_func() or _is_traced_by_fx():
        return False
    return not any(type(x) not in PLAIN or x.is_meta or _is_batched(x) for x in tensors)


def check_ids(ids: Tensor, vocab: int, name: str = "byte_ids") -> None:
    """Check ids on any device, on demand: the ops themselves look at CPU values only.

    Args:
        ids: integer tensor of any shape. On a GPU this call synchronises.
        vocab: ids must lie in [0, vocab).
        name: what the message calls them.

    Raises:
        IndexError: with the range, the first bad value and its position.
        ValueError: the dtype is none that the ops take.
    """
    _checks.require(isinstance(ids, Tensor), name, "a Tensor", type(ids).__name__)
    _checks.require(
        ids.dtype in _checks.ID_DTYPES, name, "uint8, int16, int32 or int64 ids", ids.dtype
    )
    _checks.check_id_values(name, ids, 0, vocab)


@contextmanager
def checked_ids(ids: Tensor, vocab: int, name: str = "byte_ids") -> Iterator[None]:
    """Check ids once for all ops and modules within the block, which must not change them.

    Where values are not visible nothing is checked, here or there.

    Args:
        ids, vocab, name: as in `check_ids`.

    Raises:
        IndexError, ValueError: as `check_ids`.
    """
    if not values_visible(ids):
        yield
        return
    check_ids(ids, vocab, name)
    token = _checks.known_ids.set((ids, vocab) if ids.is_contiguous() else None)
    try:
        yield
    finally:
        _checks.known_ids.reset(token)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products with x have: autocast's where it rules x, else x's own.

    Autocast never touches fp64, nor shapes alone (the meta device).
    """
    if _is_autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def activation_dtypes(activation: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes that a second activation may have: the first one's; under autocast any it casts."""
    if _is_autocast(activation):
        return _checks.KERNEL_FLOATS
    return (activation.dtype,)


def _is_autocast(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64 or x.is_meta:
        return False
    return torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block that chooses the dtypes of its products itself."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()  # an autocast costs as much as a small product
    return torch.autocast(x.device.type, enabled=False)


def is_plain_eager(*arguments: Any) -> bool:
    """Return whether nothing but the call itself would see what happens between these arguments:
    no mode, transform, trace or profiler is on, and none of them is of a class of its own.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS)
    ):
        return False
    return _PLAIN_ARGUMENTS.issuperset(map(type, arguments))


def inside_torch_func() -> bool:
    """Return whether a torch.func transform runs (False while compiling, whatever runs)."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def carries_tangents(*tensors: Tensor | None) -> bool:
    """Return whether forward-mode AD may ask for a derivative: for tensors with a tangent, and in
    any torch.func transform within torch.func.jvp or what is built on it.

    Custom Functions have no such derivative here; a plain composition has.
    """
    if not forward_ad_runs():
        return False
    if inside_torch_func():
        return True
    return any(x is not None and has_tangent(x) for x in tensors)


def forward_ad_runs() -> bool:
    """Return whether a level of forward-mode AD is entered, where tangents may be."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def has_tangent(x: Tensor) -> bool:
    """Return whether a tensor has a tangent of forward-mode AD."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def needs_composition(*tensors: Tensor | None) -> bool:
    """Return whether only ops that torch differentiates itself will do, and none in place."""
    return inside_torch_func() or carries_tangents(*tensors)


def many_at_once(*grads: Tensor) -> bool:
    """Return whether gradients come many at a time, by `is_grads_batched` or by torch.func.vmap."""
    return inside_torch_func() or any(map(_is_batched, grads))


def _is_traced_by_fx() -> bool:
    """Return whether make_fx, or torch.func.linearize, traces: a value read would be a constant."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


_is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Test for gradients that autograd takes many at a time (`is_grads_batched`), by no torch.func."""
