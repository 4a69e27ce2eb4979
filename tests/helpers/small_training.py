"""A model and a text that train in seconds."""

from __future__ import annotations

from stlm_models import ModelConfig
from stlm_models.data.corpus import Corpus

SMALL = ModelConfig(
    byte_dim=32,
    max_patch_len=5,
    ngram_buckets=61,
    ngram_dim=4,
    core_layers=1,
    core_dim=32,
    core_heads=2,
    core_kv_heads=1,
    core_ff=16,
    decoder_layers=1,
    decoder_heads=2,
    decoder_kv_heads=2,
    decoder_ff=16,
    decoder_window=7,
    context=24,
)


TEXTS = [b"Zo\xc3\xab sat, 12_345;\n ", b"extraordinarilylong " * 4, b"x" * 40, b"a. b! " * 9]


CORPUS = Corpus("texts", TEXTS, [])
