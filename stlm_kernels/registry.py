"""Every op, one line each: tests, benchmarks, tuning and inspection iterate over `OPS`."""

from __future__ import annotations

from .ops.attention import cases as attention
from .ops.attention_pool import cases as attention_pool
from .ops.byte_pool import cases as byte_pool
from .ops.decode_attention import cases as decode_attention
from .ops.ema_unpool import cases as ema_unpool
from .ops.find_patches import cases as find_patches
from .ops.linear_cross_entropy import cases as linear_cross_entropy
from .ops.linear_kl_div import cases as linear_kl_div
from .ops.linear_logprobs import cases as linear_logprobs
from .ops.linear_sample import cases as linear_sample
from .ops.ngram_embedding import cases as ngram_embedding
from .ops.patch_attention import cases as patch_attention
from .ops.qk_norm_rope import cases as qk_norm_rope
from .ops.qkv_rope import cases as qkv_rope
from .ops.segment_pool import cases as segment_pool
from .ops.swiglu import cases as swiglu
from .ops.unpool import cases as unpool
from .spec import OpSpec

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        byte_pool.SPEC,
        segment_pool.SPEC,
        attention_pool.SPEC,
        ngram_embedding.SPEC,
        find_patches.SPEC,
        unpool.SPEC,
        ema_unpool.SPEC,
        linear_logprobs.SPEC,
        linear_cross_entropy.SPEC,
        linear_kl_div.SPEC,
        linear_sample.SPEC,
        attention.SPEC,
        patch_attention.SPEC,
        qk_norm_rope.SPEC,
        qkv_rope.SPEC,
        swiglu.SPEC,
        decode_attention.SPEC,
    )
}
