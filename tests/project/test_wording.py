"""The words of `stlm_kernels`, and what finds those that the project does without."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import wording

PACKAGE = Path(__file__).parents[2] / "stlm_kernels"

SOURCE = '''"""Boundaries of patches."""

COUNT = 1
"""Of the boundaries."""


def border_of(x, twins):  # nobody asks
    """What the border of x is."""
    return f"{x}: expected a piece"


class Piece:
    """The same."""

    boundary = "borderline"
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/module.py").write_text(SOURCE)
    return tmp_path


def lines(found: list[wording.Finding]) -> list[int]:
    return [each.line for each in found]


def test_docstrings_are_found_with_those_of_names(folder: Path) -> None:
    assert lines(list(wording.docstrings(folder))) == [1, 4, 8, 13]


def test_fragments(folder: Path) -> None:
    assert sorted(lines(wording.fragments(folder))) == [4, 8, 13]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("Return gradients of `compose`.", False),
        ("Gradients, where required.", False),
        ("The boundaries of patches.", False),
        ("(P, D) fp64.", False),
        ("`ROWS` rows of key.", False),
        ("What a user writes.", True),
        ("Whether it fits.", True),
        ("The same in fp64.", True),
        ("Only where values can be read.", True),
        ("As q.", True),
    ],
)
def test_what_a_fragment_is(text: str, fragment: bool) -> None:
    assert wording.is_fragment(text) is fragment


def test_identifiers(folder: Path) -> None:
    found = [(each.line, each.text) for each in wording.banned_identifiers(folder)]
    assert found == [(7, "border_of"), (7, "twins"), (12, "Piece")]


def test_words_of_comments_strings_and_docstrings(folder: Path) -> None:
    assert lines(wording.banned_words(folder)) == [7, 8, 9]


def test_everything_is_counted_once(folder: Path) -> None:
    found = wording.offending(folder)
    assert sorted(lines(found)) == [4, 7, 7, 7, 8, 8, 9, 12, 13]
    assert {each.file.name for each in found} == {"module.py"}


def of_kernels(found: list[wording.Finding]) -> list[wording.Finding]:
    """Findings outside `ptx`, which has its own."""
    return [each for each in found if "ptx" not in each.file.relative_to(PACKAGE).parts]


def test_the_kernels_begin_their_docstrings_with_a_verb_or_a_noun() -> None:
    every = of_kernels(list(wording.docstrings(PACKAGE)))
    found = [each for each in every if wording.is_fragment(each.text)]
    assert len(found) <= len(every) // 100, found


def test_the_kernels_use_the_projects_words() -> None:
    found = [*wording.banned_identifiers(PACKAGE), *wording.banned_words(PACKAGE)]
    assert of_kernels(found) == []


MODELS = Path(__file__).parents[2] / "stlm_models"


def test_the_models_begin_their_docstrings_with_a_verb_or_a_noun() -> None:
    every = list(wording.docstrings(MODELS))
    found = wording.fragments(MODELS)
    assert len(every) > 500
    assert len(found) <= len(every) // 100, found


def test_the_models_use_the_words_of_the_glossary() -> None:
    assert not wording.banned_identifiers(MODELS)
    assert not wording.banned_words(MODELS)
