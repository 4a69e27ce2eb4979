"""The format of a compressed file: a header, the sizes of the streams' codes, the codes.

All numbers are little-endian. A checksum over the file tells damage from the other reason why a
text may not come back: arithmetic that gives other probabilities than it did for the writer.
"""

from __future__ import annotations

import hashlib
import platform
import struct
import zlib
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

SUFFIX = ".stlm"
MAGIC = b"STLM"
VERSION = 1
FRONT = struct.Struct("<4sBI")
"""Magic, version, CRC-32 of all that follows."""
HEADER = struct.Struct("<32s32sQIIH")
SIZE = struct.Struct("<I")


@dataclass(frozen=True)
class Compressed:
    """Content of a compressed file.

    Args:
        checkpoint: SHA-256 of the model that wrote it, in hexadecimal; see `Checkpoint.digest`.
        content: SHA-256 of the text, in hexadecimal.
        length: bytes of the text.
        context: the model's.
        machine: what it computed with, in words.
        codes: one for each stream of the text.
    """

    checkpoint: str
    content: str
    length: int
    context: int
    machine: str
    codes: tuple[bytes, ...]

    def pack(self) -> bytes:
        """The file."""
        machine = self.machine.encode()
        header = HEADER.pack(
            bytes.fromhex(self.checkpoint),
            bytes.fromhex(self.content),
            self.length,
            self.context,
            len(self.codes),
            len(machine),
        )
        sizes = (SIZE.pack(len(code)) for code in self.codes)
        body = b"".join((header, machine, *sizes, *self.codes))
        return FRONT.pack(MAGIC, VERSION, zlib.crc32(body)) + body


def unpack(file: bytes) -> Compressed:
    """Unpack a file of `Compressed.pack`.

    Raises:
        ValueError: for anything that is not such a file, whole and undamaged.
    """
    if file[:4] != MAGIC:
        raise ValueError("file: expected one of stlm_models.compress, got something else")
    if len(file) < FRONT.size + HEADER.size:
        raise ValueError(f"file: damaged, it ends after {len(file)} bytes, within its header")
    _, version, checksum = FRONT.unpack_from(file)
    if version != VERSION:
        raise ValueError(f"file: expected format version {VERSION}, got {version}")
    body = memoryview(file)[FRONT.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError("file: damaged, its checksum does not fit its content")
    checkpoint, content, length, context, streams, named = HEADER.unpack_from(body)
    sizes_at = HEADER.size + named
    codes_at = sizes_at + streams * SIZE.size
    if not 1 <= streams <= max(1, length) or codes_at > len(body):
        raise ValueError(
            f"file: expected 1 to {max(1, length)} streams and their codes, got {streams}"
        )
    machine = bytes(body[HEADER.size : sizes_at]).decode()
    sizes = (size for (size,) in SIZE.iter_unpack(body[sizes_at:codes_at]))
    boundaries = accumulate(sizes, initial=codes_at)
    codes = tuple(bytes(body[begin:end]) for begin, end in pairwise(boundaries))
    return Compressed(checkpoint.hex(), content.hex(), length, context, machine, codes)


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def machine_of(device: torch.device) -> str:
    """Name all that probabilities depend on besides the model: torch, and the kind of device."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__} on {device.type} ({kind})"
