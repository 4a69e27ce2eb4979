"""Models that leak, each beside an honest one: `assert_causal` must tell them apart.

Every model is made of the library's own ops, and the two of a pair differ in one place alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stlm_kernels import (
    Patches,
    attention_pool,
    byte_pool,
    find_patches,
    patch_attention,
    segment_pool,
    unpool,
)
from stlm_kernels.testing import assert_causal

VOCAB, WIDTH, LENGTH = 256, 8, 32
SPACE = 32
TABLE = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(3))
QUERY = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(4))
Model = Callable[[Tensor], Tensor]


def logits(states: Tensor, read_ids: Tensor, residual: Tensor) -> Tensor:
    return unpool(states, read_ids, residual=residual)


def embedded(ids: Tensor) -> Tensor:
    return TABLE[ids]


def history(ids: Tensor) -> Tensor:
    """A causal encoder: what it holds at t comes from bytes up to t."""
    return embedded(ids).cumsum(0)


def spaces(ids: Tensor) -> Tensor:
    return ids == SPACE


# ---- fixed patches, read before they close -----------------------------------------------------


def fixed_patches(ids: Tensor, read: Callable[[Patches], Tensor]) -> Tensor:
    patches = find_patches(ids, rule="fixed", patch_size=4)
    states = byte_pool(ids, TABLE, patches.cu_patchlens, mode="sum")
    return logits(states, read(patches), embedded(ids))


def fixed_patches_read_when_they_close(ids: Tensor) -> Tensor:
    return fixed_patches(ids, lambda patches: patches.read_ids)


def fixed_patches_read_while_open(ids: Tensor) -> Tensor:
    return fixed_patches(ids, lambda patches: patches.patch_ids)


def fixed_patches_read_one_byte_early(ids: Tensor) -> Tensor:
    """The patch's last byte is what its last but one must predict."""
    return fixed_patches(ids, lambda p: torch.cat([p.read_ids[1:], p.read_ids[-1:]]))


# ---- pools read through patch_ids --------------------------------------------------------------


def pooled(ids: Tensor, mode: str, read: Callable[[Patches], Tensor]) -> Tensor:
    patches = find_patches(ids, rule="space", max_patch_len=6)
    x = history(ids)
    if mode == "attention":
        states = attention_pool(QUERY, x[:, None], x[:, None], patches.cu_patchlens)[:, 0]
    else:
        states = segment_pool(x, patches.cu_patchlens, mode=mode)
    return logits(states, read(patches), x)


def pool_read_through(mode: str, field: str) -> Model:
    def model(ids: Tensor) -> Tensor:
        return pooled(ids, mode, lambda patches: getattr(patches, field))

    model.__name__ = f"{mode}_pool_read_through_{field}"
    return model


# ---- marks of a patch's start ------------------------------------------------------------------


def started_patches(ids: Tensor, read: Callable[[Patches], Tensor]) -> Tensor:
    """A mask that marks the first byte of each patch, from bytes that are known there."""
    patches = find_patches(ids, patch_start_mask=spaces(ids))
    states = byte_pool(ids, TABLE, patches.cu_patchlens)
    return logits(states, read(patches), embedded(ids))


def starts_read_one_patch_back(ids: Tensor) -> Tensor:
    return started_patches(ids, lambda patches: patches.read_ids)


def starts_read_at_the_byte_before(ids: Tensor) -> Tensor:
    """A patch is read at its last byte, which it is only because the next byte is a start."""

    def last_ended(patches: Patches) -> Tensor:
        following = torch.cat([patches.patch_ids[1:], patches.patch_ids[-1:]])
        return torch.where(following > patches.patch_ids, patches.patch_ids, patches.read_ids)

    return started_patches(ids, last_ended)


# ---- bidirectional states ----------------------------------------------------------------------


def encoded(ids: Tensor, *, pooled_from: bool, residual_from: bool) -> Tensor:
    """Attention within patches: states that saw later bytes may be pooled, and never added."""
    patches = find_patches(ids, rule="space")
    x = embedded(ids)[:, None]
    pooled_states, residual = (
        patch_attention(x, x, x, patches.cu_patchlens, causal=causal)[:, 0]
        for causal in (pooled_from, residual_from)
    )
    states = segment_pool(pooled_states, patches.cu_patchlens)
    return logits(states, patches.read_ids, residual)


def causal_states_as_residual(ids: Tensor) -> Tensor:
    return encoded(ids, pooled_from=True, residual_from=True)


def bidirectional_states_pooled(ids: Tensor) -> Tensor:
    return encoded(ids, pooled_from=False, residual_from=True)


def bidirectional_states_as_residual(ids: Tensor) -> Tensor:
    return encoded(ids, pooled_from=True, residual_from=False)


# ---- boundaries that look ahead ----------------------------------------------------------------


def masked(ids: Tensor, closes: Tensor) -> Tensor:
    patches = find_patches(ids, patch_end_mask=closes)
    states = byte_pool(ids, TABLE, patches.cu_patchlens)
    return logits(states, patches.read_ids, embedded(ids))


def boundaries_from_bytes_seen(ids: Tensor) -> Tensor:
    return masked(ids, spaces(ids))


def boundaries_before(byte: int) -> Model:
    """A patch ends where this byte follows: its last byte would know that it does."""

    def model(ids: Tensor) -> Tensor:
        return masked(ids, torch.cat([ids[1:] == byte, torch.tensor([False])]))

    model.__name__ = f"boundaries_before_{byte}"
    return model


def boundaries_from_the_whole_text(ids: Tensor) -> Tensor:
    """The text's most frequent id closes patches: a rule that needs the text's end."""
    return masked(ids, ids == ids.bincount().argmax())


POOLS = ("mean", "sum", "max", "min", "last", "attention")

HONEST = [
    fixed_patches_read_when_they_close,
    *(pool_read_through(mode, "read_ids") for mode in (*POOLS, "first")),
    pool_read_through("first", "patch_ids"),  # the one pool whose patch is known at its first byte
    starts_read_one_patch_back,
    causal_states_as_residual,
    bidirectional_states_pooled,
    boundaries_from_bytes_seen,
]
LEAKING = [
    fixed_patches_read_while_open,
    fixed_patches_read_one_byte_early,
    *(pool_read_through(mode, "patch_ids") for mode in POOLS),
    starts_read_at_the_byte_before,
    bidirectional_states_as_residual,
    *(boundaries_before(byte) for byte in (SPACE, *b"\n.7", 0xC3, 0)),
    boundaries_from_the_whole_text,
]


@pytest.mark.parametrize("fn", HONEST, ids=lambda fn: fn.__name__)
def test_honest_models_are_accepted(fn: Model) -> None:
    assert_causal(fn, VOCAB, length=LENGTH)


@pytest.mark.parametrize("fn", LEAKING, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_leaks_are_found(fn: Model, seed: int) -> None:
    with pytest.raises(AssertionError, match="a later byte leaks"):
        assert_causal(fn, VOCAB, length=LENGTH, seed=seed)


def first_leak(fn: Model) -> int:
    with pytest.raises(AssertionError, match="a later byte leaks") as found:
        assert_causal(fn, VOCAB, length=LENGTH)
    return int(str(found.value).split("position ")[1].split()[0])


def test_a_leak_is_found_where_it_is() -> None:
    """Byte 2 is the first to know too much of patches of 4 bytes that are read one byte early."""
    assert first_leak(fixed_patches_read_one_byte_early) == 2
    assert first_leak(fixed_patches_read_while_open) == 0
