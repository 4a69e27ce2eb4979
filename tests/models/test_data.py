"""Corpora and training windows."""

from __future__ import annotations

import hashlib
import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from stlm_models.config import BOS_ID
from stlm_models.data import corpus as data
from stlm_models.data import documents as reading
from stlm_models.data.corpus import default_corpus, load_corpus
from stlm_models.data.windows import DocumentStream, TrainingWindows


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


class TestCorpus:
    def test_default_corpus_follows_its_lists(self, tmp_path: Path) -> None:
        train = ["abc.py", "email/mime/text.py", "jsonish.py", "xml/random.py", "xml/json/a.py"]
        held_out = ["argparse.py", "asyncio/events.py", "json/__init__.py", "pathlib.py"]
        left_out = [
            "encodings/utf_8.py",
            "pydoc_data/topics.py",
            "idlelib/run.py",
            "distutils/core.py",
            "lib2to3/main.py",
            "site-packages/torch/nn.py",
            "dist-packages/apt.py",
            "test/test_os.py",
            "json/tests/test_x.py",
            "sqlite3/test/x.py",
            "readme.txt",
            "lib-dynload/x.so",
        ]
        write(tmp_path, {name: name.encode() for name in train + held_out + left_out})
        write(tmp_path, {"empty.py": b""})
        corpus = default_corpus(tmp_path)
        assert sorted(corpus.train) == sorted(name.encode() for name in train)
        assert sorted(corpus.held_out) == sorted(name.encode() for name in held_out)

    def test_this_interpreter_has_the_default_corpus(self) -> None:
        corpus = load_corpus()
        assert 4e6 < sum(map(len, corpus.train)) < 12e6
        assert 1e6 < sum(map(len, corpus.held_out)) < 4e6
        held_out = b"".join(corpus.held_out)
        assert hashlib.sha256(held_out).hexdigest() in corpus.describe()[1]
        assert f"{len(held_out):,} bytes" in corpus.describe()[1]
        # Tiny files may be equal in both: "this directory is a package".
        both = set(corpus.train) & set(corpus.held_out)
        assert all(len(document) < 100 for document in both)

    def test_files_folders_and_globs(self, tmp_path: Path) -> None:
        write(tmp_path, {"a/1.txt": b"1" * 40, "a/b/2.txt": b"2" * 40, "c.md": b"3" * 20})
        for paths in ([str(tmp_path)], [str(tmp_path / "a"), str(tmp_path / "*.md")]):
            corpus = load_corpus(paths)
            assert corpus.train == [b"1" * 40, b"2" * 40, b"3" * 10]
            assert corpus.held_out == [b"3" * 10]
        # A file named twice counts once.
        file = str(tmp_path / "c.md")
        assert load_corpus([file, file]).train == [b"3" * 18]

    def test_a_huge_corpus_holds_out_two_megabytes(self, tmp_path: Path) -> None:
        write(tmp_path, {"big": bytes(30_000_000)})
        assert len(load_corpus([str(tmp_path)]).held_out[0]) == 2_000_000

    def test_missing_and_empty(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"data: expected a file, a folder .* got '.*none'"):
            load_corpus([str(tmp_path / "none")])
        with pytest.raises(ValueError, match="data: expected a file, a folder"):
            load_corpus([str(tmp_path)])
        write(tmp_path, {"empty": b""})
        with pytest.raises(ValueError, match="data: expected at least one byte"):
            load_corpus([str(tmp_path)])
        with pytest.raises(ValueError, match=r"data: expected the standard library's \*\.py"):
            default_corpus(tmp_path)


class TestLargeFiles:
    def test_are_mapped_and_read_as_those_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = [bytes([n]) * (90 + n) for n in range(1, 12)]
        write(tmp_path, {f"{n:02}": text for n, text in enumerate(texts)})
        in_memory = load_corpus([str(tmp_path)])
        monkeypatch.setattr(reading, "LEAST_MAPPED", 95)
        monkeypatch.setattr(reading, "MOST_MAPPED", 5)
        corpus = load_corpus([str(tmp_path)])
        kinds = [type(document) for document in corpus.train]
        assert kinds == [bytes] * 6 + [memoryview] * 4  # what is held out is read
        assert {type(document) for document in corpus.held_out} == {bytes}
        assert corpus == in_memory
        assert corpus.describe() == in_memory.describe()
        for step in range(5):
            here, there = (
                TrainingWindows(each.train, context=64, batch_size=3, seed=2).batch(step)
                for each in (corpus, in_memory)
            )
            assert torch.equal(here.byte_ids, there.byte_ids)
            assert torch.equal(here.targets, there.targets)

    def test_stay_on_disk(self, tmp_path: Path) -> None:
        with (tmp_path / "big").open("wb") as file:
            file.truncate(64 << 20)
        tracemalloc.start()
        corpus = load_corpus([str(tmp_path)])
        batch = TrainingWindows(corpus.train, context=1024, batch_size=8, seed=0).batch(3)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert batch.n_bytes == 8192
        # An order of the windows, and the permutation that made it, beside what is held out.
        assert peak < data.MAX_HELD_OUT + 2 * 8 * (64 << 20) / 1024 + 1e6


DOCUMENTS = [bytes([n]) * (5 + 7 * n) for n in range(1, 20)]


class TestDocumentStream:
    def test_is_the_documents_behind_each_other(self) -> None:
        words = [np.array([300, 7, 50_000], np.int32), np.array([256 + 9], np.int32)]
        for documents, dtype in ((DOCUMENTS[:4], np.int16), (words, np.int32)):
            stream = DocumentStream(documents)
            parts = [[BOS_ID, *document] for document in documents]
            whole = np.concatenate(parts).astype(dtype)
            assert len(stream) == len(whole)
            for start, stop in itertools.combinations_with_replacement(range(len(whole) + 1), 2):
                got = stream[start:stop]
                assert got.dtype == dtype
                assert np.array_equal(got, whole[start:stop])

    @pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 30])
    def test_most_documents_of_a_window(self, length: int) -> None:
        documents = [b"abcdef", b"a", b"b", b"cd", b"efghijklmn" * 2, b"o"]
        stream = DocumentStream(documents)
        whole = stream[:]
        begun = [
            1 + int((whole[start + 1 : start + length] == BOS_ID).sum())
            for start in range(len(whole) - length + 1)
        ]
        assert stream.most_documents(length) == max(begun)


class TestTrainingWindows:
    def test_targets_are_the_next_ids(self) -> None:
        windows = TrainingWindows(DOCUMENTS, context=16, batch_size=4, seed=1)
        stream = DocumentStream(DOCUMENTS)
        for step in range(20):
            batch = windows.batch(step)
            inputs, targets = batch.byte_ids.view(4, 16), batch.targets.view(4, 16)
            for row in range(4):
                at = [
                    start
                    for start in range(len(stream) - 16)
                    if np.array_equal(stream[start : start + 16], inputs[row])
                    and all(
                        target == (-100 if follow == BOS_ID else follow)
                        for target, follow in zip(
                            targets[row].tolist(), stream[start + 1 : start + 17], strict=True
                        )
                    )
                ]
                assert at, (step, row)

    def test_documents_begin_at_256_and_at_each_row(self) -> None:
        windows = TrainingWindows(DOCUMENTS, context=16, batch_size=4, seed=1)
        for step in range(20):
            batch = windows.batch(step)
            begins = {0, 16, 32, 48, 64}
            begins |= set((batch.byte_ids == BOS_ID).nonzero().flatten().tolist())
            assert batch.cu_seqlens.tolist() == sorted(begins)
            assert batch.cu_seqlens.dtype == torch.int32
            assert batch.n_bytes == 64

    def test_a_step_is_always_the_same(self) -> None:
        first, again, other = (
            TrainingWindows(DOCUMENTS, context=16, batch_size=4, seed=seed) for seed in (1, 1, 2)
        )
        for step in (7, 0, 300, 7):
            assert torch.equal(first.batch(step).byte_ids, again.batch(step).byte_ids)
        assert not torch.equal(first.batch(0).byte_ids, other.batch(0).byte_ids)

    def test_an_epoch_shows_everything_but_its_rim_once(self) -> None:
        document = np.arange(1600).astype(np.uint8).tobytes() + bytes(range(1, 17))
        windows = TrainingWindows([document], context=16, batch_size=1, seed=1)
        starts = sorted(windows._start(index) for index in range(windows.n_windows))
        assert len(set(starts)) == len(starts) >= 99
        assert {b - a for a, b in itertools.pairwise(starts)} == {16}
        later = windows._start(windows.n_windows) % 16
        assert later != starts[0] % 16

    @pytest.mark.parametrize("length", [16, 17, 18, 31, 32, 33, 48])
    def test_barely_enough_bytes(self, length: int) -> None:
        windows = TrainingWindows([bytes(length)], context=16, batch_size=2, seed=0)
        for step in range(10):
            assert windows.batch(step).byte_ids.shape == (32,)

    def test_too_few_bytes(self) -> None:
        with pytest.raises(ValueError, match=r"data: expected at least one window of 16 .* got 15"):
            TrainingWindows([b"x" * 10, b"y" * 5], context=16, batch_size=1, seed=0)
        with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
            TrainingWindows([b"x" * 50], context=16, batch_size=0, seed=0)
