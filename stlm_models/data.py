"""Corpora as bytes, and training windows that a seed and a step number determine.

A `Loader` makes windows and their patches in a thread, while the model computes.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stlm_kernels import Patches

from .config import DOCUMENT_START, ModelConfig
from .layers import BytePatcher

Patcher = Callable[[Tensor, Tensor], Patches]
"""The patches of packed byte_ids (T,) with document borders cu_seqlens (S+1,)."""

IGNORED = -100
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
    """Documents to train on and documents to judge by, none of them empty."""

    name: str
    train: list[bytes]
    held_out: list[bytes]

    def describe(self) -> list[str]:
        """A line for each split: number of documents and bytes, SHA-256 of their concatenation."""
        return [
            f"{split}: {len(documents)} documents, {sum(map(len, documents)):,} bytes,"
            f" sha256 {sha256_of(documents)}"
            for split, documents in (("train", self.train), ("held out", self.held_out))
        ]


def load_corpus(paths: Sequence[str] | None = None) -> Corpus:
    """The files, folders and glob patterns given, or the default corpus.

    Of given files, in the order of their paths, the last tenth of the bytes is held out, 2 MB at
    most; each file is a document, the one that the cut falls into becomes two.

    Raises:
        ValueError: where a path matches no file, or all files are empty.
        OSError: where a file cannot be read.
    """
    if not paths:
        return default_corpus()
    documents = _read(sorted({file for path in paths for file in _files(path)}))
    name = " ".join(paths)
    if not documents:
        raise ValueError(f"data: expected at least one byte, got only empty files in {name}")
    return Corpus(name, *_cut(documents))


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
    corpus = Corpus(f"Python files of {root}", _read(train), _read(held_out))
    if not corpus.train or not corpus.held_out:
        raise ValueError(f"data: expected the standard library's *.py files, got none in {root}")
    return corpus


def sha256_of(documents: Iterable[bytes]) -> str:
    """SHA-256 of the documents behind each other, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document)
    return digest.hexdigest()


def _files(path: str) -> list[Path]:
    if Path(path).is_dir():
        found = [file for file in Path(path).rglob("*") if file.is_file()]
    elif Path(path).exists():
        found = [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]
    if not found:
        raise ValueError(f"data: expected a file, a folder with files or a glob, got {path!r}")
    return found


def _read(files: Iterable[Path]) -> list[bytes]:
    return [data for file in files if (data := file.read_bytes())]


def _cut(documents: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Hold out the last bytes."""
    n_bytes = sum(map(len, documents))
    left = n_bytes - max(1, min(MAX_HELD_OUT, int(HELD_OUT_SHARE * n_bytes)))
    train, held_out = [], []
    for document in documents:
        train.append(document[:left])
        held_out.append(document[left:])
        left = max(0, left - len(document))
    return [piece for piece in train if piece], [piece for piece in held_out if piece]


def patcher_of(config: ModelConfig) -> Patcher | None:
    """What finds the patches that a model of this shape reads; None where it reads none.

    Raises:
        ValueError: where the config leaves patches to the caller.
    """
    if config.patch_rule == "none":
        return None
    if config.patch_rule == "given":
        raise ValueError('patcher: expected one of your own with patch_rule "given", got None')
    return BytePatcher(
        config.patch_rule,
        patch_size=config.patch_size,
        max_patch_len=config.max_patch_len,
        capacity=getattr(config, "patch_capacity", None),
    )


@dataclass(frozen=True)
class Batch:
    """Windows of the corpus, packed."""

    byte_ids: Tensor  # (T,) int16
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (S+1,) int32
    patches: Patches | None = None

    @property
    def n_bytes(self) -> int:
        return self.byte_ids.shape[0]

    @property
    def lost_patches(self) -> Tensor:
        """0-d, on the device: how many patches found no slot."""
        if self.patches is None:
            return self.byte_ids.new_zeros((), dtype=torch.int32)
        return (self.patches.n_patches - (len(self.patches.cu_patchlens) - 1)).clamp(min=0)

    def to(self, device: torch.device) -> Batch:
        """The same on a device; a copy to a GPU from pinned memory is not waited for."""
        return self._each(lambda x: x.to(device, non_blocking=device.type == "cuda"))

    def pinned(self) -> Batch:
        """The same in memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.byte_ids),
            change(self.targets),
            change(self.cu_seqlens),
            None if self.patches is None else Patches(*map(change, self.patches)),
        )


class Loader:
    """Batches by their index; a thread makes the next ones before they are asked for.

    Args:
        make: the batch of an index, always the same one.
        device: where the batches go.
        ahead: how many are kept ready, at most.
    """

    def __init__(
        self, make: Callable[[int], Batch], device: torch.device, *, ahead: int = 2
    ) -> None:
        self._make, self._device, self._ahead = make, device, ahead
        self._thread: ThreadPoolExecutor | None = None
        self._made: dict[int, Future[Batch]] = {}

    def batch(self, index: int) -> Batch:
        """The batch of an index, on the device.

        Raises:
            Exception: what `make` raised for it.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "stlm-loader")
        wanted = range(index, index + 1 + self._ahead)
        for other in self._made.keys() - set(wanted):
            self._made.pop(other).cancel()
        for at in wanted:
            if at not in self._made:
                self._made[at] = self._thread.submit(self._on_host, at)
        return self._made.pop(index).result().to(self._device)

    def close(self) -> None:
        """End the thread; the next batch starts another."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = None
        self._made.clear()

    def _on_host(self, index: int) -> Batch:
        batch = self._make(index)
        return batch.pinned() if self._device.type == "cuda" else batch


class TrainingWindows:
    """Windows of `context` ids from documents that each start with id 256.

    Batch `step` of a seed is always the same, so a resumed run needs no state. An epoch shows every
    window once, in an order and at an offset of its own.

    Args:
        documents: at least one window's worth of bytes.
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
        documents: list[bytes],
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
        self.ids = document_stream(documents)
        self.context, self.rows, self.seed, self.patcher = context, rows, seed, patcher
        self.own_rows = range(rank * rows // world, (rank + 1) * rows // world)
        # One id more than the window is its last target; the offset may use up to a window.
        self.n_windows = max(1, (len(self.ids) - 1) // context - 1)

    def batch(self, step: int) -> Batch:
        """This process's windows of a step; id 256 is never a target, and begins a document."""
        starts = [self._start(step * self.rows + row) for row in self.own_rows]
        index = np.asarray(starts)[:, None] + np.arange(self.context + 1)
        windows = self.ids[index]
        inputs, targets = windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1).astype(np.int64)
        targets[targets == DOCUMENT_START] = IGNORED
        begins = inputs == DOCUMENT_START
        begins[:: self.context] = True
        borders = np.append(np.flatnonzero(begins), len(inputs)).astype(np.int32)
        byte_ids, cu_seqlens = torch.from_numpy(inputs.copy()), torch.from_numpy(borders)
        patches = None if self.patcher is None else self.patcher(byte_ids, cu_seqlens)
        return Batch(byte_ids, torch.from_numpy(targets), cu_seqlens, patches)

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, self.n_windows)
        offset, order = _epoch_order(self.seed, epoch, self.n_windows, self.context)
        # The last window must end within the stream, whatever the offset.
        return min(offset + int(order[position]) * self.context, len(self.ids) - self.context - 1)


def document_stream(documents: Iterable[bytes]) -> NDArray[np.int16]:
    """All documents behind each other, id 256 before each."""
    start = np.array([DOCUMENT_START], np.int16)
    pieces = [piece for text in documents for piece in (start, np.frombuffer(text, np.uint8))]
    return np.concatenate(pieces, dtype=np.int16)


@functools.lru_cache(maxsize=2)
def _epoch_order(
    seed: int, epoch: int, n_windows: int, context: int
) -> tuple[int, NDArray[np.int64]]:
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(context)), random.permutation(n_windows)
