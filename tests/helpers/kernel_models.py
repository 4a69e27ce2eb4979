"""Small models that take every kernel."""

from __future__ import annotations

import dataclasses

from helpers.models import TINY

# Heads of 16, which the kernels take.
SIZES = {"byte_dim": 32, "core_dim": 32, "decoder_layers": 1}


SMALL = dataclasses.replace(TINY, **SIZES, core_layers=1)


MODELS = {
    "defaults": SMALL,
    "flat": dataclasses.replace(SMALL, patch_rule="none", core_layers=0),
    "attention pooling of a causal encoder": dataclasses.replace(
        SMALL,
        pooling="attention",
        pooling_heads=2,
        encoder_layers=1,
        ngram_sizes=(),
        tied=False,
        unpooling="ema",
    ),
    "a parallel output behind an encoder inside patches": dataclasses.replace(
        SMALL,
        pooling="max",
        encoder="patch",
        encoder_layers=1,
        output="parallel",
        decoder_window=None,
        share_ff=True,
    ),
}
