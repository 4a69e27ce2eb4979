"""Containers by their first bytes: documents can be read from some, not from all.

Trained on as it is, a container would teach a model the noise of its compression.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

HEAD_BYTES = 512
SAMPLE_BYTES = 1 << 16
CONTROL_SHARE = 1 / 64
"""Text has fewer control characters; a file of 16-bit token ids has far more."""
SHORT_MAGIC = 5
"""Printable magic numbers below this length may begin a text, too."""

UNPACK = "unpack it first"
DECOMPRESS = "decompress it first (zstd -d FILE, or the package zstandard)"
COLUMN = "write its text column as .jsonl first, with the package datasets or pyarrow"
EXPORT = "export its text first"
ORIGINAL = "name the text that they were made of"
LEAVE = "leave it out, naming other files or a glob of them"


@dataclass(frozen=True)
class Container:
    """A kind of file that is not its own text.

    Args:
        what: its name with an article.
        way_out: what its owner can do; None where documents can be read from it.
    """

    what: str
    way_out: str | None = None


GZIP, BZ2 = Container("a gzip file"), Container("a bzip2 file")
XZ, ZSTD = Container("an xz file"), Container("a Zstandard file")
ZIP, TAR = Container("a zip archive"), Container("a tar archive")
NPY = Container("a NumPy array")
TOKENS = Container("a .bin file that is no text, as of token ids", ORIGINAL)
SAFETENSORS = Container("a safetensors file", LEAVE)
HAS_ZSTD = sys.version_info >= (3, 14)

_BZ2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
"""Magic that follows the header: pi, and the root of pi where there is nothing in it."""
_AT_START: dict[bytes, Container] = {
    b"\x1f\x8b": GZIP,
    **{b"BZh%d%s" % (n, block): BZ2 for n in range(1, 10) for block in _BZ2_BLOCKS},
    b"\xfd7zXZ\0": XZ,
    b"\x5d\0\0": XZ,  # its predecessor, .lzma
    b"\x28\xb5\x2f\xfd": ZSTD if HAS_ZSTD else Container(ZSTD.what, DECOMPRESS),
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,
    b"\x93NUMPY": NPY,
    **dict.fromkeys((b"\x1f\x9d", b"\x1f\xa0"), Container("a compress (.Z) file", UNPACK)),
    b"\x04\x22\x4d\x18": Container("an LZ4 file", UNPACK),
    **{
        bytes((n, 0x2A, 0x4D, 0x18)): Container("a Zstandard or LZ4 file", UNPACK)
        for n in range(0x50, 0x60)  # frames to skip, which pzstd begins with
    },
    b"\xff\x06\0\0sNaPpY": Container("a Snappy file", UNPACK),
    b"LZIP": Container("an lzip file", UNPACK),
    b"7z\xbc\xaf\x27\x1c": Container("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": Container("a RAR archive", UNPACK),
    b"!<arch>\n": Container("an ar archive", UNPACK),
    b"PAR1": Container("a Parquet file", COLUMN),
    b"ARROW1\0\0": Container("an Arrow file", COLUMN),
    b"\xff\xff\xff\xff": Container("an Arrow stream", COLUMN),
    b"FEA1": Container("a Feather file", COLUMN),
    b"ORC": Container("an ORC file", COLUMN),
    b"Obj\x01": Container("an Avro file", EXPORT),
    b"\x89HDF\r\n\x1a\n": Container("an HDF5 file", EXPORT),
    b"SQLite format 3\0": Container("an SQLite database", EXPORT),
    b"MMIDIDX\0\0": Container("an index of token ids", ORIGINAL),
    b"GGUF": Container("a GGUF file", LEAVE),
    **{bytes((0x80, n)): Container("a pickle, as of old torch.save", EXPORT) for n in range(2, 6)},
    b"\x89PNG\r\n\x1a\n": Container("a PNG image", LEAVE),
    b"\xff\xd8\xff": Container("a JPEG image", LEAVE),
    **dict.fromkeys((b"GIF87a", b"GIF89a"), Container("a GIF image", LEAVE)),
    **dict.fromkeys((b"II*\0", b"MM\0*"), Container("a TIFF image", LEAVE)),
    b"\0\0\x01\0": Container("an icon", LEAVE),
    b"8BPS": Container("a Photoshop image", LEAVE),
    b"fLaC": Container("a FLAC recording", LEAVE),
    b"OggS": Container("an Ogg recording", LEAVE),
    b"ID3": Container("an MP3 recording", LEAVE),
    b"\x1aE\xdf\xa3": Container("a Matroska or WebM video", LEAVE),
    b"RIFF": Container("a RIFF file (WAV, AVI or WebP)", LEAVE),
    **dict.fromkeys((b"wOFF", b"wOF2", b"OTTO"), Container("a font", LEAVE)),
    b"\0\x01\0\0\0": Container("a font", LEAVE),
    b"%PDF-": Container("a PDF document", EXPORT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": Container("an old Office document", EXPORT),
    b"\x7fELF": Container("an ELF executable", LEAVE),
    b"MZ": Container("a Windows executable", LEAVE),
    **dict.fromkeys(
        (b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe"),
        Container("a Mach-O executable", LEAVE),
    ),
    b"\xca\xfe\xba\xbe": Container("a Java class or Mach-O executable", LEAVE),
    b"\0asm": Container("a WebAssembly module", LEAVE),
}
_LATER: tuple[tuple[int, bytes, Container], ...] = (
    (257, b"ustar", TAR),
    (4, b"ftyp", Container("an MP4 or HEIC file", LEAVE)),
    (1, b"\r\r\n", Container("a file of Python bytecode", LEAVE)),
    (1, b"\x0e\r\n", Container("a file of Python bytecode", LEAVE)),
)
_IN_A_ZIP: tuple[tuple[str, Container], ...] = (
    ("data.pkl", Container("a file of torch.save", LEAVE)),
    ("[Content_Types].xml", Container("an Office document", EXPORT)),
    ("mimetype", Container("an OpenDocument or EPUB document", EXPORT)),
    ("AndroidManifest.xml", Container("an Android package", LEAVE)),
    ("META-INF/MANIFEST.MF", Container("a Java archive", LEAVE)),
)


def container_of(head: bytes, size: int) -> Container | None:
    """Find the container that begins with these bytes (512, or all) and is `size` long, or None."""
    for magic, container in _AT_START.items():
        if head.startswith(magic) and (looks_binary(head) or not _may_begin_a_text(magic)):
            return container
    for at, magic, container in _LATER:
        if head[at : at + len(magic)] == magic and looks_binary(head):
            return container
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= header <= size - 8:
        return SAFETENSORS
    if head[:2] == b"BM" and int.from_bytes(head[2:6], "little") == size:
        return Container("a BMP image", LEAVE)
    return None


def _may_begin_a_text(magic: bytes) -> bool:
    return len(magic) < SHORT_MAGIC and magic.isascii() and magic.decode().isprintable()


def zip_of(names: list[str]) -> Container | None:
    """Name what a zip archive with these members is besides, None where it is just that."""
    for name, container in _IN_A_ZIP:
        if any(member == name or member.endswith(f"/{name}") for member in names):
            return container
    if names and all(name.endswith(".npy") for name in names):
        return Container("a .npz archive of arrays", EXPORT)
    return None


def looks_binary(data: bytes | memoryview) -> bool:
    """Tell whether the first 64 KiB have a NUL, or more control characters than a text."""
    counts = np.bincount(np.frombuffer(data[:SAMPLE_BYTES], np.uint8), minlength=256)
    control = counts[:32].sum() - counts[[*b"\t\n\v\f\r\x1b"]].sum()
    return bool(counts[0]) or control > CONTROL_SHARE * counts.sum()
