"""A memory's bytes seen as accesses: an element for each, of the size that it has."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .registers import UNSIGNED, Array

Ints = NDArray[np.int64]
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@functools.cache
def element(size: int) -> np.dtype[Any]:
    """The type of an access of `size` bytes: a word, or a string of bytes beyond 8."""
    return np.dtype(UNSIGNED[8 * size]) if size <= 8 else np.dtype((np.void, size))


class Elements:
    """An array seen as elements of any size: the `index`-th of a size begins at `index * size`.

    Args:
        data: any array without gaps; views of it are kept, since every access needs one.
    """

    def __init__(self, data: Array) -> None:
        self.data = data
        self._bytes = data.reshape(-1).view(np.uint8)
        self._views: dict[int, Array] = {}

    def of(self, size: int) -> Array:
        """The elements of `size` bytes."""
        view = self._views.get(size)
        if view is None:
            whole = len(self._bytes) // size * size
            view = self._views[size] = self._bytes[:whole].view(element(size))
        return view

    def rows(self, size: int) -> NDArray[np.uint8]:
        """The bytes of elements: (elements, size)."""
        return self.of(size).view(np.uint8).reshape(-1, size)


class Marks(Elements):
    """Flags of bytes."""

    def all_marked(self, index: Ints, size: int) -> bool:
        """Return whether all bytes of all these accesses are marked."""
        return self.of(size).take(index).tobytes() == b"\1" * (len(index) * size)

    def none_marked(self, index: Ints, size: int) -> bool:
        """Return whether no byte of these accesses is marked."""
        return self.of(size).take(index).tobytes() == bytes(len(index) * size)

    def marked(self, index: Ints, size: int) -> Array:
        """Return which accesses have all their bytes marked."""
        return np.asarray(as_rows(self.of(size).take(index), size).all(1))

    def any_marked(self, index: Ints, size: int) -> Array:
        """Return which accesses have a byte that is marked."""
        return np.asarray(as_rows(self.of(size).take(index), size).any(1))

    def mark(self, index: Ints, size: int, value: bool = True) -> None:
        """Mark all bytes of accesses, or none."""
        self.of(size)[index] = _constant(size, value)


@functools.cache
def _constant(size: int, value: bool) -> Array:
    """An element whose bytes are all 1, or all 0."""
    return np.full(size, value, np.uint8).view(element(size))


def as_rows(elements: Array, size: int) -> NDArray[np.uint8]:
    """Elements as their bytes: (accesses, size)."""
    return elements.view(np.uint8).reshape(-1, size)


def split(elements: Array, width: int, count: int) -> list[Array]:
    """The words of accesses: `count` of `width` bytes each."""
    if count == 1:
        return [elements]
    return list(elements.view(WORDS[width]).reshape(-1, count).T.copy())


def joined(words: list[Array]) -> Array:
    """The inverse of `split`."""
    if len(words) == 1:
        return words[0]
    rows = np.empty((len(words[0]), len(words)), words[0].dtype)
    for i, word in enumerate(words):
        rows[:, i] = word
    return rows.view(element(rows.itemsize * len(words))).reshape(-1)
