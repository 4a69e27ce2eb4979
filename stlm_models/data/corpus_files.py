"""Files that a corpus is made of: each once, under any of its names.

A file is known by its device and inode: links, relative and absolute paths and overlapping patterns
name it again, not another one. Files that are named are always read. A walk of a folder leaves out
what is never meant by it (hidden files and folders, runs, the output folder, virtual environments)
and says so.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Identity = tuple[int, int] | str
MAGIC = re.compile(r"[*?[]")
HUB_CACHE = re.compile(r"(datasets|models|spaces)--")
"""Prefixes of folders in a Hugging Face hub cache: blobs/ has files, snapshots/ their names."""
LEFT_OUT = {
    "hidden folder": "hidden folders",
    "hidden file": "hidden files",
    "folder of a run": "folders of runs",
    "output folder": "output folders",
    "virtual environment": "virtual environments",
    "__pycache__ folder": "__pycache__ folders",
    "blobs or refs folder of a hub cache, whose snapshots are read": (
        "blobs and refs folders of hub caches, whose snapshots are read"
    ),
    "link to nothing": "links to nothing",
    "pipe, socket or device": "pipes, sockets and devices",
}
"""Kinds of what a walk leaves out, one and several of them."""


@dataclass
class CorpusFile:
    """A file of a corpus.

    Args:
        names: all paths that lead to it.
        size: in bytes; of what is no regular file (a pipe) 0, whatever it holds.
        is_regular: it can be opened again, and mapped.
    """

    names: list[Path] = field(default_factory=list)
    size: int = 0
    is_regular: bool = True

    @property
    def path(self) -> Path:
        """The first of its names, by which files are ordered."""
        return min(self.names)


def find_files(
    paths: Sequence[str], *, out: Path | None = None
) -> tuple[list[CorpusFile], list[str]]:
    """The files that paths name, in the order of their names, and a line for each kind left out.

    Args:
        paths: files, folders, and glob patterns; one with ** is a walk of the folder it begins in.
            Links are followed; a folder is walked once.
        out: a folder that no walk enters, existing or not.

    Raises:
        ValueError: for a path that leads to no file, and for the output folder itself.
        OSError: where a folder cannot be read.
    """
    search = _Search(out)
    for path in paths:
        search.add(path)
    return sorted(search.found.values(), key=lambda file: file.path), search.notes()


class _Search:
    def __init__(self, out: Path | None) -> None:
        self.found: dict[Identity, CorpusFile] = {}
        self._left_out: dict[str, dict[Identity, Path]] = defaultdict(dict)
        self._walked: set[Identity] = set()
        self._out = identity(out.stat(), out) if out is not None and out.exists() else None
        self._met = 0

    def add(self, path: str) -> None:
        if not path:  # which Path takes for the current folder
            raise ValueError("data: expected a file, a folder with files or a glob, got ''")
        before, named = self._met, Path(path)
        if named.exists():
            self._add_named(named)
        elif "**" in named.parts:
            self._add_pattern(named)
        else:
            for match in map(Path, glob.glob(path)):
                if match.exists():
                    self._add_named(match)
        if self._met == before:
            left_out = "".join(f"; {note}" for note in self.notes())
            expected = "a file, a folder with files or a glob"
            raise ValueError(f"data: expected {expected}, got {path!r}{left_out}")

    def notes(self) -> list[str]:
        """A line for each kind of what was left out."""
        return [
            f"left out: {len(there)} {kind if len(there) == 1 else kinds},"
            f"{'' if len(there) == 1 else ' such as'} {next(iter(there.values()))}"
            for kind, kinds in LEFT_OUT.items()
            if (there := self._left_out.get(kind))
        ]

    def _add_named(self, path: Path) -> None:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            self._add_file(path, status)
            return
        for file, found in self._walk(path):
            self._add_file(file, found)

    def _add_pattern(self, pattern: Path) -> None:
        """Add what a pattern with ** matches; it goes where a walk goes."""
        parts = pattern.parts
        depth = next(i for i, part in enumerate(parts) if MAGIC.search(part))
        base = Path(*parts[:depth])
        if base.is_dir():
            # Other patterns may be about the same folders.
            self._walked.clear()
            for file, status in self._walk(base):
                if _fits(file.relative_to(base).parts, parts[depth:]):
                    self._add_file(file, status)
            self._walked.clear()

    def _add_file(self, path: Path, status: os.stat_result) -> None:
        self._met += 1
        file = self.found.setdefault(identity(status, path), CorpusFile())
        file.is_regular = stat.S_ISREG(status.st_mode)
        file.size = status.st_size if file.is_regular else 0
        file.names.append(path)

    def _walk(self, root: Path) -> Iterator[tuple[Path, os.stat_result]]:
        """The regular files below a folder."""
        if identity(root.stat(), root) == self._out:
            raise ValueError(f"data: expected another folder than the output folder, got {root}")
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            key = identity(folder.stat(), folder)
            if key in self._walked:
                self._met += folder == root  # its files were found by an earlier path
                continue
            self._walked.add(key)
            names = sorted(os.listdir(folder))
            is_hub_cache = {"blobs", "snapshots"} <= {*names} and bool(
                HUB_CACHE.match(folder.resolve().name)
            )
            for name in names:
                path = folder / name
                status = self._status(path)
                kind = self._kind_left_out(path, status, is_hub_cache)
                if kind is not None:
                    self._left_out[kind][
                        str(path) if status is None else identity(status, path)
                    ] = path
                elif status is not None and stat.S_ISDIR(status.st_mode):
                    waiting.append(path)
                elif status is not None:
                    yield path, status

    def _status(self, path: Path) -> os.stat_result | None:
        """None for a link to nothing, or to itself."""
        try:
            return path.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None
            raise

    def _kind_left_out(
        self, path: Path, status: os.stat_result | None, is_in_hub_cache: bool
    ) -> str | None:
        is_folder = status is not None and stat.S_ISDIR(status.st_mode)
        if path.name.startswith("."):
            return "hidden folder" if is_folder else "hidden file"
        if status is None:
            return "link to nothing"
        if not is_folder:
            return None if stat.S_ISREG(status.st_mode) else "pipe, socket or device"
        if identity(status, path) == self._out:
            return "output folder"
        if path.name == "__pycache__":
            return "__pycache__ folder"
        if (path / "pyvenv.cfg").is_file():
            return "virtual environment"
        if _is_run(path):
            return "folder of a run"
        if is_in_hub_cache and path.name in ("blobs", "refs"):
            return "blobs or refs folder of a hub cache, whose snapshots are read"
        return None


def _is_run(folder: Path) -> bool:
    """Tell whether `stlm_models.train` wrote it, or a Trainer."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and (
        (folder / "metrics.jsonl").is_file() or any(checkpoints.glob("step-*/manifest.json"))
    )


def identity(status: os.stat_result, path: Path) -> Identity:
    """Identity of a file or folder, which all its names have in common."""
    # File systems without inodes give 0 to everything.
    return (status.st_dev, status.st_ino) if status.st_ino else str(path.resolve())


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether a path matches a pattern, both by their parts; ** is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[at:], pattern[1:]) for at in range(len(parts) + 1))
    return (
        bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
    )
