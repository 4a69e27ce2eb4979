"""Spills that the ahead-of-time lane accepts, with the reason, by release of triton."""

from __future__ import annotations

Spills = dict[tuple[str, int], tuple[int, str]]
"""(kernel, architecture) -> the most spill instructions in any case and dtype, and why they are
accepted."""

READS_TWICE = (
    "half the default's rows have few or none, but read the table twice as often on sm_90, "
    "for which it is sized"
)
SIZED_FOR_90 = "the default tile fills the registers of sm_90; no other was tried on this device"
FP32 = "in fp32 alone, which no matrix unit serves"
PINNED: Spills = {
    ("stlm_byte_pool_fwd_product", 90): (
        69,
        "136 bytes, with checks of ids; tiles of half the patches have none, but cost more",
    ),
    ("stlm_byte_pool_fwd_product", 100): (20, "with checks of ids, as on sm_90"),
    ("stlm_byte_pool_bwd", 100): (11, FP32),
    ("stlm_attention_fwd", 80): (12, FP32),
    ("stlm_attention_bwd_q", 80): (27, SIZED_FOR_90),
    ("stlm_attention_bwd_q", 100): (10, f"at K = 128; {SIZED_FOR_90}"),
    ("stlm_attention_bwd_kv", 80): (29, SIZED_FOR_90),
    ("stlm_attention_bwd_kv", 100): (8, f"at K = 128; {SIZED_FOR_90}"),
    ("stlm_patch_attention_bwd_q", 80): (
        97,
        "at K = 128; tiles of 32 rows have none, but a Hopper product takes 64",
    ),
    ("stlm_patch_attention_bwd_q", 100): (4, FP32),
    ("stlm_patch_attention_short_fwd", 100): (14, SIZED_FOR_90),
    ("stlm_patch_attention_short_bwd", 90): (13, FP32),
    ("stlm_patch_attention_short_bwd", 80): (3, f"12 bytes, at K = 16; {SIZED_FOR_90}"),
    ("stlm_patch_attention_short_bwd", 100): (7, SIZED_FOR_90),
    ("stlm_patch_attention_bwd_kv", 100): (28, SIZED_FOR_90),
    ("stlm_linear_sample_fwd", 100): (9, f"16 bytes, {FP32}"),
    ("stlm_linear_logprobs_fwd", 90): (
        12,
        "under autocast with fp32 rows, which are cast on the way; 6 in fp32",
    ),
    ("stlm_linear_logprobs_fwd", 100): (732, READS_TWICE),
    ("stlm_linear_logprobs_dlogits", 90): (18, "at D = 512 in fp16, none in bf16; 2 in fp32"),
    ("stlm_qkv_rope_fwd", 90): (4, f"16 bytes, with a gain, {FP32}"),
    ("stlm_qkv_rope_bwd", 90): (
        9,
        "16 bytes, at D = 256; storing the rows' norm instead has none and moves 33 MB more",
    ),
    ("stlm_linear_logprobs_bwd_weight", 80): (
        2,
        "8 bytes, under autocast; the default tile is sized for sm_90",
    ),
    ("stlm_swiglu_bwd_weights", 90): (
        26,
        "48 bytes, addresses at D = 256; a smaller tile reads the rows from L2 twice as often",
    ),
    ("stlm_swiglu_bwd_weights", 100): (166, SIZED_FOR_90),
    ("stlm_swiglu_fwd", 100): (28, SIZED_FOR_90),
}
"""Spills of the pinned triton."""

SIZED_FOR_PINNED = "none in the pinned triton, for whose assembler the tile is sized"
FEWER_IN_PINNED = "fewer in the pinned triton, for whose assembler the tile is sized"
OTHERS: dict[str, Spills] = {
    "3.6": {
        ("stlm_linear_sample_fwd", 90): (9, f"16 bytes, {FP32}; {SIZED_FOR_PINNED}"),
        ("stlm_qkv_rope_bwd", 90): (15, f"24 bytes, at D = 256; {FEWER_IN_PINNED}"),
        ("stlm_swiglu_fwd", 90): (2, f"8 bytes, at D = 256; {SIZED_FOR_PINNED}"),
        ("stlm_swiglu_bwd_weights", 90): (27, f"48 bytes, at D = 256; {FEWER_IN_PINNED}"),
        ("stlm_attention_bwd_kv", 90): (36, f"at K = 48, most under autocast; {SIZED_FOR_PINNED}"),
        ("stlm_attention_bwd_q", 90): (27, f"at K = 64, with documents; {SIZED_FOR_PINNED}"),
        ("stlm_linear_logprobs_fwd", 90): (
            7,
            f"28 bytes, with class weights under autocast; {SIZED_FOR_PINNED}",
        ),
    },
    "3.8": {
        ("stlm_attention_fwd", 90): (
            20,
            f"32 bytes, at K = 64, with a window; 5 at K = 48, {FP32}; {SIZED_FOR_PINNED}",
        ),
        ("stlm_linear_logprobs_bwd_weight", 90): (
            4,
            f"16 bytes, with class weights, {FP32}; {SIZED_FOR_PINNED}",
        ),
    },
    "3.9": {
        ("stlm_byte_pool_fwd_product", 90): (86, f"168 bytes, {FEWER_IN_PINNED}"),
        ("stlm_byte_pool_bwd", 90): (6, f"16 bytes, at D = 768, {FP32}; {SIZED_FOR_PINNED}"),
        ("stlm_linear_logprobs_fwd", 90): (326, f"736 bytes, at D = 128; {SIZED_FOR_PINNED}"),
        ("stlm_linear_logprobs_dlogits", 90): (204, f"432 bytes, at D = 512; {SIZED_FOR_PINNED}"),
        ("stlm_linear_logprobs_bwd", 90): (10, f"16 bytes, at D = 128; {SIZED_FOR_PINNED}"),
        ("stlm_attention_fwd", 90): (30, f"64 bytes, with a window; {SIZED_FOR_PINNED}"),
        ("stlm_swiglu_bwd_weights", 90): (128, f"280 bytes, at D = 256; {FEWER_IN_PINNED}"),
        ("stlm_ema_unpool_smooth", 90): (2, f"8 bytes; {SIZED_FOR_PINNED}"),
        ("stlm_segment_pool_bwd", 90): (2, f"8 bytes, under autocast; {SIZED_FOR_PINNED}"),
        ("stlm_attention_bwd_q", 90): (20, f"at K = 64, with a window; {SIZED_FOR_PINNED}"),
        ("stlm_qk_norm_rope_bwd", 90): (3, f"8 bytes, interleaved; {SIZED_FOR_PINNED}"),
        ("stlm_decode_attention_fwd", 90): (2, f"8 bytes, under autocast; {SIZED_FOR_PINNED}"),
        ("stlm_linear_logprobs_bwd_weight", 90): (
            4,
            f"16 bytes, under autocast; {SIZED_FOR_PINNED}",
        ),
    },
}
"""Bounds in place of those above, for releases that have more, or others."""


def accepted(triton_version: str) -> Spills:
    """The bounds of a release; one that is not listed is held to the pinned one's."""
    release = ".".join(triton_version.split(".")[:2])
    return PINNED | OTHERS.get(release, {})
