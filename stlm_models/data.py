"""Corpora as bytes, and training windows that a seed and a step number determine."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .config import BOS_ID, IGNORED
from .corpus_files import CorpusFile, find_files
from .documents import Documents, contents
from .loader import Batch, Patcher

Document = bytes | memoryview | NDArray[np.int32]
"""Real bytes, in memory or in a mapped file, or ids (N,) of a vocabulary."""
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
    """

    name: str
    train: Sequence[bytes | memoryview]
    held_out: list[bytes]
    notes: tuple[str, ...] = ()
    """What was left out, unpacked or not read as its name suggests, a line for each kind."""

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
    return [piece for piece in train if piece], [piece for piece in held_out if piece]


class DocumentStream:
    """The ids of all documents behind each other, id 256 before each, made when they are read.

    `stream[start:stop]` is int16, or int32 where documents are ids of a vocabulary.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        lengths = np.fromiter((len(document) + 1 for document in documents), np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        dtypes = {document.dtype for document in documents if isinstance(document, np.ndarray)}
        self._dtype = np.result_type(np.int16, *dtypes)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice) -> NDArray[np.integer]:
        start, stop, _ = index.indices(len(self))
        ids = np.full(stop - start, BOS_ID, self._dtype)
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        while self._starts[at] < stop:
            body, end = int(self._starts[at]) + 1, int(self._starts[at + 1])
            first, last = max(start, body), min(stop, end)
            if first < last:
                ids[first - start : last - start] = _ids(self._documents[at])[
                    first - body : last - body
                ]
            at += 1
        return ids

    def most_documents(self, length: int) -> int:
        """The most documents that any `length` ids in a row belong to, the first one cut or not."""
        # Behind a document's first id, as many may begin as in the densest piece of the stream.
        starts = self._starts[:-1]
        begun = np.searchsorted(starts, starts + length - 1) - np.arange(len(starts))
        return 1 + int(begun.max())


def _ids(document: Document) -> NDArray[np.integer]:
    return document if isinstance(document, np.ndarray) else np.frombuffer(document, np.uint8)


class TrainingWindows:
    """Windows of `context` ids from documents, bytes or ids, that each start with id 256.

    Batch `step` of a seed is always the same, so a resumed run needs no state. An epoch shows every
    window once, in an order and at an offset of its own. With `max_patches`, batches
    have static shapes: behind their documents stand empty ones.

    Args:
        documents: at least one window's worth of ids.
        context: ids in a window.
        rows: windows in a batch, over all processes.
        seed: of the order and the offsets.
        patcher: finds the patches of each batch; None finds none.
        rank, world: this process reads its share of the rows, and all together what one would.

    Raises:
        ValueError: where the documents are shorter than a window, or rows cannot be shared evenly.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        context: int,
        rows: int,
        seed: int,
        patcher: Patcher | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if rows < 1 or rows % world:
            expected = "at least 1" if world == 1 else f"a multiple of the {world} processes"
            raise ValueError(f"rows: expected {expected}, got {rows}")
        n_bytes = sum(map(len, documents))
        if n_bytes < context:
            raise ValueError(
                f"data: expected at least one window of {context} bytes to train on, got {n_bytes}"
            )
        self.ids = DocumentStream(documents)
        self.context, self.rows, self.seed, self.patcher = context, rows, seed, patcher
        self.own_rows = range(rank * rows // world, (rank + 1) * rows // world)
        # One id more than the window is its last target; the offset may use up to a window.
        self.n_windows = max(1, (len(self.ids) - 1) // context - 1)
        self._most_documents: int | None = None
        if getattr(patcher, "max_patches", None) is not None:
            self._most_documents = len(self.own_rows) * self.ids.most_documents(context)

    def batch(self, step: int) -> Batch:
        """This process's windows of a step; id 256 is never a target, and begins a document."""
        starts = [self._start(step * self.rows + row) for row in self.own_rows]
        windows = np.stack([self.ids[start : start + self.context + 1] for start in starts])
        inputs, targets = windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1).astype(np.int64)
        targets[targets == BOS_ID] = IGNORED
        begins = inputs == BOS_ID
        begins[:: self.context] = True
        borders = np.append(np.flatnonzero(begins), len(inputs)).astype(np.int32)
        if self._most_documents is not None:
            empty = self._most_documents + 1 - len(borders)
            borders = np.pad(borders, (0, empty), constant_values=len(inputs))
        byte_ids, cu_seqlens = torch.from_numpy(inputs.copy()), torch.from_numpy(borders)
        patches = None if self.patcher is None else self.patcher(byte_ids, cu_seqlens)
        return Batch(byte_ids, torch.from_numpy(targets), cu_seqlens, patches)

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, self.n_windows)
        offset, order = _epoch_order(self.seed, epoch, self.n_windows, self.context)
        # The last window must end within the stream, whatever the offset.
        return min(offset + int(order[position]) * self.context, len(self.ids) - self.context - 1)


@functools.lru_cache(maxsize=2)
def _epoch_order(
    seed: int, epoch: int, n_windows: int, context: int
) -> tuple[int, NDArray[np.int64]]:
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(context)), random.permutation(n_windows)
