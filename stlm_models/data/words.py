"""Words as tokens, for the word-level baseline of a byte model: lossless, and made from its corpus.

Ids 0 to 255 are bytes, 256 stands before a document, and from 257 on come the most frequent patches
that the space rule makes of the training split. A patch that is no word is spelled by its bytes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from stlm_kernels import find_patches

from ..config import BOS_ID, BYTES

FIRST_WORD = BOS_ID + 1
MAX_SIZE = 1 << 18
MAX_WORD_BYTES = 64
MIN_COUNT = 2
"""Least count of a word: were all patches words, training would never show how to spell one."""
CHUNK_BYTES = 1 << 17
"""Text is cut into patches so many bytes at a time, which bounds the memory that it takes."""
MAX_FILE_BYTES = MAX_SIZE * (6 * MAX_WORD_BYTES + 4)  # each byte as \u00xx


@dataclass(frozen=True)
class WordVocabulary:
    r"""Patches that are words: `vocabulary.decode(vocabulary.encode(data)) == data` for any bytes.

    Args:
        words: 2 to 64 bytes each, none twice; the first has id 257.

    Raises:
        ValueError: for words that are not such, or too many of them.

    >>> vocabulary = WordVocabulary.of([b"to be or not to be"] * 9, 300)
    >>> vocabulary.decode(vocabulary.encode(b"be"))
    b'be'
    """

    words: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.words) > MAX_SIZE - FIRST_WORD:
            expected = f"at most {MAX_SIZE - FIRST_WORD} of them"
            raise ValueError(f"words: expected {expected}, got {len(self.words)}")
        for word in self.words:
            if not isinstance(word, bytes) or not 2 <= len(word) <= MAX_WORD_BYTES:
                expected = f"2 to {MAX_WORD_BYTES} bytes each"
                raise ValueError(f"words: expected {expected}, got {word!r:.80}")
        if len(self._ids) != len(self.words):
            word = Counter(self.words).most_common(1)[0][0]
            raise ValueError(f"words: expected each once, got {word!r} again")

    @classmethod
    def of(cls, documents: Iterable[bytes | memoryview], size: int) -> WordVocabulary:
        """The most frequent words of the documents, so many that all ids together are `size`.

        Of words that are equally frequent the smaller bytes come first; fewer than `size` ids where
        no more patches occur twice.

        Raises:
            ValueError: for a size that does not hold the bytes, or beyond 262,144.
        """
        if not FIRST_WORD <= size <= MAX_SIZE:
            raise ValueError(f"size: expected {FIRST_WORD} to {MAX_SIZE}, got {size}")
        counts: Counter[bytes] = Counter()
        for document in documents:
            for chunk, offsets in _chunks(document):
                counts.update(_patches(chunk, offsets))
        found = [
            (-count, patch)
            for patch, count in counts.items()
            if count >= MIN_COUNT and 2 <= len(patch) <= MAX_WORD_BYTES
        ]
        return cls(tuple(word for _, word in sorted(found)[: size - FIRST_WORD]))

    @property
    def size(self) -> int:
        """Number of ids, bytes and document start among them."""
        return FIRST_WORD + len(self.words)

    def encode(self, data: bytes | memoryview) -> NDArray[np.int32]:
        """The ids (N,) of one document, without the document start before it."""
        ids = [self._encode_chunk(*chunk) for chunk in _chunks(data)]
        return np.concatenate(ids) if ids else np.empty(0, np.int32)

    def decode(self, ids: NDArray[np.integer]) -> bytes:
        """The bytes that ids (N,) stand for.

        Raises:
            ValueError: for an id that stands for none: 256, or one out of range.
        """
        table, found = self._table, []
        for token in ids.tolist():
            if not 0 <= token < self.size or token == BOS_ID:
                expected = f"0 to {self.size - 1} without {BOS_ID}"
                raise ValueError(f"ids: expected {expected}, got {token}")
            found.append(table[token])
        return b"".join(found)

    def to_json(self) -> bytes:
        """Return a JSON list of strings, each character a byte."""
        return json.dumps([word.decode("latin-1") for word in self.words]).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> WordVocabulary:
        """Read the JSON of `to_json`.

        Raises:
            ValueError: where it is something else.
        """
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"words: expected at most {MAX_FILE_BYTES} bytes, got {len(data)}")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"words: expected JSON, got something else ({error})") from None
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError("words: expected a list of strings, got something else")
        try:
            return cls(tuple(value.encode("latin-1") for value in values))
        except UnicodeEncodeError as error:
            raise ValueError(f"words: expected characters below 256, got {error}") from None

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {word: FIRST_WORD + n for n, word in enumerate(self.words)}

    @cached_property
    def _table(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(BYTES)), b"", *self.words]

    def _encode_chunk(self, chunk: bytes, offsets: NDArray[np.int32]) -> NDArray[np.int32]:
        found = map(self._ids.get, _patches(chunk, offsets), itertools.repeat(-1))
        ids = np.fromiter(found, np.int32, len(offsets) - 1)
        is_word, starts = ids >= 0, offsets[:-1] - offsets[0]
        # A word's id takes the place of its first byte; its other bytes go.
        tokens = np.frombuffer(chunk, np.uint8)[offsets[0] : offsets[-1]].astype(np.int32)
        gone = np.repeat(is_word, np.diff(offsets))
        gone[starts] = False
        tokens[starts[is_word]] = ids[is_word]
        return tokens[~gone]


def _patches(chunk: bytes, offsets: NDArray[np.int32]) -> list[bytes]:
    return [chunk[begin:end] for begin, end in itertools.pairwise(offsets.tolist())]


def _chunks(document: bytes | memoryview) -> Iterator[tuple[bytes, NDArray[np.int32]]]:
    """A document in chunks of whole patches: bytes, and where in them its patches begin and end."""
    begin, size = 0, CHUNK_BYTES
    while begin < len(document):
        # The byte before, which closed its patch, tells the rule that this is no document's first.
        first = max(0, begin - 1)
        chunk = bytes(document[first : begin + size])
        patches = find_patches(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), rule="space")
        ends = begin + size >= len(document)
        # The last patch may go on beyond the chunk.
        offsets = patches.cu_patchlens.numpy()[begin - first : None if ends else -1]
        if len(offsets) < 2:
            size *= 2
            continue
        yield chunk, offsets
        begin, size = first + int(offsets[-1]), CHUNK_BYTES
