"""Corpora as bytes: documents to train on, and those held out for evaluation."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .corpus_files import CorpusFile, find_files
from .documents import Documents, contents

HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 2_000_000
LEFT_OUT_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
# Tables, generated text, or gone in later Pythons.
LEFT_OUT_NAMES = {"encodings", "pydoc_data", "idlelib", "distutils", "lib2to3"}
HELD_OUT_NAMES = {
    "asyncio",
    "concurrent",
    "http",
    "json",
    "logging",
    "pathlib",
    "sqlite3",
    "wsgiref",
    "zipfile",
    "argparse",
    "random",
    "shutil",
    "statistics",
    "tarfile",
    "textwrap",
    "typing",
}


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to judge by, none of them empty.

    Large files are not read into memory: they must not change as long as the corpus is used.

    >>> corpus = Corpus("two documents", [b"to train on"], [b"to judge by"])
    >>> len(corpus.train_sha256)
    64
    """

    name: str
    train: Sequence[bytes | memoryview]
    held_out: list[bytes]
    notes: tuple[str, ...] = ()
    """Notes on files left out, unpacked, or not read as their names suggest, one for each kind."""

    @cached_property
    def train_sha256(self) -> str:
        """SHA-256 of the training documents, computed once."""
        return sha256_of(self.train)

    def describe(self) -> list[str]:
        """A line for each split: number of documents and bytes, SHA-256 of all; then the notes."""
        splits = [
            f"{split}: {len(documents)} documents, {sum(map(len, documents)):,} bytes,"
            f" sha256 {digest}"
            for split, documents, digest in (
                ("train", self.train, self.train_sha256),
                ("held out", self.held_out, sha256_of(self.held_out)),
            )
        ]
        return [*splits, *self.notes]


def load_corpus(
    paths: Sequence[str] | None = None,
    *,
    text_key: str | None = None,
    raw: bool = False,
    out: Path | None = None,
) -> Corpus:
    """The files, folders and glob patterns given, or the default corpus.

    Of given files, in the order of their paths, the last tenth of the bytes is held out, 2 MB at
    most; each file is a document, the one that the cut falls into becomes two. A file counts once,
    whatever its names; hidden files and folders, folders of runs, virtual environments and `out`
    are left out where a folder is walked. gzip, bzip2 and xz files are decompressed, members of zip
    and tar archives are documents of their own, .npy files of uint8 are read, each in memory, 4 GiB
    at most; other containers are refused.

    Args:
        paths: None is the default corpus.
        text_key: the field of each line of .jsonl, .ndjson and .json files that is a document.
        raw: every file as it is, whatever it holds.
        out: the folder of the run that will be trained.

    Raises:
        ValueError: where a path matches no file, all files are empty, or a file is a container that
            is not read, or a damaged one.
        OSError: where a file cannot be read.

    >>> corpus = load_corpus([__file__], raw=True)
    >>> len(corpus.train), len(corpus.held_out)
    (1, 1)
    """
    if isinstance(paths, str):
        raise ValueError(f"data: expected a list of paths, got {paths!r}")
    if not paths:
        if raw or text_key is not None:
            raise ValueError("data: expected paths beside raw or text_key, got none")
        return default_corpus()
    documents, notes = documents_of(paths, text_key=text_key, raw=raw, out=out)
    return Corpus(" ".join(map(str, paths)), *_cut(documents), notes)


def documents_of(
    paths: Sequence[str],
    *,
    text_key: str | None = None,
    raw: bool = False,
    out: Path | None = None,
) -> tuple[list[bytes | memoryview], tuple[str, ...]]:
    """The documents of files, folders and glob patterns, and lines on what was left out.

    Arguments and errors as those of `load_corpus`, with at least one path.
    """
    if raw and text_key is not None:
        raise ValueError(f"text_key: expected None beside raw, got {text_key!r}")
    files, left_out = find_files(paths, out=out)
    reader = Documents(text_key=text_key, raw=raw)
    documents = list(reader.of(files))
    notes = (*left_out, *reader.notes())
    if not documents:
        found = "; ".join((f"only empty files in {' '.join(map(str, paths))}", *notes))
        raise ValueError(f"data: expected at least one byte, got {found}")
    return documents, notes


def default_corpus(root: Path | None = None) -> Corpus:
    """The Python files of the interpreter's standard library, whole modules of it held out.

    Raises:
        ValueError: where the library has no Python files on disk.

    >>> corpus = default_corpus()
    >>> corpus.name.startswith("Python files of ")
    True
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train: list[Path] = []
    held_out: list[Path] = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        top = parts[0].removesuffix(".py")
        if top in LEFT_OUT_NAMES or LEFT_OUT_FOLDERS.intersection(parts[:-1]):
            continue
        (held_out if top in HELD_OUT_NAMES else train).append(file)
    corpus = Corpus(f"Python files of {root}", _read(train), [bytes(x) for x in _read(held_out)])
    if not corpus.train or not corpus.held_out:
        raise ValueError(f"data: expected the standard library's *.py files, got none in {root}")
    return corpus


def sha256_of(documents: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the documents behind each other, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document)
    return digest.hexdigest()


def _read(paths: Iterable[Path]) -> list[bytes | memoryview]:
    files = [CorpusFile([path], path.stat().st_size) for path in paths]
    return [content for _, content in contents(files) if content]


def _cut(documents: list[bytes | memoryview]) -> tuple[list[bytes | memoryview], list[bytes]]:
    """Hold out the last bytes."""
    n_bytes = sum(map(len, documents))
    left = n_bytes - max(1, min(MAX_HELD_OUT, int(HELD_OUT_SHARE * n_bytes)))
    train, held_out = [], []
    for document in documents:
        train.append(document[:left])
        held_out.append(bytes(document[left:]))
        left = max(0, left - len(document))
    return [chunk for chunk in train if chunk], [chunk for chunk in held_out if chunk]
