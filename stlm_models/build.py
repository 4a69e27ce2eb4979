"""The parts at byte rate that a config asks for, and how all parameters of a model begin."""

from __future__ import annotations

from torch import nn

from .config import ModelConfig
from .layers.attention import Attention, PatchAttention
from .layers.matches import MatchEmbedding
from .layers.memory import TextMemory
from .layers.ngrams import NgramPooling
from .layers.patching import BytePatcher, GivenPatches
from .layers.pooling import BytePooling, ByteUnpooling, EmaUnpooling
from .layers.transformer import SwiGLU, build_blocks


def patcher_of(config: ModelConfig, *, max_patches: int | None = None) -> BytePatcher:
    """Return the module that cuts bytes into patches, as many as there are or so many slots."""
    if config.patch_rule == "external":
        return GivenPatches()
    return BytePatcher(
        config.patch_rule,
        patch_size=config.patch_size,
        max_patch_len=config.max_patch_len,
        max_patches=max_patches,
    )


def pooling_of(config: ModelConfig) -> BytePooling | None:
    """None where embeddings are pooled as they are looked up, and no state of a byte exists."""
    if config.pooling in ("mean", "sum") and not config.encoder_layers:
        return None
    dim = config.byte_dim if config.pooling == "attention" else None
    return BytePooling(config.pooling, dim=dim, heads=config.pooling_heads)


def unpooling_of(config: ModelConfig) -> ByteUnpooling | EmaUnpooling:
    """Return the module that gives bytes the states of patches."""
    if config.unpooling == "ema":
        return EmaUnpooling(config.core_dim)
    return ByteUnpooling(config.byte_dim)


def encoder_blocks(config: ModelConfig) -> tuple[nn.ModuleList, SwiGLU | None]:
    """Return the blocks of the local encoder, none where there is none."""
    heads = config.encoder_heads, config.encoder_kv_heads
    return _blocks(
        config, *heads, config.encoder_ff, config.encoder_layers, inside=config.encoder == "patch"
    )


def decoder_blocks(config: ModelConfig) -> tuple[nn.ModuleList, SwiGLU | None]:
    """Return blocks over bytes, or over the slots of each patch where the output is parallel."""
    heads = config.decoder_heads, config.decoder_kv_heads
    inside = config.output == "parallel"
    return _blocks(config, *heads, config.decoder_ff, config.decoder_layers, inside=inside)


def _blocks(
    config: ModelConfig, heads: int, kv_heads: int, ff: int, layers: int, *, inside: bool
) -> tuple[nn.ModuleList, SwiGLU | None]:
    """Attention inside each patch, or causal over documents within the decoder's window."""

    def attention() -> Attention:
        kind = PatchAttention if inside else Attention
        return kind(
            config.byte_dim,
            heads,
            kv_heads=kv_heads,
            window=None if inside else config.decoder_window,
            qk_norm=config.qk_norm,
            rope_base=config.rope_base,
        )

    return build_blocks(attention, ff, layers, share_ff=config.share_ff)


def ngrams_of(config: ModelConfig) -> tuple[NgramPooling | None, nn.Linear | None]:
    """The tables, and the map by which their rows join the own states of a pooled model's bytes."""
    if not config.ngram_sizes:
        return None, None
    dim, out_dim = config.ngram_dim, config.byte_dim
    ngrams = NgramPooling(
        config.ngram_sizes, config.ngram_buckets, dim, out_dim, hashes=config.ngram_hashes
    )
    return ngrams, nn.Linear(dim, out_dim, bias=False) if config.byte_ngrams else None


def matches_of(config: ModelConfig) -> MatchEmbedding | None:
    """Return the module that finds repeats of a text, where the config has any."""
    if not config.match_sizes:
        return None
    return MatchEmbedding(config.match_sizes, config.vocab_size, config.byte_dim)


def memory_of(config: ModelConfig) -> TextMemory | None:
    """Return the memory of the training text, where the config has one."""
    if not config.memory_sizes:
        return None
    return TextMemory(config.memory_sizes, config.memory_slots, config.byte_dim)


def ngram_mode(config: ModelConfig) -> str:
    """Mode in which n-grams are pooled: as bytes are; their mean where those are attended to."""
    return "mean" if config.pooling == "attention" else config.pooling


def initialise(model: nn.Module) -> None:
    """Linear maps keep the scale of their input; residual branches and the output begin at zero.

    A byte's own state, sent back through the tied table, would predict that byte again: the map in
    between, at zero, lets the first step predict what is frequent instead.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(("attention.output", "feed_forward.down", "to_output")):
            nn.init.zeros_(module.weight)
        else:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
