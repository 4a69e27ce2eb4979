"""DTensors: the rows of a loss divided among processes, the weights whole on each.

The registered ops get a sharding strategy; the torch paths run on each process's own rows.
`torch.distributed.tensor` takes over a second to import, so this waits until other code has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._dispatch import constant_while_traced

ROW, SUM = "row", "sum"
"""Kinds of results: an entry for each row, or a sum over them."""

WHOLE_ROWS = "a DTensor whose every placement is Shard(0) or Replicate() (see redistribute)"


_waiting: list[tuple[Any, Callable[..., Any]]] = []


def is_dtensor(x: Any) -> bool:
    """Return whether x is a DTensor; there is none until its module has been imported."""
    return have_dtensors() and isinstance(x, torch.distributed.tensor.DTensor)


def have_dtensors() -> bool:
    """Return whether other code has imported DTensors."""
    return getattr(torch.distributed, "tensor", None) is not None


def register_rows(op: Any, per_row: Sequence[str], results: Sequence[str]) -> None:
    """Let a registered op run on DTensors: on each process for the rows it holds.

    The rule is registered when the first DTensor is seen.

    Args:
        op: the overload.
        per_row: names of the arguments with an entry for each row; every other tensor is whole.
        results: ROW or SUM for each.
    """
    divided = [argument.name in per_row for argument in op._schema.arguments]

    def strategies(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        # Plain numbers have no placement.
        tensors = [hasattr(x, "placements") for x in arguments]
        whole = [Replicate() if tensor else None for tensor in tensors]
        shards = [
            Shard(0) if rows and tensor else placement
            for rows, tensor, placement in zip(divided, tensors, whole, strict=True)
        ]
        return [
            ([Replicate() for _ in results], whole),
            ([Shard(0) if kind == ROW else Partial() for kind in results], shards),
        ]

    _waiting.append((op, strategies))


@constant_while_traced
def _register_waiting() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    while _waiting:
        op, strategies = _waiting.pop()
        register_sharding(op)(strategies)


def require_rows(input: Any, per_row: dict[str, Any], whole: dict[str, Any]) -> None:
    """ValueError unless plain tensors, or DTensors with divided rows and whole weights."""
    if not have_dtensors():
        return
    others = {name: x for name, x in (per_row | whole).items() if x is not None}
    if not is_dtensor(input):
        require_plain(**others)
        return
    from torch.distributed.tensor import Replicate

    _register_waiting()
    placements = input.placements
    allowed = all(p.is_replicate() or p.is_shard(0) for p in placements)
    _checks.require(allowed, "input", WHOLE_ROWS, placements)
    for name, x in others.items():
        rows = name in per_row
        expected = placements if rows else tuple(Replicate() for _ in placements)
        wanted = f"a DTensor on input's mesh with placements {expected}"
        _checks.require(is_dtensor(x), name, wanted, "a plain Tensor")
        fits = x.device_mesh == input.device_mesh and x.placements == expected
        _checks.require(fits, name, wanted, f"{x.placements} on {x.device_mesh}")


def require_plain(**tensors: Any) -> None:
    """ValueError for a DTensor, where an op has no rule for dividing its rows."""
    for name, x in tensors.items():
        if is_dtensor(x):
            raise ValueError(f"{name}: expected a plain Tensor, got a DTensor {x.placements}")


def own_part(
    rows: Any,  # (N, D)
    weight: Any,  # (V, D)
    bias: Any,  # (V,) or None
    *per_row: Any,  # (N, ...)
) -> tuple[Any, ...]:
    """Local part of each DTensor; gradients of the whole ones are summed by rows."""
    summed = _summed(rows)
    return (
        rows.to_local(),
        weight.to_local(grad_placements=summed),
        None if bias is None else bias.to_local(grad_placements=summed),
        *(x.to_local() for x in per_row),
    )


def from_own_part(result: Tensor, kind: str, rows: Any) -> Tensor:
    """A process's result for its own rows as a DTensor: 1-D by row, or 0-d and summed."""
    from torch.distributed.tensor import DTensor

    mesh = rows.device_mesh
    if kind == SUM:
        return DTensor.from_local(result, mesh, _summed(rows), run_check=False)
    count = rows.shape[:1]  # not equal shares
    return DTensor.from_local(
        result, mesh, rows.placements, run_check=False, shape=count, stride=(1,)
    )


def _summed(rows: Any) -> list[Any]:
    from torch.distributed.tensor import Partial

    return [Partial() if p.is_shard() else p for p in rows.placements]


def alike(grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Upstream gradients; beside DTensors autograd fills a missing one with plain zeros."""
    example = next((x for x in grads if is_dtensor(x)), None)
    if example is None:
        return tuple(grads)
    return tuple(x if is_dtensor(x) else torch.zeros_like(example) for x in grads)
