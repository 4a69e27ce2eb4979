"""Every op, one line each: tests, benchmarks, tuning and inspection iterate over `OPS`."""

from __future__ import annotations

from ._spec import OpSpec
from .ops.byte_pool import cases as byte_pool

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        byte_pool.SPEC,
    )
}
