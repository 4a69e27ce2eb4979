"""`python -m stlm_models.compress --run DIR FILE`: as small as the model predicts it.

Arithmetic coding by the model's own probabilities, which makes its bits per byte real: a model
that looks ahead cannot be decoded by. `python -m stlm_models.decompress` gives the same bytes back
on the same software and kind of device, because probabilities are floating point; elsewhere it may
refuse, and never gives other bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stlm_kernels.terminal import argument_parser, command, note

from .checkpoint import load_checkpoint, model_of, require_extra
from .compression.codec import compress
from .compression.file_format import SUFFIX
from .compression.progress import CODER_EXTRA, FileProgress
from .data.compressors import compressed_sizes
from .files import is_stdout, new_file, replace_file, require_writable


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Compress a file; 1 and a line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    source: Path = options.file
    try:
        require_extra(CODER_EXTRA)
        out = options.out or new_file(source.with_name(source.name + SUFFIX))
        require_writable(out)
        data = source.read_bytes()
        checkpoint = load_checkpoint(options.run)
        with FileProgress(len(data)) as progress:
            file = compress(
                model_of(checkpoint),
                data,
                checkpoint=checkpoint.digest,
                streams=options.streams,
                on_progress=progress,
            )
        replace_file(out, file)
    except (ValueError, ImportError, OSError) as error:
        note(f"error: {error}")
        return 1
    # Text on standard output would become part of a file that is written there.
    report = sys.stderr if is_stdout(out) else sys.stdout
    print(f"{out}: {len(data):,} bytes in {progress.seconds:.1f} s", file=report)
    sizes = {"stlm": len(file), **compressed_sizes(data)}
    for name, size in sizes.items():
        bits = f"  {8 * size / len(data):.4f} bits per byte" if data else ""
        print(f"{name:9}{size:>12,} bytes{bits}", file=report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("stlm_models.compress", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder with a checkpoint")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "-o", "--out", type=Path, help=f"default: FILE{SUFFIX}, where there is none"
    )
    parser.add_argument(
        "--streams", type=int, help="parts coded side by side; default: one per 4 KiB"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
