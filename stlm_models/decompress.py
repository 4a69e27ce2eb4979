"""`python -m stlm_models.decompress --run DIR FILE`: what `stlm_models.compress` was given.

With the checkpoint that compressed it, on the same software and kind of device: probabilities are
floating point, and elsewhere the last bit of one may differ. Then, and for any damaged or foreign
file, there is one line that says so and no output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stlm_kernels.terminal import argument_parser, command, note

from .checkpoint import load_checkpoint, model_of, require_extra
from .compression.codec import decompress
from .compression.file_format import SUFFIX, unpack
from .compression.progress import CODER_EXTRA, FileProgress
from .files import is_stdout, new_file, replace_file, require_writable


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Decompress a file; 1 and a line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    source: Path = options.file
    try:
        require_extra(CODER_EXTRA)
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
