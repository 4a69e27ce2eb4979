"""Shapes of models by name, each with two twins: what pooling bytes must be worth.

`<name>-flat` reads the same bytes without patches, `<name>-word` the words of a vocabulary. A
comparison with a twin is fair when
- both have the same number of parameters, a tied table counted once (within 2%, a test sees to it);
- both train for the same minutes on the same machine, not for the same number of steps: what a
  position costs is part of what is compared;
- both read the same documents in rows of the same number of bytes, as many in a step; a row of
  words is as many ids as fill those bytes, about one for 4.5 bytes;
- the optimisers, their schedule and the tuning of their learning rates are the same;
- both are judged in bits per real byte of the same held-out text, every byte scored once and with
  the same bytes of context. Words must spell every text: nats of all ids / (ln 2 x bytes);
- the twin is as good as its kind allows at that size: full attention, heads of 64, no layer spent
  on what pooling needs.
"""

from __future__ import annotations

from dataclasses import replace

from .config import ModelConfig

BYTES_PER_WORD = 4.5
"""Of English text and of source code, roughly: words and what stands between them."""

NGRAMS = (2, 3, 4)
"""Of the pooled presets: bytes then know what ends at them, without a layer that finds out."""

_POOLED: dict[str, ModelConfig] = {
    "demo": ModelConfig(ngram_sizes=NGRAMS, byte_ngrams=True),
    "10m": ModelConfig(
        byte_dim=256,
        ngram_sizes=NGRAMS,
        byte_ngrams=True,
        decoder_heads=4,
        decoder_kv_heads=4,
        decoder_ff=512,
        decoder_window=256,
        core_layers=5,
        core_dim=384,
        core_heads=6,
        core_kv_heads=2,
        core_ff=960,
        context=4096,
    ),
    "50m": ModelConfig(
        byte_dim=256,
        ngram_sizes=NGRAMS,
        ngram_buckets=8192,
        byte_ngrams=True,
        decoder_layers=5,
        decoder_heads=4,
        decoder_kv_heads=4,
        decoder_ff=768,
        decoder_window=256,
        core_layers=16,
        core_dim=512,
        core_heads=8,
        core_kv_heads=2,
        core_ff=1408,
        context=8192,
    ),
    "100m": ModelConfig(
        byte_dim=256,
        ngram_sizes=NGRAMS,
        ngram_buckets=8192,
        byte_ngrams=True,
        decoder_layers=6,
        decoder_heads=4,
        decoder_kv_heads=4,
        decoder_ff=1024,
        decoder_window=256,
        core_layers=15,
        core_dim=768,
        core_heads=12,
        core_kv_heads=4,
        core_ff=2048,
        context=8192,
    ),
}


def _flat(pooled: str, width: int, layers: int, heads: int, kv_heads: int, ff: int) -> ModelConfig:
    """The twin that reads the bytes of a pooled preset one by one."""
    return ModelConfig(
        patch_rule="none",
        ngram_sizes=(),
        core_layers=0,
        byte_dim=width,
        decoder_layers=layers,
        decoder_heads=heads,
        decoder_kv_heads=kv_heads,
        decoder_ff=ff,
        decoder_window=None,
        context=_POOLED[pooled].context,
    )


def _words(
    pooled: str, vocab_size: int, width: int, layers: int, heads: int, kv_heads: int, ff: int
) -> ModelConfig:
    """The twin that reads words instead."""
    return replace(
        _flat(pooled, width, layers, heads, kv_heads, ff),
        tokens="words",
        vocab_size=vocab_size,
        context=round(_POOLED[pooled].context / BYTES_PER_WORD),
    )


_PAPER_BYTE = ModelConfig(
    tied=False,
    byte_dim=256,
    max_patch_len=12,
    encoder="patch",
    encoder_layers=4,
    encoder_heads=8,
    encoder_kv_heads=8,
    encoder_ff=512,
    ngram_sizes=(),
    core_layers=11,
    core_dim=512,
    core_heads=8,
    core_kv_heads=8,
    core_ff=1408,
    decoder_layers=7,
    decoder_heads=8,
    decoder_kv_heads=8,
    decoder_ff=512,
    decoder_window=None,
    output="parallel",
    context=4096,
)
"""The seed paper's order of things (arXiv 2405.14159) without its leaks and lost bytes: attention
inside patches of at most 12 bytes, their mean, a core, all bytes of the next patch at once, the
reconstruction. Its patches are tokens of GPT-2, whose borders depend on later bytes; here spaces
close them, and no byte is cut off.
"""

PRESETS: dict[str, ModelConfig] = {
    **_POOLED,
    "paper-byte": _PAPER_BYTE,
    "demo-flat": _flat("demo", 192, 4, 3, 3, 736),
    "10m-flat": _flat("10m", 384, 6, 6, 2, 1088),
    "50m-flat": _flat("50m", 512, 18, 8, 2, 1376),
    "100m-flat": _flat("100m", 768, 16, 12, 4, 2048),
    "demo-word": _words("demo", 8192, 128, 4, 2, 2, 704),
    "10m-word": _words("10m", 50257, 128, 20, 2, 2, 320),
    "50m-word": _words("50m", 50257, 512, 8, 8, 2, 1536),
    "100m-word": _words("100m", 50257, 768, 10, 12, 4, 2016),
}
"""By name; a tied table counts once towards the parameters that the name promises."""


def preset(name: str) -> ModelConfig:
    """The config of a preset, with a ValueError that lists them for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
