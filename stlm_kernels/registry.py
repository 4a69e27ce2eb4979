"""Every op, one line each: tests, benchmarks, tuning and inspection iterate over `OPS`."""

from __future__ import annotations

from ._spec import OpSpec
from .ops.attention import cases as attention
from .ops.byte_pool import cases as byte_pool
from .ops.find_patches import cases as find_patches
from .ops.linear_cross_entropy import cases as linear_cross_entropy
from .ops.linear_logprobs import cases as linear_logprobs
from .ops.linear_sample import cases as linear_sample
from .ops.patch_attention import cases as patch_attention
from .ops.segment_pool import cases as segment_pool
from .ops.unpool import cases as unpool

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        byte_pool.SPEC,
        segment_pool.SPEC,
        find_patches.SPEC,
        unpool.SPEC,
        linear_logprobs.SPEC,
        linear_cross_entropy.SPEC,
        linear_sample.SPEC,
        patch_attention.SPEC,
        attention.SPEC,
    )
}
