"""Launches that a GPU would be given for what runs within a block, counted without a GPU.

Tensors have shapes and no values (`FakeTensorMode`), on a CPU that stands for a GPU. Each operator
of torch that computes counts as one launch, some as more, estimated by torch's CUDA code; a kernel
of ours counts where it is launched, which is exact. What waits for the device raises, unless a
number stands for the value that the host would read.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stlm_kernels import _launch, runtime
from stlm_kernels._library import NAMESPACE, launcher_of
from stlm_models.layers import TextMemory, attention, packing

FREE = frozenset((
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "device",
    "set_", "resize_", "lift_fresh", "_local_scalar_dense", "is_pinned", "_unsafe_view",
    "_reshape_alias", "record_stream", "is_same_size", "sym_size", "alias",
))  # fmt: skip
"""Operators that compute nothing."""
MORE = {
    "addmm": 2, "baddbmm": 2,  # the summand is copied to the result first
    "masked_fill": 2, "index_fill": 2,  # a copy, then in place
    "index_put": 2, "constant_pad_nd": 2, "repeat_interleave": 3,
    "embedding_dense_backward": 9,  # sorts the ids
    "nonzero": 4, "sort": 4, "unique_consecutive": 6, "cumsum": 2,
}  # fmt: skip
"""Launches of operators that take more than one."""
CHUNK, BLOCKS, MOST_TENSORS = 65536, 320, (110, 64, 48, 36, 30)
"""Multi-tensor kernels: elements of a block, blocks of a launch, tensors of one by lists."""


class Launches(TorchDispatchMode):
    """Counts launches by name; those of kernels of ours under the kernel's name."""

    def __init__(self, number: int | None, chosen: int | None) -> None:
        super().__init__()
        self.number, self.chosen = number, chosen
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def note(self, kernel: Any, *_: Any) -> None:
        self.by_name[kernel if isinstance(kernel, str) else kernel.fn.__name__] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            with self:
                return launcher_of(func)(*args, **kwargs)
        name = func._opname
        if name == "_local_scalar_dense" and self.number is not None:
            return self.number
        if self.chosen is not None and _has_size_by_value(name, args):
            out = _of_rows(name, args, self.chosen)
        else:
            out = func(*args, **kwargs)
        if not func.is_view and name not in FREE and _computes(args, out):
            self.by_name[name] += _count(name, args)
            if _has_size_by_value(name, args):
                self.by_name[name] += MORE["nonzero"]
        return out


def _has_size_by_value(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether the host waits for the size of a result."""
    if name == "index":
        return any(x is not None and x.dtype == torch.bool for x in args[1])
    return name in ("nonzero", "repeat_interleave") and len(args) == 1


def _of_rows(name: str, args: tuple[Any, ...], rows: int) -> Tensor:
    x: Tensor = args[0]
    if name == "index":
        return x.new_empty((rows, *x.shape[1:]))
    return x.new_empty((rows, x.dim()) if name == "nonzero" else rows, dtype=torch.int64)


def _computes(args: Any, out: Any) -> bool:
    """Return False where there is no element to work on."""
    tensors = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
    return any(x.numel() for x in tensors)


def _count(name: str, args: tuple[Any, ...]) -> int:
    if not name.startswith(("_foreach", "_fused_ada")):
        return MORE.get(name, 1)
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    depth = len(lists) + (0 if name.endswith("_") else 1)
    launches, tensors, blocks = 1, 0, 0
    for x in lists[0]:
        if tensors == MOST_TENSORS[depth - 1] or blocks >= BLOCKS:
            launches, tensors, blocks = launches + 1, 0, 0
        tensors, blocks = tensors + 1, blocks + -(-x.numel() // CHUNK)
        while blocks > BLOCKS:
            launches, blocks = launches + 1, blocks - BLOCKS
    return launches


class _FusedNorm(torch.autograd.Function):
    """F.rms_norm of a GPU: one kernel each way, where the CPU composes it."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[str], None], x: Tensor) -> Tensor:
        ctx.note = note
        note("_fused_rms_norm")
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.note("_fused_rms_norm_backward")
        return None, grads[0].new_empty(grads[0].shape)


@contextmanager
def counting(number: int | None = None, chosen: int | None = None) -> Iterator[Launches]:
    """Count the launches of the block, whose tensors must all be made within it.

    Args:
        number: what is read where the host waits for a value; None raises there.
        chosen: how many rows are found where it waits for their number; None raises there.
    """
    mode = Launches(number, chosen)

    def rms_norm(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.float()  # as autocast of a GPU does
        return _FusedNorm.apply(mode.note, x)

    def tables(length: int, head_dim: int, base: float, device: torch.device) -> list[Tensor]:
        return [torch.empty(length, head_dim // 2) for _ in range(2)]  # kept from other calls

    places: dict[tuple[Any, str], Any] = {
        (runtime, "on_gpu"): lambda device: True,
        (F, "rms_norm"): rms_norm,
        (packing, "rotary_tables"): tables,
        (attention, "rotary_tables"): tables,
        (TextMemory, "on_host"): lambda memory: np.zeros(memory.slots, np.int32),
        (nn.Module, "to"): lambda module, device: module,  # which is there already
    }
    before = {place: getattr(*place) for place in places}
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mode)
        stack.enter_context(_launch.recording(mode.note, _launch.H100))
        for place, value in places.items():
            setattr(*place, value)
        try:
            yield mode
        finally:
            for place, value in before.items():
                setattr(*place, value)
