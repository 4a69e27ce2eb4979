"""`python -m stlm_models.decompress --run DIR FILE`: what `stlm_models.compress` was given.

With the checkpoint that compressed it, on the same software and kind of device: probabilities are
floating point, and elsewhere the last bit of one may differ. Then, and for any damaged or foreign
file, there is one line that says so and no output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stlm_kernels.terminal import argument_parser, command, note

from .arithmetic import Decoder, most_symbols
from .checkpoint import load_checkpoint, model_of, require_extra
from .compress import EXTRA, SUFFIX, FileProgress, new_file
from .compressed import Compressed, machine_of, sha256, unpack
from .config import BYTES
from .files import is_stdout, replace_file, require_writable
from .lanes import code_lanes, reproducible

if TYPE_CHECKING:
    from .model import STLM


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
    lanes = len(packed.codes)
    decoders = [Decoder(code) for code in packed.codes]
    parts = [bytearray() for _ in packed.codes]  # grown as they are decoded

    def decode(step: int, rows: Sequence[int], cumulative: NDArray[np.int64]) -> list[int]:
        found = [decoders[lane].decode(cumulative[lane]) for lane in rows]
        for lane, byte in zip(rows, found, strict=True):
            parts[lane].append(byte)
        if on_progress is not None:
            on_progress(step * lanes + len(rows))
        return found

    with reproducible(model):
        code_lanes(model, packed.length, lanes, decode)
    data = b"".join(parts)
    if sha256(data) != packed.content:
        raise ValueError(_other_arithmetic(packed, machine_of(model.embedding.weight.device)))
    return data


def _other_arithmetic(packed: Compressed, machine: str) -> str:
    return (
        "file: undamaged, but this machine computes other probabilities than the one that made it:"
        f" expected {packed.machine}, got {machine}; nothing was written"
    )


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Decompress a file; 1 and a line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    source: Path = options.file
    try:
        require_extra(EXTRA)
        out = options.out or new_file(_without_suffix(source))
        require_writable(out)
        file = source.read_bytes()
        checkpoint = load_checkpoint(options.run)
        with FileProgress(unpack(file).length) as progress:
            data = decompress(
                model_of(checkpoint), file, checkpoint=checkpoint.digest, on_progress=progress
            )
        replace_file(out, data)
    except (ValueError, ImportError, OSError) as error:
        note(f"error: {error}")
        return 1
    # Text on standard output would become part of a file that is written there.
    report = sys.stderr if is_stdout(out) else sys.stdout
    print(f"{out}: {len(data):,} bytes in {progress.seconds:.1f} s", file=report)
    return 0


def _without_suffix(path: Path) -> Path:
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: expected a name in {SUFFIX}; name the file to write with -o")
    return path.with_suffix("")


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("stlm_models.decompress", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder with a checkpoint")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("-o", "--out", type=Path, help=f"default: FILE without {SUFFIX}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
