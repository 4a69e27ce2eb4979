"""Words as tokens: which ones, nothing lost, and judged per real byte."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import TINY, scrambled
from hypothesis import given
from hypothesis import strategies as st

from stlm_kernels import find_patches
from stlm_models import BOS_ID, bits_per_byte
from stlm_models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from stlm_models.data import words
from stlm_models.data.windows import DocumentStream
from stlm_models.data.words import FIRST_WORD, WordVocabulary

TEXTS = [
    b"the cat sat on the mat, and the dog sat by the door.\n",
    b"the  dog   and\n\n    the cat: dogs, cats.  ",
    "Zo\u00eb sah die Stra\u00dfe, die Stra\u00dfe sah Zo\u00eb. ".encode(),
    b"",
    b"\xff\xfe\x80 the \xff\xfe\x80 the ",
]
VOCABULARY = WordVocabulary.of(TEXTS, 10_000)
WORD = dataclasses.replace(
    TINY, tokens="words", vocab_size=VOCABULARY.size, patch_rule="none", core_layers=0
)
# Words that the vocabulary knows, halves of them, and any bytes at all.
PARTS = st.sampled_from([*VOCABULARY.words, b" ", b"\n", b"th", b"a" * 70, "\u00eb".encode()])
DATA = st.lists(PARTS | st.binary(max_size=5), max_size=40).map(b"".join)


def patches_of(data: bytes) -> list[bytes]:
    ids = torch.tensor(list(data), dtype=torch.uint8)
    offsets = find_patches(ids, rule="space").cu_patchlens.tolist()
    return [data[a:b] for a, b in itertools.pairwise(offsets)]


def encoded_patch_by_patch(data: bytes) -> list[int]:
    ids: list[int] = []
    for patch in patches_of(data):
        if patch in VOCABULARY.words:
            ids.append(FIRST_WORD + VOCABULARY.words.index(patch))
        else:
            ids.extend(patch)
    return ids


class TestWhichWords:
    def test_the_most_frequent_patches_that_occur_twice(self) -> None:
        counts = Counter(patch for text in TEXTS for patch in patches_of(text))
        expected = [
            (-count, patch) for patch, count in counts.items() if count > 1 and len(patch) > 1
        ]
        assert VOCABULARY.words == tuple(patch for _, patch in sorted(expected))
        assert VOCABULARY.words[0] == b"the "
        assert len(VOCABULARY.words) >= 5

    def test_a_size_counts_all_ids(self) -> None:
        for n_words in (0, 1, 3):
            fewer = WordVocabulary.of(TEXTS, FIRST_WORD + n_words)
            assert fewer.words == VOCABULARY.words[:n_words]
            assert fewer.size == FIRST_WORD + n_words

    def test_the_order_of_documents_means_nothing(self) -> None:
        assert WordVocabulary.of(TEXTS[::-1], 10_000) == VOCABULARY

    def test_long_patches_are_spelled(self) -> None:
        limit = words.MAX_WORD_BYTES
        text = (b"x" * (limit - 1) + b" " + b"y" * limit + b" ") * 2
        assert WordVocabulary.of([text], 10_000).words == (b"x" * (limit - 1) + b" ",)

    @pytest.mark.parametrize("size", [256, words.MAX_SIZE + 1])
    def test_sizes_out_of_range(self, size: int) -> None:
        with pytest.raises(ValueError, match=f"size: expected 257 to 262144, got {size}"):
            WordVocabulary.of(TEXTS, size)


class TestEncode:
    @given(DATA)
    def test_words_are_one_id_and_all_else_is_spelled(self, data: bytes) -> None:
        ids = VOCABULARY.encode(data)
        assert ids.dtype == np.int32
        assert ids.tolist() == encoded_patch_by_patch(data)
        assert VOCABULARY.decode(ids) == data

    @given(DATA, st.integers(1, 9))
    def test_chunks_of_any_size_make_the_same_ids(self, data: bytes, size: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(words, "CHUNK_BYTES", size)
            assert VOCABULARY.encode(data).tolist() == encoded_patch_by_patch(data)
            assert WordVocabulary.of([data, *TEXTS], 10_000) == _whole(data)

    @given(st.binary(max_size=300))
    def test_any_bytes(self, data: bytes) -> None:
        assert VOCABULARY.decode(VOCABULARY.encode(data)) == data

    @pytest.mark.parametrize("token", [-1, BOS_ID, VOCABULARY.size])
    def test_ids_that_stand_for_no_bytes(self, token: int) -> None:
        expected = f"ids: expected 0 to {VOCABULARY.size - 1} without 256, got {token}"
        with pytest.raises(ValueError, match=expected):
            VOCABULARY.decode(np.array([97, token]))


def _whole(data: bytes) -> WordVocabulary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "CHUNK_BYTES", 1 << 20)
        return WordVocabulary.of([data, *TEXTS], 10_000)


class TestKeeping:
    def test_round_trip(self) -> None:
        assert WordVocabulary.from_json(VOCABULARY.to_json()) == VOCABULARY
        assert WordVocabulary.from_json(WordVocabulary(()).to_json()).words == ()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"\xff", "words: expected JSON"),
            (b"[" * 100_000, "words: expected JSON"),
            (b'{"the ": 1}', "words: expected a list of strings"),
            (b'["the ", 1]', "words: expected a list of strings"),
            (b'["the ", "x"]', "words: expected 2 to 64 bytes each, got b'x'"),
            (json.dumps(["y" * 65]).encode(), "words: expected 2 to 64 bytes each, got b'yyy"),
            (b'["the ", "cat ", "the "]', "words: expected each once, got b'the ' again"),
            (json.dumps(["\u0159\u0159"]).encode(), "words: expected characters below 256"),
        ],
    )
    def test_foreign_files(self, data: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            WordVocabulary.from_json(data)

    def test_huge_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = VOCABULARY.to_json()
        monkeypatch.setattr(words, "MAX_SIZE", VOCABULARY.size)
        assert WordVocabulary.from_json(data) == VOCABULARY
        monkeypatch.setattr(words, "MAX_SIZE", VOCABULARY.size - 1)
        with pytest.raises(ValueError, match="words: expected at most"):
            WordVocabulary.from_json(data)
        monkeypatch.setattr(words, "MAX_FILE_BYTES", len(data) - 1)
        with pytest.raises(ValueError, match=f"expected at most {len(data) - 1} bytes"):
            WordVocabulary.from_json(data)

    def test_a_checkpoint_keeps_them(self, tmp_path: Path) -> None:
        model = scrambled()
        saved = Checkpoint(model.config, model.state_dict(), {}, {"step": 1}, VOCABULARY)
        folder = save_checkpoint(tmp_path, saved)
        assert load_checkpoint(tmp_path).words == VOCABULARY
        file = folder / "words.json"
        file.write_bytes(file.read_bytes().replace(b"the", b"teh"))
        with pytest.raises(ValueError, match=r"words\.json is damaged"):
            load_checkpoint(tmp_path)
        file.unlink()
        with pytest.raises(ValueError, match=r"expected a file .*words\.json"):
            load_checkpoint(tmp_path)
        save_checkpoint(tmp_path, dataclasses.replace(saved, state={"step": 2}, words=None))
        assert load_checkpoint(tmp_path).words is None


def test_documents_of_ids_are_streamed_as_they_are() -> None:
    documents = [VOCABULARY.encode(text) for text in TEXTS]
    stream = DocumentStream(documents)[:]
    assert stream.dtype == np.int32
    assert stream.tolist() == [x for ids in documents for x in (BOS_ID, *ids.tolist())]
    assert DocumentStream(TEXTS)[:].dtype == np.int16


@pytest.mark.parametrize(("context", "stride"), [(None, None), (8, 3), (1, 1), (1000, 500)])
def test_bits_per_real_byte(context: int | None, stride: int | None) -> None:
    """Against one id at a time, each read in the first window that reaches it."""
    model = scrambled(WORD)
    actual = bits_per_byte(model, TEXTS, vocabulary=VOCABULARY, context=context, stride=stride)
    length = context or TINY.context
    step = stride or length // 2
    nats = 0.0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([BOS_ID, *encoded_patch_by_patch(text)])
            for target in range(1, len(ids)):
                start = step * max(0, math.ceil((target - length) / step))
                logits = model(ids[start:target])[-1]
                nats -= float(logits.log_softmax(-1)[ids[target]])
    assert actual == pytest.approx(nats / (math.log(2) * len(b"".join(TEXTS))), rel=1e-4)
