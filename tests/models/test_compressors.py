"""Compressors that a model's bits per byte are held against."""

import bz2
import gzip
import importlib.util
import lzma

import pytest

from stlm_models.data import compressors
from stlm_models.data.compressors import bits_per_byte_of, compressed_sizes

WORDS = b"".join(
    b"entry %d of the %s part\n" % (n, b"odd" if n % 2 else b"even") for n in range(99)
)
OTHER = b"".join(
    b"entry %d of the %s part\n" % (n, b"odd" if n % 2 else b"even") for n in range(99, 300)
)
HAS_PPMD = importlib.util.find_spec("pyppmd") is not None


def test_each_at_its_strongest() -> None:
    sizes = compressed_sizes(WORDS)
    assert sizes["gzip -9"] == len(gzip.compress(WORDS, 9))
    assert sizes["bzip2 -9"] == len(bz2.compress(WORDS, 9))
    assert sizes["xz -9"] == len(lzma.compress(WORDS, preset=9))
    assert ("PPMd" in sizes) == HAS_PPMD
    assert "PPMd after the training text" not in sizes


@pytest.mark.skipif(not HAS_PPMD, reason="needs pyppmd: pip install 'stlm[compressors]'")
class TestPPMd:
    def test_sizes_are_those_that_decode(self) -> None:
        pyppmd = pytest.importorskip("pyppmd")
        encoder = pyppmd.Ppmd7Encoder(compressors.PPMD_ORDER, compressors.PPMD_MEMORY)
        coded = encoder.encode(WORDS) + encoder.flush()
        assert compressed_sizes(WORDS)["PPMd"] == len(coded)
        decoder = pyppmd.Ppmd7Decoder(compressors.PPMD_ORDER, compressors.PPMD_MEMORY)
        decoded = decoder.decode(coded, len(WORDS))
        decoded += decoder.decode(b"", len(WORDS) - len(decoded))  # it holds back a few
        assert decoded == WORDS

    def test_training_text_helps_and_is_not_counted(self) -> None:
        sizes = compressed_sizes(WORDS, [OTHER[:700], memoryview(OTHER)[700:]])
        primed = sizes["PPMd after the training text"]
        whole, alone = (compressed_sizes(text)["PPMd"] for text in (OTHER + WORDS, OTHER))
        # One stream for both: what the second adds, within the bytes that a coder holds back.
        assert abs(primed - (whole - alone)) <= 8
        assert primed < 0.8 * sizes["PPMd"]

    def test_only_the_end_of_much_training_text_is_read(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compressors, "PPMD_MOST_TRAINING", 1000)
        name = "PPMd after the training text"
        documents = [OTHER, OTHER[:300], OTHER[300:900]]
        at_the_end = [(OTHER + OTHER[:900])[-1000:]]
        assert compressed_sizes(WORDS, documents)[name] == compressed_sizes(WORDS, at_the_end)[name]

    def test_no_bytes(self) -> None:
        assert compressed_sizes(b"", [b""])["PPMd"] < 10
        assert bits_per_byte_of(compressed_sizes(b""), 0) == {}


def test_bits_per_byte() -> None:
    assert bits_per_byte_of({"a": 3, "b": 0}, 12) == {"a": 2.0, "b": 0.0}
