"""`python -m stlm_models.evaluate --run DIR FILE...`: bits per byte of a model on files.

Files hold documents as in training; every byte of each is scored once, in fp32.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from stlm_kernels.terminal import argument_parser, command, note

from .checkpoint import load_checkpoint, model_of, require_extra
from .data.corpus import documents_of
from .evaluation import bits_per_byte


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print bits per byte and the number of bytes; 1 and a line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    try:
        require_extra(["safetensors"])
        found, notes = documents_of(options.files, text_key=options.text_key, raw=options.raw)
        documents = [bytes(document) for document in found]
        checkpoint = load_checkpoint(options.run)
        bits = bits_per_byte(
            model_of(checkpoint),
            documents,
            vocabulary=checkpoint.words,
            context=options.context,
            stride=options.stride,
        )
        if not math.isfinite(bits):
            raise ValueError(f"checkpoint: expected a model whose loss is finite, got {bits}")
    except (ValueError, ImportError, OSError) as error:
        note(f"error: {error}")
        return 1
    if notes:
        note(*notes)
    n_bytes, plural = sum(map(len, documents)), "" if len(documents) == 1 else "s"
    print(f"{bits:.4f} bits per byte, {n_bytes:,} bytes in {len(documents)} document{plural}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("stlm_models.evaluate", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder with a checkpoint")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, folders or globs")
    parser.add_argument("--context", type=int, help="ids in a window (default: the model's)")
    parser.add_argument("--stride", type=int, help="ids between windows (default: half of them)")
    parser.add_argument(
        "--text-key", metavar="KEY", help="field of each line of .jsonl files that is a document"
    )
    parser.add_argument("--raw", action="store_true", help="take the bytes of files as they are")
    return parser


if __name__ == "__main__":
    sys.exit(main())
