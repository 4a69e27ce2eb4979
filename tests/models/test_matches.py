"""Repeats of a text: as a plain search finds them, byte by byte too, in no other document."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from helpers.models import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from stlm_kernels.testing import assert_causal
from stlm_models import STLM, ModelConfig
from stlm_models.generation.match_state import IncrementalMatches
from stlm_models.layers.followers import FollowerEmbedding
from stlm_models.layers.matches import DEPTHS, MatchEmbedding

LARGE = 70_000
"""A vocabulary whose ids need 17 bits."""


def found_by_search(ids: list[int], size: int, vocab_size: int) -> list[int]:
    """The indices of one document, by comparing all pairs of positions from the latest on."""
    return [_found_at(ids[: i + 1], size, vocab_size) for i in range(len(ids))]


def _found_at(ids: list[int], size: int, vocab_size: int) -> int:
    last = len(ids)
    for end in range(last - 1, size - 1, -1):
        depth = 0
        while depth < DEPTHS and end >= (depth + 1) * size:
            back = depth * size
            if ids[end - back - size : end - back] != ids[last - back - size : last - back]:
                break
            depth += 1
        if depth:
            return 1 + (depth - 1) * vocab_size + ids[end]
    return 0


def indices_of(documents: list[list[int]], size: int, vocab_size: int) -> list[list[int]]:
    ids = torch.tensor([i for document in documents for i in document], dtype=torch.int64)
    boundaries = torch.tensor([0, *map(len, documents)]).cumsum(0).int()
    found = MatchEmbedding((size,), vocab_size, 1).indices(ids, boundaries)[:, 0].tolist()
    return [found[a:b] for a, b in itertools.pairwise(boundaries.tolist())]


@given(
    st.lists(st.lists(st.sampled_from([0, 1, 255, 256]), max_size=40), max_size=3),
    st.integers(1, 7),
)
@settings(deadline=None, max_examples=150)
def test_as_a_search_finds_them(documents: list[list[int]], size: int) -> None:
    expected = [found_by_search(document, size, 257) for document in documents]
    assert indices_of(documents, size, 257) == expected
    rows = IncrementalMatches(len(documents), (size,), 257)
    for row, document in enumerate(documents):
        own = torch.tensor([row])
        next_ids = torch.zeros(len(documents), dtype=torch.int32)
        written = []
        for i, value in enumerate(document):
            if i == 9:  # goes on where a full run ended
                ids, ends = torch.tensor(document[:9]), torch.tensor([0, 9], dtype=torch.int32)
                rows.resume(own, ids, ends)
            next_ids[row] = value
            written.append(rows.step(next_ids, own).item())
        assert written == expected[row]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ids_of_a_large_vocabulary(size: int) -> None:
    """Ids that share bytes, within one id and across two, are not taken for each other."""
    source = random.Random(size)
    values = [1, 256, 65_536, 65_537, 257, LARGE - 1][: 7 - size]
    document = [source.choice(values) for _ in range(500)]
    expected = found_by_search(document, size, LARGE)
    assert len(set(expected)) > 5
    assert indices_of([document], size, LARGE) == [expected]
    row, rows = torch.tensor([0]), IncrementalMatches(1, (size,), LARGE)
    assert [rows.step(torch.tensor([i]), row).item() for i in document] == expected


def test_long_repeats_reach_the_last_depth() -> None:
    found = indices_of([[*range(50)] * 2], 3, 257)[0]
    assert found[:52] == [0] * 52
    depths = [(index - 1) // 257 + 1 for index in found[52:]]
    assert depths == [min(1 + n // 3, DEPTHS) for n in range(48)]


def test_depth_and_follower_are_embedded() -> None:
    matches = MatchEmbedding((1, 2), 257, 4)
    followers = matches.followers
    for parameter in followers.parameters():
        torch.nn.init.normal_(parameter)
    ids, boundaries = torch.tensor([*b"abcab"]), torch.tensor([0, 5], dtype=torch.int32)
    out = matches(ids, boundaries)
    rows = followers.gains * followers.ids[ord("c")] + followers.biases
    torch.testing.assert_close(out[4], rows[0, 1] + rows[1, 0])  # "ab" repeats: depth 2 of 1
    torch.testing.assert_close(out[0], followers.none.sum(0))


@pytest.mark.parametrize("n_texts", [0, 1, 20])
def test_followers_by_row_and_from_all_rows(n_texts: int) -> None:
    torch.manual_seed(0)
    followers = FollowerEmbedding(2, 3, 5, 4).double()
    assert not followers(torch.tensor([[0, 15]])).any()  # all rows begin at zero
    for parameter in followers.parameters():
        torch.nn.init.normal_(parameter)
    indices = torch.randint(16, (n_texts, 2))
    rows = (followers.gains[:, :, None] * followers.ids + followers.biases[:, :, None]).flatten(
        1, 2
    )
    rows = torch.cat((followers.none[:, None], rows), 1)
    expected = rows[0][indices[:, 0]] + rows[1][indices[:, 1]]
    out = followers(indices)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    parameters = list(followers.parameters())
    got = torch.autograd.grad(out, parameters, upstream, retain_graph=True)
    want = torch.autograd.grad(expected, parameters, upstream)
    torch.testing.assert_close(got, want)
    assert followers(indices.view(n_texts, 1, 2)).shape == (n_texts, 1, 4)


def test_a_model_sees_nothing_ahead() -> None:
    model = STLM(dataclasses.replace(TINY, match_sizes=(1, 2))).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert_causal(lambda ids: model(ids % 4), 257, length=24)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"match_sizes": (0,)}, "sizes of 1 to 7 for 257 ids"),
        ({"match_sizes": (3, 8)}, "sizes of 1 to 7 for 257 ids"),
        ({"match_sizes": (4,), "vocab_size": LARGE}, "sizes of 1 to 3 for 70000 ids"),
        ({"match_sizes": (2,), "output": "parallel", "decoder_window": None}, r"\(\) with output"),
        ({"match_sizes": 3}, "tuple"),
    ],
)
def test_refusals(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"match_sizes: expected {expected}"):
        ModelConfig(**values)


def test_json_makes_lists_of_tuples() -> None:
    assert ModelConfig(match_sizes=[3, 6]) == ModelConfig(match_sizes=(3, 6))  # type: ignore[arg-type]
