"""Bits per byte of compressors on the held-out bytes of the default corpus, as one file.

gzip, bzip2 and xz; brotli, PPMd and zpaq where brotli and pyppmd are installed and zpaq is on the
path. PPMd and zpaq also after the training text: what the held-out bytes add to one stream.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from stlm_kernels import terminal
from stlm_models.data.compressors import compressed_sizes
from stlm_models.data.corpus import load_corpus

from .harness import environment
from .harness.results import Record, Result, add_result_options, command_line, result_path

AFTER = " after the training text"


def archive_size(data: bytes) -> int:
    """Bytes of the archive that `zpaq -m5` makes of one file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").write_bytes(data)
        command = ["zpaq", "add", "data.zpaq", "data", "-m5", "-t1"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return (Path(folder) / "data.zpaq").stat().st_size


def sizes_of(held_out: bytes, training: bytes) -> dict[str, int]:
    """Return the size of the held-out bytes under each compressor that is here, by its name."""
    sizes = compressed_sizes(held_out, [training])
    if importlib.util.find_spec("brotli"):
        import brotli

        sizes["brotli -q 11 -w 24"] = len(brotli.compress(held_out, quality=11, lgwin=24))
    if shutil.which("zpaq"):
        sizes["zpaq -m5"] = archive_size(held_out)
        sizes["zpaq -m5" + AFTER] = archive_size(training + held_out) - archive_size(training)
    return sizes


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.compressors", __doc__)
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "compressors", parser)
    about = environment.describe(torch.device("cpu"), options.commit)
    corpus = load_corpus(None)
    held_out, training = b"".join(corpus.held_out), b"".join(corpus.train)
    rows: list[Record] = [
        {"compressor": name, "bytes": size, "bits_per_byte": 8 * size / len(held_out)}
        for name, size in sizes_of(held_out, training).items()
    ]
    summary = [f"{row['compressor']:<33} {row['bits_per_byte']:.4f}" for row in rows]
    print(*summary, sep="\n")
    settings = {"corpus": corpus.describe()}
    Result(command_line("bench.compressors", arguments), about, rows, summary, settings).write(path)
    print(path)


if __name__ == "__main__":
    main()
