"""A memory of the training text: as plain counting finds it, of other documents than its own."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import TINY, ids_of, packed, scrambled
from hypothesis import given, settings
from hypothesis import strategies as st

from stlm_kernels.testing import assert_causal
from stlm_models import STLM, ModelConfig
from stlm_models.checkpoint import load_checkpoint, load_model
from stlm_models.config import BOS_ID
from stlm_models.data.corpus import Corpus
from stlm_models.data.windows import TrainingWindows
from stlm_models.layers.memory import LEVELS, TextMemory, look_up_last, spread_over, units_of
from stlm_models.training.recall import Recall
from stlm_models.training.trainer import Trainer, TrainOptions

TEXTS = st.lists(st.binary(max_size=30).map(lambda b: bytes(x % 3 for x in b)), max_size=4)


SLOTS = 2**20
"""So many that no two contexts of those texts meet, as a test makes sure."""


def level(most: int, total: int) -> int:
    """1 to 9, as the documentation of LEVELS has it."""
    if most == total:
        return 1 + sum(most >= least for least in (2, 3, 6, 16))
    return 6 + sum(most / total >= share for share in (0.4, 0.65, 0.9))


def by_counting(documents: list[bytes], size: int) -> dict[tuple[int, ...], int]:
    """The index of each context."""
    followers = collections.defaultdict(collections.Counter)
    for document in documents:
        ids = [BOS_ID, *document]
        for end in range(size, len(ids)):
            followers[tuple(ids[end - size : end])][ids[end]] += 1
    found = {}
    for context, counts in followers.items():
        most = max(counts.values())
        follower = max(byte for byte, n in counts.items() if n == most)
        found[context] = 1 + (level(most, counts.total()) - 1) * 256 + follower
    return found


@given(TEXTS, TEXTS, st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_as_counting_finds_them(remembered: list[bytes], texts: list[bytes], size: int) -> None:
    memory = TextMemory((size,), SLOTS, 1)
    memory.remember(remembered)
    known = by_counting(remembered, size)
    texts = [*texts, *remembered, b""]
    ids, boundaries = packed(texts)
    expected = []
    for text in texts:
        own = [BOS_ID, *text]
        contexts = [tuple(own[max(0, i + 1 - size) : i + 1]) for i in range(len(own))]
        expected += [known.get(context, 0) for context in contexts]
    assert memory.indices(ids, boundaries)[:, 0].tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_contexts_of_these_texts_meet(size: int) -> None:
    every = [bytes(text) for text in itertools.product(range(3), repeat=size + 1)]
    memory = TextMemory((size,), SLOTS, 1)
    memory.remember(every)
    assert int((memory.entries != 0).sum()) == len(by_counting(every, size))


def test_of_a_long_text_units_all_over_it_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stlm_models.layers.memory.UNIT", 10)
    documents = [bytes([n]) * 25 for n in range(40)]
    units = list(units_of(documents))
    assert [place for place, _ in units[:4]] == [0, 10, 20, 26]
    assert b"".join(unit for _, unit in units) == b"".join(documents)
    assert spread_over(documents, 1000) is documents
    for most in (999, 300, 100, 25):
        chosen = spread_over(documents, most)
        kept = sum(map(len, chosen))
        assert most / 3 < kept <= most
        assert max(map(max, chosen)) - min(map(min, chosen)) > 20
    monkeypatch.setattr("stlm_models.layers.memory.MOST_BYTES", 300)
    memory = TextMemory((1,), 2**12, 1)
    memory.remember(documents)
    known = memory.indices(torch.arange(40), torch.tensor([0, 40], dtype=torch.int32)) > 0
    assert 5 < int(known.sum()) < 40


def test_every_level() -> None:
    texts = [b"ab" * n + b"ac" * (20 - n) for n in range(21)]
    found = set()
    for text in (*texts, b"ab", b"abab", b"ababab", b"ab" * 8, b"abacad"):
        memory = TextMemory((1,), 2**12, 1)
        memory.remember([text])
        index = memory.indices(torch.tensor([97]), torch.tensor([0, 1], dtype=torch.int32))
        found.add((index.item() - 1) // 256)
    assert found == set(range(LEVELS))


def test_the_newest_of_each_text() -> None:
    memory = TextMemory((1, 3, 6), 2**12, 1)
    document = b"one two one three one two one four"
    memory.remember([document])
    ids, boundaries = packed([document])
    whole = memory.indices(ids, boundaries)
    assert (whole > 0).any(0).all()
    ends = torch.nn.functional.pad(ids.long(), (8, 0))
    for n in range(1, len(ids) + 1):
        last, lengths = ends[n : n + 8].repeat(2, 1).numpy(), np.array([n, 1])
        found = look_up_last(memory.entries.numpy(), memory.sizes, last, lengths)
        assert found[0].tolist() == whole[n - 1].tolist()
        assert found[1, 1:].tolist() == [0, 0]  # a text of one id has no longer contexts


def test_where_contexts_meet_the_most_frequent_one_stays() -> None:
    memory = TextMemory((1,), 1, 1)
    memory.remember([b"ab" * 9 + b"cd"])
    ids, ends = torch.tensor([*b"abcd"]), torch.tensor([0, 4], dtype=torch.int32)
    known = memory.indices(ids, ends)[:, 0].tolist()
    assert known[0] == 1 + (level(9, 9) - 1) * 256 + ord("b")
    assert known[2:] == [0, 0]  # in the slot, but not what stands there


def test_remembering_replaces() -> None:
    memory = TextMemory((2,), 2**10, 1)
    memory.remember([b"abcabc"])
    before = memory.entries.clone()
    memory.remember([b"xyz"])
    memory.remember([b"", b"abcabc"])
    assert torch.equal(memory.entries, before)
    memory.remember([])
    assert not memory.entries.any()


def test_level_and_follower_are_embedded() -> None:
    memory = TextMemory((1, 2), 2**10, 4)
    memory.remember([b"abc"])
    followers = memory.followers
    for parameter in followers.parameters():
        torch.nn.init.normal_(parameter)
    out = memory(torch.tensor([*b"ab"]), torch.tensor([0, 2], dtype=torch.int32))
    rows = followers.gains[:, 0, None] * followers.ids + followers.biases[:, 0, None]
    torch.testing.assert_close(out[0], rows[0, ord("b")] + followers.none[1])
    torch.testing.assert_close(out[1], rows[0, ord("c")] + rows[1, ord("c")])


DOCUMENTS = [b"only here, and only here", b"shared words", b"shared words"]


def test_a_window_recalls_other_documents_than_its_own() -> None:
    recall = Recall(DOCUMENTS, ModelConfig(memory_sizes=(4,), memory_slots=2**12))
    windows = TrainingWindows(DOCUMENTS, context=12, batch_size=1, seed=0, recall=recall)
    stream = windows.ids[0 : len(windows.ids)]
    document = np.cumsum(stream == BOS_ID) - 1
    seen = collections.defaultdict(set)
    for step in range(20 * windows.n_windows):
        batch, start = windows.batch(step), windows._start(step)
        assert batch.followers is not None
        assert batch.followers.shape == (12, 1)
        for place, index in enumerate(batch.followers[:, 0].tolist(), start):
            if place - start >= 3:
                before = bytes(x % 256 for x in stream[place - 3 : place + 1])
                seen[int(document[place]), before].add(chr((index - 1) % 256) if index else None)
    assert seen[0, b"nly "] == {None}
    assert seen[1, b"hare"] == seen[2, b"hare"] == {"d"}


def test_long_documents_are_cut_between_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stlm_models.layers.memory.UNIT", 16)
    text = b"what is repeated" * 4
    recall = Recall([text], ModelConfig(memory_sizes=(4,), memory_slots=2**12))
    places = np.arange(len(text) + 1)
    found = recall(places, ids_of(text), torch.tensor([0, len(text) + 1], dtype=torch.int32))
    assert (found[8:14] > 0).all()


def test_a_model_sees_nothing_ahead() -> None:
    model = scrambled(dataclasses.replace(TINY, memory_sizes=(1, 2), memory_slots=2**12)).double()
    assert model.memory is not None
    model.memory.remember([bytes(range(4)) * 3, b"\0\1\3\2" * 5])
    assert_causal(lambda ids: model(ids % 4), 257, length=24)


def test_training_fills_it_and_checkpoints_keep_it(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, memory_sizes=(2, 4), memory_slots=256)
    corpus = Corpus("texts", [b"some text to learn " * 9, b"another text to learn " * 9], [b"x"])
    options = TrainOptions(steps=2, batch_size=2)
    trainer = Trainer(config, corpus, options)
    memory = trainer.model.memory
    assert memory is not None
    fresh = TextMemory((2, 4), 256, 1)
    fresh.remember(corpus.train)
    assert torch.equal(memory.entries, fresh.entries)
    trainer.run()
    assert (memory.followers.gains != 0).any(2).any(1).all()  # zero where nothing was recalled
    trainer.save(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.memory is not None
    assert torch.equal(loaded.memory.entries, fresh.entries)
    resumed = Trainer.resume(load_checkpoint(tmp_path), corpus, options)
    assert resumed.model.memory is not None
    assert torch.equal(resumed.model.memory.entries, fresh.entries)


def test_given_followers_take_the_place_of_those_found() -> None:
    model = scrambled(dataclasses.replace(TINY, memory_sizes=(1, 2), memory_slots=2**12))
    ids = ids_of(b"ab c")
    nothing = torch.zeros(5, 2, dtype=torch.int64)
    assert model.memory is not None
    with torch.no_grad():
        known, unknown = model(ids), model(ids, followers=nothing)
        own = model(
            ids, followers=model.memory.indices(ids, torch.tensor([0, 5], dtype=torch.int32))
        )
        model.memory.remember([])
        assert torch.equal(model(ids), unknown)
    assert torch.equal(known, own)
    assert not torch.equal(known, unknown)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"memory_sizes": (0,)}, "memory_sizes: expected sizes of 1 to 64"),
        ({"memory_sizes": (3, 65)}, "memory_sizes: expected sizes of 1 to 64"),
        ({"memory_slots": 1000}, "memory_slots: expected a power of two"),
        ({"memory_slots": 2**25}, "memory_slots: expected a power of two"),
        ({"memory_sizes": 3}, "memory_sizes: expected tuple"),
        (
            {"memory_sizes": (2,), "output": "parallel", "decoder_window": None},
            r"memory_sizes: expected \(\) with output",
        ),
        (
            {"memory_sizes": (2,), "tokens": "words", "patch_rule": "none", "core_layers": 0},
            r"memory_sizes: expected \(\) with tokens",
        ),
    ],
)
def test_refusals(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ModelConfig(**values)


def test_followers_of_another_shape() -> None:
    with_memory = STLM(dataclasses.replace(TINY, memory_sizes=(1, 2), memory_slots=64))
    ids = ids_of(b"ab c")
    for wrong in (torch.zeros(5, 1, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"followers: expected shape \(5, 2\), got"):
            with_memory(ids, followers=wrong)
    with pytest.raises(ValueError, match=r"followers: expected shape \(5, 0\), got"):
        STLM(TINY)(ids, followers=torch.zeros(5, 2, dtype=torch.int64))
