"""The words that this project does without, as data, and the lines of a folder that use one.

`docs/glossary.md` has the terms to use instead.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FIRST_WORDS = frozenset((
    "about", "above", "after", "also", "although", "among", "and", "as", "at", "because",
    "before", "beside", "between", "but", "by", "during", "except", "false", "for", "from", "how",
    "if", "in", "inside", "into", "it", "like", "of", "on", "or", "otherwise", "over", "same",
    "since", "so", "such", "than", "that", "their", "then", "there", "these", "they", "this",
    "those", "though", "through", "true", "under", "unless", "until", "what", "whatever", "when",
    "where", "which", "while", "who", "whoever", "whose", "why", "with", "within", "without",
    "whether", "you", "your",
))  # fmt: skip
"""Words that begin a fragment; a docstring begins with an imperative verb or its head noun.

One that follows "the", "not" or "only" makes a fragment too, as in "the same" or "not where".
"""

IDENTIFIERS = {
    "border": "boundary",
    "borders": "boundaries",
    "mine": "baseline",
    "nobody": "none",
    "oracle": "reference",
    "piece": "chunk or block",
    "pieces": "chunks or blocks",
    "somebody": "baseline",
    "stock": "baseline",
    "twin": "baseline",
    "twins": "baselines",
    "who": "which",
    "whoever": "whatever",
}
"""Parts of identifiers, and the project's term for each."""

WORDS = {
    "border": "boundary",
    "borders": "boundaries",
    "he": "it",
    "nobody": "nothing",
    "oracle": "reference",
    "piece": "chunk or block",
    "pieces": "chunks or blocks",
    "somebody": "the caller",
    "stock": "plain, or of torch",
    "twin": "baseline",
    "twins": "baselines",
    "whoever": "whatever",
}
"""Words of comments, docstrings and messages, and the project's term for each."""


class Finding(NamedTuple):
    """One use of a word that the project does without."""

    file: Path
    line: int
    text: str


def docstrings(folder: Path) -> Iterator[Finding]:
    """Yield the first line of every docstring, those of names included."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            value = node.value if isinstance(node, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else None
            if value is not None and isinstance(text, str) and text.strip():
                yield Finding(path, value.lineno, text.strip().splitlines()[0])


def fragments(folder: Path) -> list[Finding]:
    """The docstrings that begin with one of `FIRST_WORDS`."""
    return [found for found in docstrings(folder) if is_fragment(found.text)]


def is_fragment(text: str) -> bool:
    first, second = [*re.findall(r"[a-z']+", text.lower()), "", ""][:2]
    if first in ("the", "not", "only"):
        first = second
    return first in FIRST_WORDS


def banned_identifiers(folder: Path) -> list[Finding]:
    """The identifiers with a part that is in `IDENTIFIERS`."""
    return [
        Finding(path, token.start[0], token.string)
        for path, token in _tokens(folder, _parts, IDENTIFIERS)
        if token.type == tokenize.NAME and set(_parts(token.string)) & set(IDENTIFIERS)
    ]


def banned_words(folder: Path) -> list[Finding]:
    """The comments and strings with a word that is in `WORDS`."""
    texts = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    found = []
    for path, token in _tokens(folder, _words, WORDS):
        if token.type not in texts:
            continue
        for offset, line in enumerate(token.string.splitlines()):
            if set(_words(line)) & set(WORDS):
                found.append(Finding(path, token.start[0] + offset, line.strip()))
    return found


def _tokens(
    folder: Path, split: Callable[[str], list[str]], banned: Iterable[str]
) -> Iterator[tuple[Path, tokenize.TokenInfo]]:
    """The tokens of files that have a banned word anywhere; the others are not tokenized."""
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        if not set(split(text)).isdisjoint(banned):
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                yield path, token


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _parts(identifier: str) -> list[str]:
    """The lower-case parts of a name in snake or camel case."""
    return _words(re.sub(r"([A-Z][a-z])", r"_\1", identifier))


def offending(folder: Path) -> list[Finding]:
    """Every fragment, banned identifier and banned word of a folder's Python files."""
    return [*fragments(folder), *banned_identifiers(folder), *banned_words(folder)]
