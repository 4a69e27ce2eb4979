"""Contents of files: plain documents, containers that are read, and those that are refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import sqlite3
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stlm_models.data import documents
from stlm_models.data.containers import container_of, looks_binary
from stlm_models.data.corpus import load_corpus
from stlm_models.data.corpus_files import find_files
from stlm_models.data.documents import Documents
from stlm_models.data.windows import TrainingWindows

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog,", "naïvely"]
TEXT = " ".join(random.Random(0).choices(WORDS, k=2000)).encode()
NEXT = TEXT[::-1]


def load(path: Path, **options: Any) -> list[bytes]:
    """The documents, before a tenth of them is held out."""
    return read(path, **options)[0]


def read(path: Path, **options: Any) -> tuple[list[bytes], list[str]]:
    reader = Documents(**options)
    found = [bytes(document) for document in reader.of(find_files([str(path)])[0])]
    return found, reader.notes()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "a"
        archive.addfile(link)
    return buffer.getvalue()


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "gzip members": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "xz streams": lambda data: lzma.compress(data[:99]) + lzma.compress(data[99:]),
}


class TestCompressed:
    @pytest.mark.parametrize("kind", COMPRESS)
    def test_files_are_told_by_their_bytes(self, tmp_path: Path, kind: str) -> None:
        packed = COMPRESS[kind](TEXT)
        for name in ("text.gz", "text.txt", "9f86"):
            (tmp_path / name).write_bytes(packed)
            found, notes = read(tmp_path / name)
            assert found == [TEXT]
            memory = f"{len(TEXT):,} bytes in memory"
            assert notes == [f"unpacked or by lines, {memory}: 1 file, {tmp_path / name}"]
            corpus = load_corpus([str(tmp_path / name)])
            assert b"".join([*corpus.train, *corpus.held_out]) == TEXT
            assert corpus.describe()[2:] == notes
            assert load(tmp_path / name, raw=True) == [packed]
            (tmp_path / name).unlink()

    @pytest.mark.parametrize("kind", COMPRESS)
    def test_damaged_ones_are_an_error(self, tmp_path: Path, kind: str) -> None:
        packed = bytearray(COMPRESS[kind](TEXT))
        file = tmp_path / "text"
        file.write_bytes(packed[:-20])
        with pytest.raises(ValueError, match=r"data: .*text is an? (gzip|bzip2|xz) file, damaged"):
            load(file)
        packed[len(packed) // 2] ^= 0xFF
        file.write_bytes(packed)
        with pytest.raises(ValueError, match=r"data: .*text is an? (gzip|bzip2|xz) file, damaged"):
            load(file)

    def test_an_empty_one_has_no_document(self, tmp_path: Path) -> None:
        for name, compress in COMPRESS.items():
            (tmp_path / name).write_bytes(compress(b""))
        (tmp_path / "text").write_bytes(TEXT)
        assert load(tmp_path) == [TEXT]

    @pytest.mark.parametrize("suffix", ["", ".tar.gz"])
    def test_through_a_pipe(self, tmp_path: Path, suffix: str) -> None:
        pipe = tmp_path / f"pipe{suffix}"
        os.mkfifo(pipe)
        content = gzip.compress(tarred({"a": TEXT}) if suffix else TEXT)
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        assert load(pipe) == [TEXT]
        writer.join()

    @pytest.mark.parametrize("size", [0, 1, 300])
    def test_what_unpacks_to_too_much(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        """A bomb is given up when the bound is met, not when it has filled the memory."""
        monkeypatch.setattr(documents, "MOST_UNPACKED", 3_000_000)
        (tmp_path / "bomb").write_bytes(gzip.compress(bytes(64 << 20)))
        (tmp_path / "text").write_bytes(TEXT)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"at most 3,000,000 bytes to unpack .* with .*bomb"):
            load(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16 << 20
        (tmp_path / "bomb").unlink()
        for n in range(4):  # together they are too much, as one would be
            (tmp_path / f"{n}.zip").write_bytes(zipped({"a": bytes(800_000)}))
        with pytest.raises(ValueError, match=r"with .*3\.zip: a"):
            load(tmp_path)


class TestArchives:
    @pytest.mark.parametrize("pack", [zipped, tarred])
    def test_members_are_documents(
        self, tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]
    ) -> None:
        members = {"b/2.txt": NEXT, "a.txt": TEXT, "empty": b"", ".DS_Store": b"x", "./c": b"c"}
        members |= {"__MACOSX/a.txt": b"attributes", "d/.git/config": b"x"}
        (tmp_path / "texts").write_bytes(pack(members))
        found, notes = read(tmp_path)
        assert found == [b"c", TEXT, NEXT]
        assert notes[1].startswith("left out, hidden members of archives: 3 files, such as ")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_of_members_of_one_name_the_last_counts(self, tmp_path: Path) -> None:
        """Archives are updated so by `tar -r` and by `zipfile` in mode "a", and unpacked so."""
        with zipfile.ZipFile(tmp_path / "z", "w") as archive:
            archive.writestr("a", NEXT)
            archive.writestr("a", TEXT)
        assert load(tmp_path / "z") == [TEXT]
        with tarfile.open(tmp_path / "z", "w") as updated:
            for text in (NEXT, TEXT):
                member = tarfile.TarInfo("a")
                member.size = len(text)
                updated.addfile(member, io.BytesIO(text))
        assert load(tmp_path / "z") == [TEXT]

    def test_tar_archives_within_compression(self, tmp_path: Path) -> None:
        for name, compress in COMPRESS.items():
            file = tmp_path / name
            file.write_bytes(compress(tarred({"a": TEXT, "b": NEXT})))
            assert load(file) == [TEXT, NEXT]

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_methods_of_zip(self, tmp_path: Path, method: int) -> None:
        (tmp_path / "z").write_bytes(zipped({"a": TEXT}, method))
        assert load(tmp_path / "z") == [TEXT]

    def test_encrypted_members(self, tmp_path: Path) -> None:
        packed = bytearray(zipped({"secret": TEXT}, zipfile.ZIP_STORED))
        for header, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            packed[packed.index(header) + at] |= 1
        (tmp_path / "z").write_bytes(packed)
        with pytest.raises(ValueError, match=r"data: .*z: secret is encrypted, which is not read"):
            load(tmp_path / "z")

    @pytest.mark.parametrize("name", ["method", "checksum", "directory"])
    def test_damaged_ones(self, tmp_path: Path, name: str) -> None:
        packed = bytearray(zipped({"a": TEXT}, zipfile.ZIP_STORED))
        if name == "method":
            for header, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
                packed[packed.index(header) + at] = 77
        elif name == "checksum":
            packed[200] ^= 1
        else:
            packed = packed[:-30]
        (tmp_path / "z").write_bytes(packed)
        with pytest.raises(ValueError, match=r"data: .*z is a zip archive, damaged or of an unkn"):
            load(tmp_path / "z")
        whole = tarred({"a": TEXT})
        (tmp_path / "z").write_bytes(whole[:900])
        with pytest.raises(ValueError, match=r"data: .*z is a tar archive, damaged"):
            load(tmp_path / "z")

    @pytest.mark.parametrize(
        ("outer", "inner", "what"),
        [
            (gzip.compress, gzip.compress, "a gzip file within a gzip file"),
            (gzip.compress, lambda data: zipped({"a": data}), "a zip archive within a gzip file"),
            (lambda data: zipped({"a": data}), lzma.compress, "a: a is an xz file within a zip"),
            (lambda data: tarred({"a": data}), gzip.compress, "a gzip file within a tar archive"),
            (lambda data: zipped({"a": data}), lambda _: b"%PDF-1.7 x", "which is not read"),
        ],
    )
    def test_nested_ones_are_refused(
        self,
        tmp_path: Path,
        outer: Callable[[bytes], bytes],
        inner: Callable[[bytes], bytes],
        what: str,
    ) -> None:
        (tmp_path / "a").write_bytes(outer(inner(TEXT)))
        with pytest.raises(ValueError, match=what):
            load(tmp_path / "a")


class TestArrays:
    @pytest.mark.parametrize("n_bytes", [300, 3 << 20])
    def test_of_bytes_are_read(self, tmp_path: Path, n_bytes: int) -> None:
        values = np.resize(np.frombuffer(TEXT, np.uint8), n_bytes)
        np.save(tmp_path / "a.npy", values)
        assert read(tmp_path / "a.npy") == ([values.tobytes()], [])
        corpus = load_corpus([str(tmp_path / "a.npy")])
        assert isinstance(corpus.train[0], memoryview)
        batch = TrainingWindows(corpus.train, context=64, batch_size=2, seed=0).batch(0)
        assert batch.byte_ids.shape == (128,)
        corpus.describe()

    @pytest.mark.parametrize(
        ("values", "got"),
        [
            (np.arange(300, dtype=np.uint16), r"uint16 \(300,\)"),
            (np.arange(300), r"int64 \(300,\)"),
            (np.zeros((3, 4), np.uint8), r"uint8 \(3, 4\)"),
            (np.zeros((), np.uint8), r"uint8 \(\)"),
            (np.array([{}], object), "allow_pickle=False"),
        ],
    )
    def test_others_are_refused(self, tmp_path: Path, values: Any, got: str) -> None:
        np.save(tmp_path / "a.npy", values, allow_pickle=True)
        with pytest.raises(ValueError, match=rf"data: .*a\.npy.*{got}"):
            load(tmp_path / "a.npy")

    def test_a_short_one(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.zeros(300, np.uint8))
        (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"a\.npy is a NumPy array, damaged"):
            load(tmp_path / "a.npy")


def saved_by_torch(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer, **options)
    return buffer.getvalue()


def saved_by_numpy() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3, np.uint8))
    return buffer.getvalue()


def a_database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table a (b)")
    return connection.serialize()


def tensors() -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


REFUSED = {
    "Zstandard": (b"\x28\xb5\x2f\xfd" + bytes(40), "zstd -d"),
    "Parquet": (b"PAR1\x15\x04\x15\x10\x15\x14" + bytes(30) + b"PAR1", "datasets or pyarrow"),
    "Arrow file": (b"ARROW1\0\0" + bytes(40), "datasets or pyarrow"),
    "Arrow stream": (b"\xff\xff\xff\xff\x70\0\0\0" + bytes(40), "datasets or pyarrow"),
    "Feather": (b"FEA1" + bytes(40), "datasets or pyarrow"),
    "ORC": (b"ORC\x1d\x00\x00\x0a\x0d" + bytes(40), "datasets or pyarrow"),
    "SQLite": (a_database(), "export its text"),
    "pickle": (pickle.dumps({"a": 1}), "export its text"),
    "file of torch.save": (saved_by_torch(), "leave it out"),
    "old torch.save": (saved_by_torch(_use_new_zipfile_serialization=False), "export its text"),
    "npz": (saved_by_numpy(), "export its text"),
    "safetensors": (tensors(), "leave it out"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "leave it out"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "leave it out"),
    "GIF": (b"GIF89a\x01\0\x01\0", "leave it out"),
    "BMP": (b"BM\x40\0\0\0" + bytes(58), "leave it out"),
    "RIFF": (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0", "leave it out"),
    "MP4": (b"\0\0\0\x20ftypisom\0\0\2\0", "leave it out"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "export its text"),
    "Office": (zipped({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<x/>"}), "export"),
    "ELF": (b"\x7fELF\x02\x01\x01" + bytes(57), "leave it out"),
    "Windows executable": (b"MZ\x90\0\3\0\0\0" + bytes(56), "leave it out"),
    "bytecode": (b"\xa7\r\r\n" + bytes(12) + b"\xe3", "leave it out"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(30), "unpack it"),
    "Zstandard or LZ4": (b"\x50\x2a\x4d\x18\4\0\0\0" + bytes(30), "unpack it"),
    "LZ4": (b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(30), "unpack it"),
}
if sys.version_info >= (3, 14):
    del REFUSED["Zstandard"]


@pytest.mark.parametrize("kind", REFUSED)
def test_other_containers_are_refused_with_a_way_out(tmp_path: Path, kind: str) -> None:
    content, way_out = REFUSED[kind]
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data: .*a\.txt is an? .*{kind}") as raised:
        load(tmp_path)
    assert way_out in str(raised.value)
    assert "--raw (raw=True)" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert load(tmp_path, raw=True) == [content]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="the standard library has no zstd")
def test_zstandard_is_read_where_python_can(tmp_path: Path) -> None:
    from compression import zstd  # type: ignore[import-not-found]

    (tmp_path / "a.zst").write_bytes(zstd.compress(TEXT))
    assert load(tmp_path / "a.zst") == [TEXT]


@pytest.mark.parametrize(
    "text",
    [
        *(magic + b" begins a line of prose\n" * 30 for magic in (b"PAR1", b"RIFF", b"MZ", b"BM")),
        *(
            magic + b" begins a line of prose\n" * 30
            for magic in (b"OTTO", b"ID3", b"GGUF", b"BZh")
        ),
        b"x\r\r\ny\r\n" * 50,
        b"(dp0\nS'a'\np1\n" * 9,
        "€ in code page 1252".encode("cp1252") + TEXT,
        TEXT.decode().encode("utf-16"),
        bytes(range(256)) * 9,
        TEXT[:257] + b"ustar" + TEXT,
        b"\x1b[31mred\x1b[0m" * 20,
        b"{}",
        b"",
        b"\n",
    ],
)
def test_texts_are_no_containers(text: bytes) -> None:
    assert container_of(text[:512], len(text)) is None


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Root may read every file, so this one is gone between the search and the reading."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(TEXT)
    files, _ = find_files([str(tmp_path)])
    (tmp_path / "b").unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/b'"):
        list(Documents().of(files))


class TestTokenIds:
    """Files of 16- or 32-bit ids have no magic number: .bin and what no text has tell them."""

    @pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
    @pytest.mark.parametrize("name", ["train.bin", "train.BIN", "train.bin.gz"])
    def test_are_refused(self, tmp_path: Path, dtype: type, name: str) -> None:
        ids = np.random.default_rng(0).zipf(1.2, 4000).clip(max=50_256).astype(dtype)
        content = ids.tobytes()
        packed = gzip.compress(content) if name.endswith(".gz") else content
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(ValueError, match=r"is a \.bin file that is no text, as of token ids"):
            load(tmp_path)
        assert load(tmp_path, raw=True) == [packed]

    def test_bytes_are_read(self, tmp_path: Path) -> None:
        """Texts may be called .bin, as nanoGPT's files of bytes are."""
        (tmp_path / "train.bin").write_bytes(TEXT)
        assert read(tmp_path) == ([TEXT], [])

    def test_other_files_unlike_text_are_read_and_said(self, tmp_path: Path) -> None:
        for name in ("a.dat", "b.dat"):
            (tmp_path / name).write_bytes(bytes(range(256)) * 9)
        _, notes = read(tmp_path)
        assert notes == [f"unlike text, read as they are: 2 files, such as {tmp_path}/a.dat"]

    def test_what_looks_binary(self) -> None:
        assert not looks_binary(b"")
        assert not looks_binary(TEXT + b"\t\n\v\f\r\x1b")
        assert looks_binary(TEXT[:100] + b"\0")
        assert looks_binary(b"\x01\x02" + TEXT[:100])
        assert not looks_binary(b"\x01" + TEXT[:1000])
        assert looks_binary(memoryview(bytes(5)))


class TestJsonLines:
    LINES = lines({"text": "ä\n1", "id": 7}, {"text": ""}, {"id": 8, "text": TEXT.decode()})
    WANT = ("ä\n1".encode(), TEXT)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json", "a.jsonl.gz", "a.json.xz"])
    def test_a_field_of_each_line_is_a_document(self, tmp_path: Path, name: str) -> None:
        compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
        (tmp_path / name).write_bytes(compress(b"\xef\xbb\xbf" + self.LINES + b"\n  \r\n"))
        found, notes = read(tmp_path, text_key="text")
        assert found == [*self.WANT]
        said = f"JSON lines, of each the field 'text' taken: 1 file, {tmp_path / name}"
        assert notes[-1] == said

    def test_beside_plain_files_and_in_archives(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_bytes(b"plain")
        (tmp_path / "z.zip").write_bytes(zipped({"a.jsonl": self.LINES, "b.txt": NEXT}))
        assert load(tmp_path, text_key="text") == [b"plain", *self.WANT, NEXT]

    def test_of_a_link_into_a_cache(self, tmp_path: Path) -> None:
        """The file itself has a name that says nothing."""
        (tmp_path / "0a").write_bytes(self.LINES)
        (tmp_path / "b.jsonl").symlink_to("0a")
        assert load(tmp_path, text_key="text") == [*self.WANT]

    def test_a_mapped_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(self.LINES * 150)
        assert (tmp_path / "a.jsonl").stat().st_size > documents.LEAST_MAPPED
        assert load(tmp_path, text_key="text") == [*self.WANT] * 150

    def test_without_a_key_they_are_text_and_said(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(self.LINES)
        found, notes = read(tmp_path)
        assert found == [self.LINES]
        assert "read as plain text; --text-key KEY takes a field of each" in notes[0]

    @pytest.mark.parametrize(
        ("line", "got"),
        [
            (b"{", "expected JSON in UTF-8, got"),
            (b'{"text": "\xff"}', "expected JSON in UTF-8, got 'utf-8' codec"),
            (b"[" * 100_000, "expected JSON in UTF-8, got"),
            (b"[1, 2]", r"expected text in a field 'text', got \[1, 2\]"),
            (b"7", "expected text in a field 'text', got 7"),
            (b'{"txt": "a"}', "expected text in a field 'text', got .the fields ..txt"),
            (b'{"text": null}', "expected text in a field 'text', got None"),
            (b'{"text": ["a"]}', r"expected text in a field 'text', got \['a'\]"),
            (b'{"text": "\\ud800"}', "expected text of whole characters, got"),
        ],
    )
    @pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda data: zipped({"m": data})])
    def test_bad_lines_are_named(
        self, tmp_path: Path, line: bytes, got: str, pack: Callable[[bytes], bytes]
    ) -> None:
        name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl"
        packed = pack(b'{"text": "a"}\n\n' + line + b"\n")
        if packed.startswith(b"PK"):
            packed = zipped({"m.jsonl": b'{"text": "a"}\n\n' + line})
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(ValueError, match=rf"^data: [^ ]*jsonl.*, line 3: {got}"):
            load(tmp_path, text_key="text")

    def test_a_key_without_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(self.LINES)
        with pytest.raises(ValueError, match="text_key: expected a file of JSON lines"):
            load(tmp_path, text_key="text")
        with pytest.raises(ValueError, match="text_key: expected None beside raw, got 'text'"):
            load_corpus([str(tmp_path)], text_key="text", raw=True)
        with pytest.raises(ValueError, match="data: expected paths beside raw or text_key"):
            load_corpus(raw=True)
