"""`python -m stlm_models.generate --run DIR --prompt TEXT`: continue a text with a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stlm_kernels.terminal import argument_parser, bytes_of, command, note

from .checkpoint import load_model, require_extra


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the prompt and what the model makes of it; 1 and a line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    try:
        require_extra(["safetensors"])
        model = load_model(options.run)
        prompt = bytes_of(options.prompt)
        chunks = model.stream(
            prompt,
            max_new_bytes=options.max_new_bytes,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop=[bytes_of(stop) for stop in options.stop],
        )
    except (ValueError, ImportError, OSError) as error:
        note(f"error: {error}")
        return 1
    print(prompt.decode("utf-8", "backslashreplace"), end="", flush=True)
    try:
        for chunk in chunks:
            print(chunk, end="", flush=True)
    except FloatingPointError as error:
        note("", f"error: {error}")
        return 1
    print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("stlm_models.generate", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder with a checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue; empty begins a document")
    parser.add_argument("--max-new-bytes", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, help="same seed, same text")
    parser.add_argument(
        "--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end before any"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
