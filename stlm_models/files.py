"""Writing files: the named file has the old content or the new, and no other file changes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECONDS_FOR_A_READER = 10.0
"""Seconds that writing to a FIFO waits for a process that reads from it."""


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it has the old content or the new, never a part.

    A regular file is replaced by one that is written beside it under a random name. Links are
    followed and stay, also those whose target is yet to be made. The permission bits stay, and the
    owner where the system allows it; a new file gets what the umask leaves. The name gets a new
    inode: other hard links of the file keep the old content.

    Whatever else has the name is written to and stays what it is: a FIFO (which waits for its
    reader), a device, or one of this process's descriptors, such as /dev/stdout.

    Args:
        path: of the file; its folder must exist.
        data: the whole content.

    Raises:
        OSError: naming path, where it cannot be written: a missing or read-only folder, a
            read-only file, a full device, a FIFO that no process reads from. The old content stays,
            and no other file does.
    """
    with _naming(path):
        descriptor, found = _own_descriptor(path), _status(path)
        if descriptor is not None:
            with FileIO(os.dup(descriptor), "w") as file:
                _write_all(file, data)
        elif found is None or stat.S_ISREG(found.st_mode):
            _replace(Path(os.path.realpath(path)), found, data)
        else:
            with _open_special(path, found) as file:
                _write_all(file, data)


def write_png(path: Path, figure: Figure, *, dpi: int) -> None:
    """Draw a figure of matplotlib into a file, as `replace_file` does."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    replace_file(path, picture.getvalue())


def require_writable(path: Path) -> None:
    """Raise the OSError now that `replace_file` would raise later, after the work.

    Nothing is written to the file, and none is made; a full device shows only when it is filled.
    """
    with _naming(path):
        found = _status(path)
        if _own_descriptor(path) is None and (found is None or stat.S_ISREG(found.st_mode)):
            target = Path(os.path.realpath(path))
            _refuse_read_only(target, found)
            unfinished, file = _create_beside(target)
            file.close()
            unfinished.unlink()
        elif found is not None and stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def is_stdout(path: Path) -> bool:
    """Tell whether the path stands for the standard output of this process, as /dev/stdout does."""
    return _own_descriptor(path) == 1


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; a synced file may otherwise lose its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(target: Path, found: os.stat_result | None, data: bytes) -> None:
    _refuse_read_only(target, found)
    unfinished, file = _create_beside(target)
    try:
        if found is not None:
            for owner in (-1, found.st_uid):  # the group by itself where the owner is another
                with contextlib.suppress(OSError, AttributeError):  # a system without owners
                    os.chown(unfinished, owner, found.st_gid)
            with contextlib.suppress(OSError):  # a file system without modes
                os.chmod(unfinished, found.st_mode & 0o777)
        with file:
            _write_all(file, data)
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # a folder that cannot be read; the file is there already
        sync_folder(target.parent)


def _create_beside(target: Path) -> tuple[Path, FileIO]:
    """A new empty file in the same folder, open for writing.

    `tempfile` would make it with mode 0600, and the umask that a new file should get cannot be
    asked for without setting it for all threads.
    """
    path = target.with_name(f".stlm-{secrets.token_hex(8)}.part")
    return path, FileIO(path, "x")


def _refuse_read_only(target: Path, found: os.stat_result | None) -> None:
    """A folder that may be written to would let a file be replaced that may not be."""
    if found is not None:
        os.close(os.open(target, os.O_WRONLY))


def _write_all(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _open_special(path: Path, found: os.stat_result) -> FileIO:
    if not stat.S_ISFIFO(found.st_mode):
        return FileIO(path, "w")
    end = time.monotonic() + SECONDS_FOR_A_READER
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > end:
                raise OSError(errno.ENXIO, "No process reads from this FIFO") from None
            time.sleep(0.02)
        else:
            os.set_blocking(descriptor, True)
            return FileIO(descriptor, "w")


def _own_descriptor(path: Path) -> int | None:
    """The number of the descriptor of this process that a path stands for, through any links.

    Its file may be regular: it is then written to at its place, not replaced under its name.
    """
    folders = re.compile(rf"/dev/fd|/proc/{os.getpid()}(/task/\d+)?/fd")
    for _ in range(40):  # as many links as the system follows
        folder, name = os.path.realpath(os.path.dirname(path)), os.path.basename(path)
        if folders.fullmatch(folder) and name.isdecimal():
            return int(name)
        if not os.path.islink(path):
            return None
        path = Path(folder, os.readlink(path))
    return None


def _status(path: Path) -> os.stat_result | None:
    """Status of the file at the end of all links; None where there is none."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors name the file that was asked for: no user knows the one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def new_file(path: Path) -> Path:
    """The path, or a ValueError where something has that name already."""
    if os.path.lexists(path):  # a link to nothing counts
        raise ValueError(f"{path}: exists already; name the file to write with -o")
    return path
