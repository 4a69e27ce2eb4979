"""Shares that a model gives the bytes of a text, one by one: common to coder and decoder.

Both run `code_streams` and nothing else of the model, with the same rows in every step: that makes
its probabilities the same on both sides, bit for bit, on the same software and kind of device. A
byte is shown to the model after it was coded: one that leaks has nothing to look ahead at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import BOS_ID, BYTES
from ..generation.engine import CachedRun, advance, check_writes_bytes
from ..layers.modes import eval_mode
from ..model import STLM
from .range_coder import TOTAL_BITS

BYTES_OF_A_STREAM = 4096
MOST_STREAMS = 64

NextBytes = Callable[[int, Sequence[int], NDArray[np.int64]], list[int]]
"""(step, streams with a byte there, cumulative shares of all streams) -> the bytes of those."""


def default_streams(length: int) -> int:
    """A stream for every 4 KiB, at most 64. Each begins without context, which costs a little."""
    return min(MOST_STREAMS, max(1, -(-length // BYTES_OF_A_STREAM)))


def stream_boundaries(length: int, streams: int) -> list[int]:
    """Offsets of streams in a text of this length, and its end; they differ by a byte at most."""
    return [length * stream // streams for stream in range(streams + 1)]


@torch.no_grad()
def code_streams(model: STLM, length: int, streams: int, next_bytes: NextBytes) -> None:
    """Ask for the bytes of all streams, step by step, telling what the model expects them to be.

    Each stream begins a document; beyond the context it goes on as generation does.

    Raises:
        ValueError: for a model that writes no bytes, and where its logits are not finite.
    """
    check_writes_bytes(model)
    if length == 0:
        return
    boundaries = stream_boundaries(length, streams)
    lengths = [end - begin for begin, end in pairwise(boundaries)]
    windows = [[BOS_ID] for _ in lengths]
    run = CachedRun(model, windows)
    ids = [0] * streams
    for step in range(max(lengths)):
        rows = [stream for stream in range(streams) if step < lengths[stream]]
        logits = model.embedding.logits(run.hidden, valid_vocab=BYTES)
        for stream, byte in zip(
            rows, next_bytes(step, rows, cumulative_shares(logits)), strict=True
        ):
            ids[stream] = byte
            windows[stream].append(byte)
        advance(run, windows, torch.tensor(ids, device=run.device), rows)


def cumulative_shares(logits: Tensor) -> NDArray[np.int64]:
    """(..., V) -> (..., V + 1) from 0 to 2 ** TOTAL_BITS; no share is empty.

    Raises:
        ValueError: where logits are not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("model: expected finite logits, got NaN or infinity")
    probabilities = logits.cpu().double().softmax(-1).numpy()
    total, vocab = 1 << TOTAL_BITS, logits.shape[-1]
    shares = (probabilities * (total - vocab)).astype(np.int64) + 1
    likeliest = probabilities.argmax(-1)[..., None]
    left = total - shares.sum(-1, keepdims=True)
    np.put_along_axis(shares, likeliest, np.take_along_axis(shares, likeliest, -1) + left, -1)
    none = np.zeros((*shares.shape[:-1], 1), np.int64)
    return np.concatenate((none, shares.cumsum(-1)), -1)


@contextmanager
def reproducible(model: STLM) -> Iterator[None]:
    """Eval mode, no autocast, and one thread: several may sum a product in another order."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            eval_mode(model),
            torch.autocast(model.embedding.weight.device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_num_threads(threads_before)
