"""General-purpose compressors, as the bar for a model's bits per byte."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import lzma
from collections.abc import Sequence

PPMD_ORDER = 32
PPMD_MEMORY = 1 << 30
PPMD_MOST_TRAINING = 64 << 20
"""Bytes of training text that PPMd reads at most: it takes about half a second a megabyte."""


def compressed_sizes(data: bytes, training: Sequence[bytes | memoryview] = ()) -> dict[str, int]:
    """Sizes of `data` in bytes under each compressor, by its name.

    gzip, bzip2 and xz at their strongest; where pyppmd is installed (the extra `compressors`), PPMd
    too, and with `training` also PPMd that has read those documents before: the one that, like a
    trained model, does not begin with an empty memory.

    Args:
        data: what is compressed, as one stream.
        training: documents that were there to learn from; the last 64 MiB of them are read.
    """
    sizes = {
        "gzip -9": len(gzip.compress(data, 9)),
        "bzip2 -9": len(bz2.compress(data, 9)),
        "xz -9": len(lzma.compress(data, preset=9)),
    }
    if importlib.util.find_spec("pyppmd"):
        sizes["PPMd"] = _ppmd_size(data, b"")
        if training:
            sizes["PPMd after the training text"] = _ppmd_size(data, _end_of(training))
    return sizes


def bits_per_byte_of(sizes: dict[str, int], n_bytes: int) -> dict[str, float]:
    """`sizes` in bits per byte of the original; empty where there is no byte."""
    return {name: 8 * size / n_bytes for name, size in sizes.items()} if n_bytes else {}


def _end_of(documents: Sequence[bytes | memoryview]) -> bytes:
    """Last bytes of all documents, at most `PPMD_MOST_TRAINING`, read from the end."""
    parts, left = [], PPMD_MOST_TRAINING
    for document in reversed(documents):
        part = bytes(document[max(0, len(document) - left) :])
        parts.append(part)
        left -= len(part)
        if not left:
            break
    return b"".join(reversed(parts))


def _ppmd_size(data: bytes, before: bytes) -> int:
    """Bytes that PPMd writes for `data` once its model has read `before`."""
    from pyppmd import Ppmd7Encoder

    encoder = Ppmd7Encoder(PPMD_ORDER, PPMD_MEMORY)
    if before:
        encoder.encode(before)
    return len(encoder.encode(data)) + len(encoder.flush())
