"""`python -m stlm_models.compress --run DIR FILE`: as small as the model predicts it.

Arithmetic coding by the model's own probabilities, which makes its bits per byte real: a model
that looks ahead cannot be decoded by. `python -m stlm_models.decompress` gives the same bytes back
on the same software and kind of device, because probabilities are floating point; elsewhere it may
refuse, and never gives other bytes.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stlm_kernels.terminal import argument_parser, command, note

from .arithmetic import Encoder
from .checkpoint import load_checkpoint, model_of, require_extra
from .compressed import Compressed, machine_of, sha256
from .files import is_stdout, replace_file, require_writable
from .lanes import code_lanes, default_lanes, lane_borders, reproducible
from .progress import ProgressLine

if TYPE_CHECKING:
    from .model import STLM

SUFFIX = ".stlm"
EXTRA = ("safetensors", "tqdm")


def compress(
    model: STLM,
    data: bytes,
    *,
    checkpoint: str,
    lanes: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> bytes:
    """A file from which `decompress` makes data again, with the same model.

    Args:
        data: any bytes.
        checkpoint: SHA-256 in hexadecimal that the model is known by: `Checkpoint.digest`.
        lanes: parts that are coded side by side, each as a document of its own: more are faster,
            fewer are smaller. None is one for every 4 KiB, at most 64.
        on_progress: called with how many bytes are done.

    Raises:
        ValueError: for lanes below 1 or more than bytes, a model that writes no bytes,
            and one whose logits are not finite.
    """
    lanes = default_lanes(len(data)) if lanes is None else lanes
    if not 1 <= lanes <= max(1, len(data)):
        raise ValueError(f"lanes: expected 1 to the number of bytes {len(data)}, got {lanes}")
    encoders = [Encoder() for _ in range(lanes)]
    borders = lane_borders(len(data), lanes)

    def encode(step: int, rows: Sequence[int], cumulative: NDArray[np.int64]) -> list[int]:
        found = [data[borders[lane] + step] for lane in rows]
        starts = cumulative[rows, found].tolist()
        ends = cumulative[rows, [byte + 1 for byte in found]].tolist()
        for lane, start, end in zip(rows, starts, ends, strict=True):
            encoders[lane].encode(start, end)
        if on_progress is not None:
            on_progress(step * lanes + len(rows))
        return found

    with reproducible(model):
        code_lanes(model, len(data), lanes, encode)
    return Compressed(
        checkpoint=checkpoint,
        content=sha256(data),
        length=len(data),
        context=model.config.context,
        machine=machine_of(model.embedding.weight.device),
        codes=tuple(encoder.finish() for encoder in encoders),
    ).pack()


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Compress a file; 1 and a line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    source: Path = options.file
    try:
        require_extra(EXTRA)
        out = options.out or new_file(source.with_name(source.name + SUFFIX))
        require_writable(out)
        data = source.read_bytes()
        checkpoint = load_checkpoint(options.run)
        with FileProgress(len(data)) as progress:
            file = compress(
                model_of(checkpoint),
                data,
                checkpoint=checkpoint.digest,
                lanes=options.lanes,
                on_progress=progress,
            )
        replace_file(out, file)
    except (ValueError, ImportError, OSError) as error:
        note(f"error: {error}")
        return 1
    # Text on standard output would become part of a file that is written there.
    report = sys.stderr if is_stdout(out) else sys.stdout
    print(f"{out}: {len(data):,} bytes in {progress.seconds:.1f} s", file=report)
    sizes = {
        "stlm": len(file),
        "gzip -9": len(gzip.compress(data, 9)),
        "xz -9": len(lzma.compress(data, preset=9)),
    }
    for name, size in sizes.items():
        bits = f"  {8 * size / len(data):.4f} bits per byte" if data else ""
        print(f"{name:8}{size:>12,} bytes{bits}", file=report)
    return 0


class FileProgress:
    """Shows how many bytes of a file are done, and how fast."""

    def __init__(self, length: int) -> None:
        self.length, self.seconds = length, 0.0
        self._line, self._began = ProgressLine(), time.monotonic()

    def __call__(self, done: int) -> None:
        speed = done / (time.monotonic() - self._began + 1e-9)
        self._line.update(done / self.length, f"{done:,} bytes, {speed:,.0f} bytes/s")

    def __enter__(self) -> FileProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self._line.close()


def new_file(path: Path) -> Path:
    """The path, or a ValueError where something has that name that nobody asked to replace."""
    if os.path.lexists(path):  # a link to nothing counts
        raise ValueError(f"{path}: exists already; name the file to write with -o")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("stlm_models.compress", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder with a checkpoint")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "-o", "--out", type=Path, help=f"default: FILE{SUFFIX}, where there is none"
    )
    parser.add_argument(
        "--lanes", type=int, help="parts coded side by side; default: one per 4 KiB"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
