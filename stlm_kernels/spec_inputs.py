"""Realistic inputs for the cases of the pooling ops: text, ids and patch boundaries from a seed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MOST_DRAWN = 4_194_301
"""A prime, so that no wrap of an index, by a power of two, meets the same values again."""


def normal(*shape: int, rng: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal values, drawn on the CPU, so that every device sees the same.

    Beyond four million they repeat: to draw billions takes minutes of a GPU's time.
    """
    count = math.prod(shape)
    if count * dtype.itemsize > _most_bytes:
        return untouched_zeros(*shape, dtype=dtype)
    values = torch.randn(min(count, MOST_DRAWN), generator=rng, dtype=torch.float64)
    values = values.to(device, dtype)
    if count > MOST_DRAWN:
        values = values.repeat(-(-count // MOST_DRAWN))[:count]
    return values.view(shape)


_most_bytes = math.inf
ALIGNMENT = 512
"""Bytes of which addresses of fresh tensors on a GPU are multiples."""


@contextlib.contextmanager
def zeros_beyond(size: int) -> Iterator[None]:
    """Let `normal` give zeros on the CPU, without memory, for tensors of more bytes than `size`."""
    global _most_bytes
    before, _most_bytes = _most_bytes, size
    try:
        yield
    finally:
        _most_bytes = before


def untouched_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU; pages that are never written take no physical memory.

    They begin as a GPU's tensors do: an address that is no multiple of 32 adds sectors to each row.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[begin : begin + size]).view(dtype).view(shape)


@functools.cache
def _base_text(kind: str) -> Tensor:
    """Text that every Python carries: its own manual's topics, or its library's sources."""
    if kind == "english":
        spec = importlib.util.find_spec("pydoc_data.topics")
        assert spec is not None
        assert spec.origin is not None
        raw = Path(spec.origin).read_bytes().replace(b"\\n", b"\n")
    else:
        library = Path(sysconfig.get_path("stdlib"))
        raw = b"".join((library / f"{name}.py").read_bytes() for name in ("typing", "argparse"))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def text_bytes(kind: str, total: int, rng: torch.Generator) -> Tensor:
    """(total,) uint8 on CPU: "english", "code", "uniform" random bytes, or all "equal"."""
    if kind == "equal":
        return torch.full((total,), 101, dtype=torch.uint8)
    if kind == "uniform":
        return torch.randint(0, 256, (total,), generator=rng, dtype=torch.uint8)
    text = _base_text(kind)
    first = int(torch.randint(0, text.shape[0], (), generator=rng))
    return text.roll(-first).repeat(-(-total // text.shape[0]))[:total]


def random_ids(total: int, vocab: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """(total,) ids with text's skew: some rows hot, some used once, many not at all."""
    low = torch.randint(0, vocab, (total,), generator=rng)
    skew = torch.rand(total, generator=rng).pow(3)
    return (low * skew).long().clamp(max=vocab - 1).to(dtype)


@functools.cache
def _word_lengths() -> Tensor:
    """Lengths of the patches of the English text, none longer than 16."""
    from .ops.find_patches import find_patches

    patches = find_patches(_base_text("english"), rule="space", max_patch_len=16, impl="torch")
    return patches.cu_patchlens.diff()


def patch_boundaries(kind: str, total: int, patches: int, rng: torch.Generator) -> Tensor:
    """(patches + 1,) int32 on CPU.

    "ragged": random boundaries, so that empty patches, single bytes and long ones occur; "tail":
    the same over three quarters of the bytes; "hollow": every patch empty; "even": equal lengths;
    "words": what the space rule makes of English, as far as patches or bytes suffice; "hot": the
    same, with all other bytes in one patch in the middle.
    """
    if kind in ("words", "hot"):
        lengths = _word_lengths()
        first = int(torch.randint(0, len(lengths), (), generator=rng))
        lengths = lengths.roll(-first).repeat(-(-patches // len(lengths)))[:patches]
        if kind == "hot":
            lengths[patches // 2] += max(0, total - int(lengths.sum()))
        return torch.cat([lengths.new_zeros(1), lengths]).cumsum(0).clamp(max=total).int()
    end = {"ragged": total, "even": total, "tail": total * 3 // 4, "hollow": 0}[kind]
    if patches == 0:
        return torch.zeros(1, dtype=torch.int32)
    if kind == "even":
        return (torch.arange(patches + 1) * end // patches).int()
    inner = torch.randint(0, end + 1, (patches - 1,), generator=rng).sort().values
    edges = [torch.zeros(1, dtype=torch.long), inner, torch.full((1,), end)]
    return torch.cat(edges).int()
