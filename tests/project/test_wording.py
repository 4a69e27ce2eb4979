"""The words of the project's folders, and what finds those that it does without."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import wording

ROOT = Path(__file__).parents[2]
FOLDERS = ("stlm_kernels", "stlm_models", "bench", "tests", "examples")
LISTS = (Path(__file__), Path(wording.__file__))
"""Files that hold banned words as data."""

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


def excess_fragments(folder: Path) -> list[wording.Finding]:
    """Docstrings that begin as a fragment, where they are more than 1% of a folder's."""
    every = list(wording.docstrings(folder))
    assert every, f"no docstrings in {folder}"
    found = [each for each in every if wording.is_fragment(each.text)]
    return found if 100 * len(found) > len(every) else []


def banned(folder: Path) -> list[wording.Finding]:
    """Banned identifiers and words, without those that the lists and their tests hold as data."""
    found = [*wording.banned_identifiers(folder), *wording.banned_words(folder)]
    return [each for each in found if each.file not in LISTS]


def test_one_docstring_in_a_hundred_may_be_a_fragment(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text('"""What it is."""\n' + '"""Boundaries."""\n' * 98)
    assert lines(excess_fragments(tmp_path)) == [1]
    (tmp_path / "other.py").write_text('"""One more."""\n')
    assert excess_fragments(tmp_path) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(name: str) -> None:
    assert excess_fragments(ROOT / name) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_the_words_are_those_of_the_glossary(name: str) -> None:
    assert banned(ROOT / name) == []
