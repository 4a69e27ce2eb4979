"""Configurations that cover every pair of options."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from helpers.models import TINY
from stlm_kernels import Patches, find_patches
from stlm_models import STLM, ModelConfig

NONE = {"encoder_layers": 0}


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "rule": {
        "space": {},
        "fixed": {"patch_rule": "fixed", "patch_size": 4, "max_patch_len": None},
        "external": {"patch_rule": "external"},
        "none": {"patch_rule": "none", "core_layers": 0},
    },
    "pooling": {
        **{mode: {"pooling": mode} for mode in ("mean", "sum", "max", "min", "first", "last")},
        "attention": {"pooling": "attention", "pooling_heads": 2},
    },
    "encoder": {
        "none": NONE,
        "causal": {"encoder_layers": 1, "encoder_ff": 24},
        "patch": {"encoder": "patch", "encoder_layers": 2, "encoder_kv_heads": 1, "encoder_ff": 24},
    },
    "output": {"autoregressive": {}, "parallel": {"output": "parallel"}},
    "unpooling": {"read": {}, "ema": {"unpooling": "ema"}},
    "share": {"no": {}, "yes": {"share_ff": True}},
    "tied": {"yes": {}, "no": {"tied": False}},
    "n-grams": {
        "some": {},
        "none": {"ngram_sizes": ()},
        "at bytes": {"byte_ngrams": True, "ngram_hashes": 2},
    },
    "matches": {"none": {}, "some": {"match_sizes": (1, 2)}},
    "memory": {"none": {}, "some": {"memory_sizes": (1, 3), "memory_slots": 64}},
    "max_patches": {"none": {}, "some": {"max_patches": 40}},
    "window": {"some": {}, "none": {"decoder_window": None}},
    "norm": {"yes": {}, "no": {"qk_norm": False}},
}


EXCLUDED = {
    *((("rule", "none"), ("pooling", mode)) for mode in OPTIONS["pooling"] if mode != "mean"),
    *((("rule", "none"), ("encoder", kind)) for kind in ("causal", "patch")),
    (("rule", "none"), ("output", "parallel")),
    (("rule", "none"), ("unpooling", "ema")),
    (("output", "parallel"), ("unpooling", "ema")),
    (("rule", "none"), ("max_patches", "some")),
    (("rule", "none"), ("n-grams", "at bytes")),
    (("output", "parallel"), ("n-grams", "at bytes")),
    (("output", "parallel"), ("matches", "some")),
    (("output", "parallel"), ("memory", "some")),
    (("rule", "external"), ("max_patches", "some")),
    (("output", "parallel"), ("window", "some")),
}
"""Choices that a config refuses together."""


Choice = dict[str, str]


def pairs_of(choice: Choice) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(choice.items(), 2))


def allowed_choices() -> list[Choice]:
    every = itertools.product(*OPTIONS.values())
    choices = [dict(zip(OPTIONS, values, strict=True)) for values in every]
    return [choice for choice in choices if not pairs_of(choice) & EXCLUDED]


def covering_set() -> tuple[list[Choice], set[Any]]:
    """Few choices in which every allowed pair occurs, each the one that adds most; all pairs."""
    candidates = [(choice, pairs_of(choice)) for choice in allowed_choices()]
    wanted = set().union(*(pairs for _, pairs in candidates))
    chosen: list[Choice] = []
    missing = set(wanted)
    while missing:
        best, pairs = max(candidates, key=lambda c: len(c[1] & missing))
        chosen.append(best)
        missing -= pairs
        candidates = [c for c in candidates if c[1] & missing]
    return chosen, wanted


CHOICES, PAIRS = covering_set()


def config_of(choice: Choice) -> ModelConfig:
    values = {k: v for name, value in choice.items() for k, v in OPTIONS[name][value].items()}
    return dataclasses.replace(TINY, **values)


def given_patches(ids: Tensor, cu_seqlens: Tensor | None = None) -> Patches:
    """Boundaries from outside, known when they are reached."""
    return find_patches(ids, patch_end_mask=ids % 3 == 0, max_patch_len=5, cu_seqlens=cu_seqlens)


def caller(model: STLM) -> Callable[..., Any]:
    """The model, with patches where its rule wants them."""

    def call(ids: Tensor, targets: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Any:
        given = model.config.patch_rule == "external"
        patches = given_patches(ids, cu_seqlens) if given else None
        return model(ids, targets, cu_seqlens=cu_seqlens, patches=patches)

    return call
