"""The documents that files hold: plain ones as they are, others unpacked into memory.

gzip, bzip2 and xz files are decompressed, the members of zip and tar archives and of those within
such a file are documents of their own, and so is, on demand, a field of each line of JSON lines.
What is unpacked is counted, and bounded: a file of a megabyte may hold a gigabyte.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import mmap
import sys
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from . import containers
from .containers import BZ2, GZIP, HEAD_BYTES, NPY, TAR, TOKENS, XZ, ZIP, Container
from .corpus_files import CorpusFile

Bytes = bytes | memoryview
LEAST_MAPPED = 1 << 20
MOST_MAPPED = 256
"""Files of a corpus that are mapped rather than read: each keeps a file handle open."""
MOST_UNPACKED = 4 << 30
"""Bytes that all files of a corpus may amount to unpacked: they stay in memory."""
BLOCK = 1 << 20
COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".lzma", ".zst"}
JSON_LINES = {".jsonl", ".ndjson"}
FAILURES = (
    OSError, EOFError, RuntimeError, ValueError, zlib.error,
    lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip
"""Errors of the standard library for a damaged container, or one of a kind that it lacks."""


class Documents:
    """Reads the documents of files, and remembers what is worth saying about them.

    Args:
        text_key: the field of each line of JSON lines that is a document; None takes such files as
            they are.
        raw: take every file as it is.
    """

    def __init__(self, *, text_key: str | None = None, raw: bool = False) -> None:
        self._text_key, self._raw = text_key, raw
        self._unpacked = 0
        self._seen: dict[str, list[str]] = defaultdict(list)

    def of(self, files: Iterable[CorpusFile]) -> Iterator[Bytes]:
        """The documents of all files in their order, none of them empty.

        Raises:
            ValueError: for a container that is not read, or is damaged, for lines without the
                field, and where the files amount to more than 4 GiB unpacked.
            OSError: where a file cannot be read.
        """
        for file, content in contents(list(files)):
            if self._raw:
                found: Iterable[Bytes] = [content]
            else:
                found = self._of_file(file, content)
            yield from (document for document in found if document)

    def notes(self) -> list[str]:
        """Say what was made of files that are not plain, a line for each kind.

        Raises:
            ValueError: where a text_key found no JSON lines.
        """
        if self._text_key is not None and not self._seen["lines"]:
            expected = "a file of JSON lines (.jsonl, .ndjson, .json) among the data"
            raise ValueError(f"text_key: expected {expected}, got none")
        said = {
            "unpacked": f"unpacked or by lines, {self._unpacked:,} bytes in memory",
            "lines": f"JSON lines, of each the field {self._text_key!r} taken",
            "untouched": "JSON lines, read as plain text; --text-key KEY takes a field of each",
            "hidden": "left out, hidden members of archives",
            "binary": "unlike text, read as they are",
        }
        return [
            f"{what}: {len(there)} {'file,' if len(there) == 1 else 'files, such as'} {there[0]}"
            for kind, what in said.items()
            if (there := self._seen[kind])
        ]

    def _of_file(self, file: CorpusFile, content: Bytes) -> Iterable[Bytes]:
        name = str(file.path)
        container = containers.container_of(bytes(content[:HEAD_BYTES]), len(content))
        suffixes = {suffix for path in file.names for suffix in _suffixes(path)}
        if container is None:
            return self._plain(name, suffixes, content, is_unpacked=False)
        _refuse(name, container)
        if container is NPY:
            return [_array(file, content)]
        self._seen["unpacked"].append(name)
        with file.path.open("rb") if file.is_regular else io.BytesIO(content) as stream:
            if container in (ZIP, TAR):
                return self._members(name, container, stream)
            return self._decompressed(name, container, suffixes, stream)

    def _plain(
        self, name: str, suffixes: set[str], content: Bytes, *, is_unpacked: bool = True
    ) -> Iterable[Bytes]:
        if self._text_key is not None and suffixes & {*JSON_LINES, ".json"}:
            self._seen["lines"].append(name)
            if not is_unpacked:
                self._count(name, len(content))
            return _fields(name, content, self._text_key)
        if suffixes & JSON_LINES:
            self._seen["untouched"].append(name)
        elif containers.looks_binary(content):
            if ".bin" in suffixes:
                _refuse(name, TOKENS)
            self._seen["binary"].append(name)
        return [content]

    def _decompressed(
        self, name: str, container: Container, suffixes: set[str], stream: IO[bytes]
    ) -> Iterable[Bytes]:
        with _naming(name, container):
            content = self._whole(name, _decompressed(container, stream))
        inner = containers.container_of(content[:HEAD_BYTES], len(content))
        if inner is TAR:
            return self._members(name, inner, io.BytesIO(content))
        if inner is not None:
            _refuse_nested(name, inner, container)
        return self._plain(name, suffixes, content)

    def _members(self, name: str, container: Container, stream: IO[bytes]) -> list[Bytes]:
        """The files in an archive, in the order of their names."""
        documents: list[Bytes] = []
        with _naming(name, container):
            members = _zip_members(name, stream) if container is ZIP else _tar_members(stream)
            for member, opened in members:
                path = PurePosixPath(member)
                full = f"{name}: {member}"
                if any(_is_hidden(part) for part in path.parts):
                    self._seen["hidden"].append(full)
                    continue
                content = self._whole(full, _blocks(opened()))
                inner = containers.container_of(content[:HEAD_BYTES], len(content))
                if inner is not None:
                    _refuse_nested(full, inner, container)
                documents += self._plain(full, set(_suffixes(path)), content)
        return documents

    def _whole(self, name: str, blocks: Iterable[bytes]) -> bytes:
        """All blocks behind each other, counted while they come."""
        whole = io.BytesIO()
        for block in blocks:
            self._count(name, len(block))
            whole.write(block)
        return whole.getvalue()

    def _count(self, name: str, n_bytes: int) -> None:
        self._unpacked += n_bytes
        if self._unpacked > MOST_UNPACKED:
            raise _Refusal(
                f"data: expected at most {MOST_UNPACKED:,} bytes to unpack into memory, got more"
                f" with {name}: unpack to plain files, which are not held in memory"
            )


class _Refusal(ValueError):
    """A clear line already."""


@contextmanager
def _naming(name: str, container: Container) -> Iterator[None]:
    """Turn a failure of the standard library into one that names the file."""
    try:
        yield
    except _Refusal:
        raise
    except FAILURES as error:
        said = str(error) or type(error).__name__
        raise _Refusal(
            f"data: {name} is {container.what}, damaged or of an unknown kind: {said}"
        ) from None


def contents(files: list[CorpusFile]) -> Iterator[tuple[CorpusFile, Bytes]]:
    """The bytes of files; large ones are mapped, as they must not fill the memory."""
    large = [file for file in files if file.size >= LEAST_MAPPED]
    mapped = {id(file) for file in sorted(large, key=lambda file: -file.size)[:MOST_MAPPED]}
    for file in files:
        yield file, _map(file.path) if id(file) in mapped else file.path.read_bytes()


def _map(file: Path) -> memoryview:
    with file.open("rb") as opened:
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))


def _suffixes(path: PurePosixPath | Path) -> Iterator[str]:
    """The last suffix, beneath that of a compression; a link tells it, too."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    yield from suffixes[-1:]


def _is_hidden(part: str) -> bool:
    """Tell whether a part of a member's name hides it; macOS puts attributes in such folders."""
    return (part.startswith(".") and part != "..") or part == "__MACOSX"


def _refuse(name: str, container: Container) -> None:
    if container.way_out is not None:
        raise _Refusal(
            f"data: {name} is {container.what}, which is not read: {container.way_out}; or --raw"
            " (raw=True) for the bytes of all files as they are"
        )


def _refuse_nested(name: str, inner: Container, outer: Container) -> None:
    _refuse(name, Container(f"{inner.what} within {outer.what}", containers.UNPACK))


def _decompressed(container: Container, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of a compressed file, in blocks."""
    if container is GZIP:
        yield from _blocks(gzip.GzipFile(fileobj=stream))
    elif container is BZ2:
        yield from _streams(bz2.BZ2Decompressor, stream)
    elif container is XZ:
        yield from _streams(lzma.LZMADecompressor, stream)
    elif sys.version_info >= (3, 14):
        from compression import zstd

        yield from _streams(zstd.ZstdDecompressor, stream)


def _blocks(opened: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    with opened:
        yield from iter(lambda: opened.read(BLOCK), b"")


def _streams(decompressor: Callable[[], Any], stream: IO[bytes]) -> Iterator[bytes]:
    """All compressed streams of a file. BZ2File and LZMAFile end at a damaged one as if whole."""
    pending = stream.read(BLOCK)
    while pending:
        one = decompressor()
        while not one.eof:
            if one.needs_input and not pending:
                pending = stream.read(BLOCK)
                if not pending:
                    raise EOFError("it ends too early")
            yield one.decompress(pending, BLOCK)
            pending = b""
        pending = one.unused_data.lstrip(b"\0")  # zeros may pad streams
        while not pending and (block := stream.read(BLOCK)):
            pending = block.lstrip(b"\0")


def _zip_members(name: str, stream: IO[bytes]) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    with zipfile.ZipFile(stream) as archive:
        # Of several members of one name the last counts, as where an archive is unpacked.
        last = {member.filename: member for member in archive.infolist()}
        members = [member for member in last.values() if not member.is_dir()]
        known = containers.zip_of([member.filename for member in members])
        if known is not None:
            _refuse(name, known)
        for member in sorted(members, key=lambda member: member.filename):
            if member.flag_bits & 1:
                _refuse(f"{name}: {member.filename}", Container("encrypted", containers.UNPACK))
            yield member.filename, lambda member=member: archive.open(member)  # type: ignore[misc]


def _tar_members(stream: IO[bytes]) -> Iterator[tuple[str, Callable[[], Any]]]:
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        last = {member.name: member for member in archive.getmembers()}
        members = [member for member in last.values() if member.isreg()]
        for member in sorted(members, key=lambda member: member.name):
            yield member.name, lambda member=member: archive.extractfile(member)  # type: ignore[misc]


def _array(file: CorpusFile, content: Bytes) -> memoryview:
    """The bytes of a .npy file, mapped where it is large."""
    with _naming(str(file.path), NPY):
        if isinstance(content, memoryview):
            array = np.load(file.path, mmap_mode="r", allow_pickle=False)
        else:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        if array.dtype != np.uint8 or array.ndim != 1:
            got = f"{array.dtype} {array.shape}"
            raise _Refusal(f"data: {file.path}: expected an array of uint8 (N,), got {got}")
    return memoryview(array)


def _fields(name: str, content: Bytes, key: str) -> Iterator[bytes]:
    """A field of each line that is not blank."""
    # A mapped file is read by lines itself: it must not fill the memory.
    lines: Any = io.BytesIO(content) if isinstance(content, bytes) else content.obj
    for number, line in enumerate(iter(lines.readline, b""), start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            yield _field(f"{name}, line {number}", text, key)


def _field(place: str, line: bytes, key: str) -> bytes:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise _Refusal(f"data: {place}: expected JSON in UTF-8, got {error}") from None
    got = values
    if isinstance(values, dict):
        got = values.get(key, f"the fields {[*values]}")
    if not isinstance(values, dict) or not isinstance(values.get(key), str):
        raise _Refusal(f"data: {place}: expected text in a field {key!r}, got {got!r:.80}")
    try:
        return values[key].encode()
    except UnicodeEncodeError as error:
        raise _Refusal(f"data: {place}: expected text of whole characters, got {error}") from None
