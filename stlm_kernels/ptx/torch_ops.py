"""Bytes and FLOPs of torch's own operators between the launches.

Their machine code is not at hand, so they count by the least they could do: a product by its
FLOPs, and everything by the bytes of its tensors, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}
WITHOUT_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "set_", "resize_", "detach",
                "_local_scalar_dense", "lift_fresh", "is_pinned", "record_stream")  # fmt: skip


@dataclass(frozen=True)
class TorchOp:
    """One operator of torch.

    Args:
        name: such as "aten::mm".
        nbytes: of the tensors it reads and writes, each once.
        flops: of a product; 0 for others.
        kind: of the product's operands, as in `Device.matrix_tflops`.
    """

    name: str
    nbytes: int
    flops: int
    kind: str


class _Watch(TorchDispatchMode):
    def __init__(self, note: Callable[[TorchOp], None], skips_products: bool) -> None:
        super().__init__()
        self.note, self.skips_products = note, skips_products

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile compile, as it does outside of modes."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            with self:  # what an op of a library does inside counts, not the op itself
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        if func.is_view or func._opname in WITHOUT_WORK:
            return func(*args, **kwargs)
        flops_of = flop_registry.get(func.overloadpacket)
        if flops_of is not None and self.skips_products and not func._schema.is_mutable:
            out = _zeros_of(func, args, kwargs)
        elif flops_of is not None and self.skips_products and "out" in kwargs:
            out = kwargs["out"]
        else:
            out = func(*args, **kwargs)
        tensors = {x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        flops = 0 if flops_of is None else int(flops_of(*args, **kwargs, out_val=out))
        first = next((x for x in tree_leaves(args) if isinstance(x, Tensor)), None)
        kind = KINDS.get(first.dtype, "") if first is not None and flops else ""
        nbytes = sum(_touched_bytes(x) for x in tensors)
        self.note(TorchOp(f"aten::{func._opname}", nbytes, flops, kind))
        return out


def _touched_bytes(x: Tensor) -> int:
    """Bytes of a tensor's distinct elements: expanded dimensions count once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return x.itemsize * int(torch.Size(sizes).numel()) if x.numel() else 0


def _zeros_of(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """The result's shape without the product, which could take minutes on a CPU."""
    to_meta = lambda x: x.to("meta") if isinstance(x, Tensor) else x  # noqa: E731
    shapes = torch.utils._pytree.tree_map(to_meta, (args, kwargs))
    out = func(*shapes[0], **shapes[1])
    return torch.utils._pytree.tree_map(lambda x: torch.zeros_like(x, device="cpu"), out)


@contextmanager
def watching(note: Callable[[TorchOp], None], skips_products: bool) -> Iterator[None]:
    """Pass what torch's operators cost to `note`, in their order.

    Args:
        note: takes each operator that a GPU would launch a kernel for.
        skips_products: results of products are zeros: for executions of sampled blocks, whose
            values mean nothing.
    """
    with _Watch(note, skips_products):
        yield
