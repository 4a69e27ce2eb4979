"""Arithmetic coding of bytes by a model's own probabilities, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..config import BYTES
from ..model import STLM
from .file_format import Compressed, machine_of, sha256, unpack
from .range_coder import Decoder, Encoder, most_symbols
from .streams import code_streams, default_streams, reproducible, stream_boundaries


def compress(
    model: STLM,
    data: bytes,
    *,
    checkpoint: str,
    streams: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> bytes:
    """A file from which `decompress` makes data again, with the same model.

    Args:
        data: any bytes.
        checkpoint: SHA-256 in hexadecimal that the model is known by: `Checkpoint.digest`.
        streams: parts that are coded side by side, each as a document of its own: more are faster,
            fewer are smaller. None is one for every 4 KiB, at most 64.
        on_progress: called with how many bytes are done.

    Raises:
        ValueError: for streams below 1 or more than bytes, a model that writes no bytes,
            and one whose logits are not finite.

    >>> model = STLM(ModelConfig(core_layers=1, decoder_layers=1))
    >>> compress(model, b"some text", checkpoint=64 * "0")[:4]
    b'STLM'
    """
    streams = default_streams(len(data)) if streams is None else streams
    if not 1 <= streams <= max(1, len(data)):
        raise ValueError(f"streams: expected 1 to the number of bytes {len(data)}, got {streams}")
    encoders = [Encoder() for _ in range(streams)]
    boundaries = stream_boundaries(len(data), streams)

    def encode(step: int, rows: Sequence[int], cumulative: NDArray[np.int64]) -> list[int]:
        found = [data[boundaries[stream] + step] for stream in rows]
        starts = cumulative[rows, found].tolist()
        ends = cumulative[rows, [byte + 1 for byte in found]].tolist()
        for stream, start, end in zip(rows, starts, ends, strict=True):
            encoders[stream].encode(start, end)
        if on_progress is not None:
            on_progress(step * streams + len(rows))
        return found

    with reproducible(model):
        code_streams(model, len(data), streams, encode)
    return Compressed(
        checkpoint=checkpoint,
        content=sha256(data),
        length=len(data),
        context=model.config.context,
        machine=machine_of(model.embedding.weight.device),
        codes=tuple(encoder.finish() for encoder in encoders),
    ).pack()


def decompress(
    model: STLM,
    file: bytes,
    *,
    checkpoint: str,
    on_progress: Callable[[int], None] | None = None,
) -> bytes:
    """The bytes that `compress` was given.

    Args:
        file: what `compress` returned.
        checkpoint, on_progress: as for `compress`.

    Raises:
        ValueError: for a foreign or damaged file, another checkpoint than the one it was made with,
            and where the model's probabilities are not those that it was made with.

    >>> model = STLM(ModelConfig(core_layers=1, decoder_layers=1))
    >>> file = compress(model, b"some text", checkpoint=64 * "0")
    >>> decompress(model, file, checkpoint=64 * "0")
    b'some text'
    """
    packed = unpack(file)
    for name, expected, got in (
        ("checkpoint", packed.checkpoint, checkpoint),
        ("context", packed.context, model.config.context),
    ):
        if expected != got:
            raise ValueError(f"{name}: expected {expected}, which made the file, got {got}")
    size = sum(map(len, packed.codes))
    most = most_symbols(size, BYTES)
    if packed.length > most:
        raise ValueError(
            f"file: damaged, its {size} bytes of code hold at most {most} of text, "
            f"got {packed.length}"
        )
    streams = len(packed.codes)
    decoders = [Decoder(code) for code in packed.codes]
    parts = [bytearray() for _ in packed.codes]  # grown as they are decoded

    def decode(step: int, rows: Sequence[int], cumulative: NDArray[np.int64]) -> list[int]:
        found = [decoders[stream].decode(cumulative[stream]) for stream in rows]
        for stream, byte in zip(rows, found, strict=True):
            parts[stream].append(byte)
        if on_progress is not None:
            on_progress(step * streams + len(rows))
        return found

    with reproducible(model):
        code_streams(model, packed.length, streams, decode)
    data = b"".join(parts)
    if sha256(data) != packed.content:
        raise ValueError(_other_arithmetic(packed, machine_of(model.embedding.weight.device)))
    return data


def _other_arithmetic(packed: Compressed, machine: str) -> str:
    return (
        "file: undamaged, but this machine computes other probabilities than the one that made it:"
        f" expected {packed.machine}, got {machine}; nothing was written"
    )
