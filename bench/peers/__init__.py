"""Peers of each op: compositions in plain PyTorch, written by us, and other libraries.

A peer gets its inputs in the form that suits it best (`convert` is not timed): ids in the dtype it
is fastest with, the patch of each byte where it needs one. It must compute what the op computes.
"""

from __future__ import annotations

from . import (
    attention,
    attention_pool,
    byte_pool,
    decode_attention,
    ema_unpool,
    find_patches,
    linear_cross_entropy,
    linear_sample,
    ngram_embedding,
    patch_attention,
    qk_norm_rope,
    qkv_rope,
    segment_pool,
    swiglu,
    unpool,
)
from .entry import Entry

PEERS: dict[str, tuple[Entry, ...]] = {
    **attention.PEERS,
    **attention_pool.PEERS,
    **byte_pool.PEERS,
    **decode_attention.PEERS,
    **ema_unpool.PEERS,
    **find_patches.PEERS,
    **linear_cross_entropy.PEERS,
    **linear_sample.PEERS,
    **ngram_embedding.PEERS,
    **patch_attention.PEERS,
    **qk_norm_rope.PEERS,
    **qkv_rope.PEERS,
    **segment_pool.PEERS,
    **swiglu.PEERS,
    **unpool.PEERS,
}
"""Entries of each op, by its name."""
