"""Bits per byte: what the model needs for bytes that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .config import BOS_ID, IGNORED
from .data.words import WordVocabulary
from .layers.modes import eval_mode
from .layers.packing import recurring_size
from .model import STLM

IDS_PER_CALL = 16_384


@torch.no_grad()
def bits_per_byte(
    model: STLM,
    data: bytes | list[bytes],
    *,
    vocabulary: WordVocabulary | None = None,
    context: int | None = None,
    stride: int | None = None,
) -> float:
    """nats / (ln 2 x bytes), every byte scored exactly once.

    Each document starts with id 256 as context. It is read in windows of `context` ids that move on
    by `stride`; each scores the ids that no window before has scored. Bytes alone have probability,
    as in generation and in `stlm_models.compress`: see `STLM.byte_loss`.

    Args:
        data: one document, or a list of them; at least one byte in all.
        vocabulary: of a model of words; None where the bytes are the ids. Bits stay per byte.
        context: ids in a window; None is the config's.
        stride: None is half the context.

    Raises:
        ValueError: for no bytes at all, a context below 1, a stride outside 1..context, or a
            vocabulary that is not the model's.

    >>> model = STLM(ModelConfig(core_layers=1, decoder_layers=1))
    >>> round(bits_per_byte(model, b"untrained: 8 bits"))
    8
    """
    _check_vocabulary(model, vocabulary)
    documents = [data] if isinstance(data, bytes) else data
    if isinstance(data, str) or not all(isinstance(document, bytes) for document in documents):
        raise ValueError(f"data: expected bytes or a list of them, got {data!r:.80}")
    n_bytes = sum(len(document) for document in documents)
    if n_bytes == 0:
        raise ValueError("data: expected at least one byte, got none")
    context = model.config.context if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if context < 1:
        raise ValueError(f"context: expected at least 1, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride: expected 1 to context = {context}, got {stride}")
    ids = (_ids(document, vocabulary) for document in documents)
    windows = (window for document in ids for window in _windows(document, context, stride))
    nats = 0.0
    with eval_mode(model):
        for batch in _batches(windows):
            nats += _nats(model, batch)
    return nats / (math.log(2) * n_bytes)


def _check_vocabulary(model: STLM, vocabulary: WordVocabulary | None) -> None:
    of_words, limit = model.config.tokens == "words", model.config.vocab_size
    if of_words and (vocabulary is None or vocabulary.size > limit):
        got = None if vocabulary is None else f"{vocabulary.size} ids"
        raise ValueError(
            f"vocabulary: expected the words of a word model, {limit} ids at most, got {got}"
        )
    if not of_words and vocabulary is not None:
        raise ValueError("vocabulary: expected None for a model of bytes, got one of words")


@dataclass(frozen=True)
class _Window:
    ids: NDArray[np.int32]
    targets: NDArray[np.int32]


def _ids(document: bytes, vocabulary: WordVocabulary | None) -> NDArray[np.int32]:
    """The ids that the model reads and predicts, id 256 before them."""
    ids = np.frombuffer(document, np.uint8) if vocabulary is None else vocabulary.encode(document)
    return np.concatenate(([BOS_ID], ids)).astype(np.int32)


def _windows(ids: NDArray[np.int32], context: int, stride: int) -> Iterator[_Window]:
    scored, n_targets = 0, len(ids) - 1
    for start in range(0, n_targets, stride):
        end = min(start + context, n_targets)
        targets = ids[start + 1 : end + 1].copy()
        targets[: scored - start] = IGNORED
        yield _Window(ids[start:end], targets)
        scored = end
        if end == n_targets:
            return


def _batches(windows: Iterator[_Window]) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    n_ids = 0
    for window in windows:
        if batch and n_ids + len(window.ids) > IDS_PER_CALL:
            yield batch
            batch, n_ids = [], 0
        batch.append(window)
        n_ids += len(window.ids)
    if batch:
        yield batch


def _nats(model: STLM, batch: list[_Window]) -> float:
    device = model.embedding.weight.device
    parts = [window.ids for window in batch], [window.targets for window in batch]
    length = sum(map(len, parts[0]))
    behind = 0, recurring_size(length) - length  # of no document
    ids, targets = (
        torch.from_numpy(np.pad(np.concatenate(each), behind)).to(device) for each in parts
    )
    lengths = torch.tensor([0, *(len(window.ids) for window in batch)], device=device)
    loss_sum, _ = model.byte_loss(ids, targets.long(), cu_seqlens=lengths.cumsum(0).int())
    return float(loss_sum)
