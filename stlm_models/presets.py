"""Shapes of models by name, each with two baselines, which pooling bytes must beat.

`<name>-flat` reads the same bytes without patches, `<name>-word` the words of a vocabulary. A
comparison with a baseline is fair when
- both have the same number of parameters, a tied table counted once (within 2%, a test sees to it);
- both train for the same minutes on the same machine, not for the same number of steps: what a
  position costs is part of what is compared;
- both read the same documents in rows of the same number of bytes, as many in a step; a row of
  words is as many ids as fill those bytes, about one for 4.5 bytes;
- the optimisers, their schedule and the tuning of their learning rates are the same;
- both are judged in bits per real byte of the same held-out text, every byte scored once and with
  the same bytes of context. Words must spell every text: nats of all ids / (ln 2 x bytes);
- what looks up repeats and remembered contexts serves the flat baseline too; of words, a table of
  what follows each would be larger than the model;
- the baseline is as good as its kind allows at that size: full attention, heads of 64, no layer
  spent on what pooling needs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .config import ModelConfig

BYTES_PER_WORD = 4.5
"""Mean length in English text and source code, roughly, of words and what is between them."""

NGRAMS = (2, 3, 4)
"""N-grams of pooled presets: bytes then know what ends at them, without a layer that finds out."""

_CORE = ("core_layers", "core_dim", "core_heads", "core_kv_heads", "core_ff")
_DECODER = (
    "decoder_layers",
    "byte_dim",
    "decoder_heads",
    "decoder_ff",
    "decoder_window",
    "decoder_kv_heads",
)
_LOOK_UPS: dict[str, Any] = {"match_sizes": (2, 4, 7), "memory_sizes": (2, 3, 4, 5, 6, 8, 12, 20)}
"""Repeats of the text at hand, and contexts of the training text: no layer then has to learn to
copy (docs/speedrun.md).
"""
_NGRAMS: dict[str, Any] = {"ngram_sizes": NGRAMS, "byte_ngrams": True, **_LOOK_UPS}
_LARGE_NGRAMS: dict[str, Any] = {**_NGRAMS, "ngram_buckets": 8192}
_PAPER: dict[str, Any] = {
    "tied": False,
    "max_patch_len": 12,
    "ngram_sizes": (),
    "output": "parallel",
    "encoder": "patch",
    "encoder_layers": 4,
    "encoder_heads": 8,
    "encoder_kv_heads": 8,
    "encoder_ff": 512,
}


def _shape(
    core: tuple[int, int, int, int, int],
    decoder: tuple[int, int, int, int, int | None],
    context: int,
    **others: Any,
) -> ModelConfig:
    """Return the config of these sizes.

    Args:
        core: layers, width, heads, key/value heads, feed-forward width.
        decoder: layers, width, heads, feed-forward width, window.
    """
    decoder_values = (*decoder, decoder[2])  # as many key/value heads as heads
    names, values = (*_CORE, *_DECODER), (*core, *decoder_values)
    sizes: dict[str, Any] = dict(zip(names, values, strict=True))
    return ModelConfig(context=context, **sizes, **others)


_POOLED: dict[str, ModelConfig] = {
    "demo": ModelConfig(**_NGRAMS),
    "10m": _shape((5, 384, 6, 2, 928), (3, 256, 4, 512, 256), 4096, **_NGRAMS),
    "50m": _shape((16, 512, 8, 2, 1408), (5, 256, 4, 768, 256), 8192, **_LARGE_NGRAMS),
    "100m": _shape((15, 768, 12, 4, 2048), (6, 256, 4, 1024, 256), 8192, **_LARGE_NGRAMS),
}


def _flat(pooled: str, width: int, layers: int, heads: int, kv_heads: int, ff: int) -> ModelConfig:
    """The baseline that reads the bytes of a pooled preset one by one."""
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
        **_LOOK_UPS,
    )


def _words(
    pooled: str, vocab_size: int, width: int, layers: int, heads: int, kv_heads: int, ff: int
) -> ModelConfig:
    """The baseline that reads words instead."""
    return replace(
        _flat(pooled, width, layers, heads, kv_heads, ff),
        tokens="words",
        vocab_size=vocab_size,
        context=round(_POOLED[pooled].context / BYTES_PER_WORD),
        match_sizes=(),
        memory_sizes=(),
    )


_PAPER_BYTE = _shape((11, 512, 8, 8, 1408), (7, 256, 8, 512, None), 4096, **_PAPER)
"""The seed paper's order of things (arXiv 2405.14159) without its leaks and lost bytes: attention
inside patches of at most 12 bytes, their mean, a core, all bytes of the next patch at once, the
reconstruction. Its patches are tokens of GPT-2, whose boundaries depend on later bytes; here spaces
close them, and no byte is cut off.
"""

PRESETS: dict[str, ModelConfig] = {
    **_POOLED,
    "paper-byte": _PAPER_BYTE,
    "demo-flat": _flat("demo", 192, 4, 3, 3, 720),
    "10m-flat": _flat("10m", 384, 6, 6, 2, 1056),
    "50m-flat": _flat("50m", 512, 18, 8, 2, 1376),
    "100m-flat": _flat("100m", 768, 16, 12, 4, 2048),
    "demo-word": _words("demo", 8192, 128, 4, 2, 2, 760),
    "10m-word": _words("10m", 50257, 128, 20, 2, 2, 320),
    "50m-word": _words("50m", 50257, 512, 8, 8, 2, 1536),
    "100m-word": _words("100m", 50257, 768, 10, 12, 4, 2016),
}
"""Presets by name; a tied table counts once towards the parameters that the name promises."""

RATES: dict[str, dict[str, float]] = {"demo": {"muon_lr": 0.03, "adamw_lr": 0.012}}
"""Peak learning rates that trials chose (docs/speedrun.md); others keep those of `TrainOptions`."""


def preset(name: str) -> ModelConfig:
    """The config of a preset, with a ValueError that lists them for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
