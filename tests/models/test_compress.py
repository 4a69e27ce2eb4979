"""Compression: any bytes come back, at the price that the model's probabilities name.

A byte that leaks lowers the loss of a full run and cannot lower this price: that is the proof.
"""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TEXT, TINY, scrambled
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stlm_models import STLM, bits_per_byte
from stlm_models.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from stlm_models.compress import main as compress_main
from stlm_models.compression.codec import compress, decompress
from stlm_models.compression.file_format import FRONT, HEADER, Compressed, unpack
from stlm_models.compression.range_coder import TOTAL_BITS, Decoder, Encoder, most_symbols
from stlm_models.compression.streams import cumulative_shares, default_streams, stream_boundaries
from stlm_models.config import BOS_ID
from stlm_models.decompress import main as decompress_main
from stlm_models.generation.engine import fit_context

TOTAL = 1 << TOTAL_BITS
OURS, OTHERS = "ab" * 32, "cd" * 32
WORDS = b"some words, and more words; " * 5


@pytest.fixture(scope="module", name="model")
def one_model() -> STLM:
    model = scrambled()
    # Flat enough that no byte is rarer than the smallest share, which would make it cheaper.
    nn.init.normal_(model.embedding.weight, std=0.3)
    return model


def coded(symbols: list[int], shares: list[int]) -> bytes:
    encoder = Encoder()
    for symbol in symbols:
        encoder.encode(shares[symbol], shares[symbol + 1])
    return encoder.finish()


def decoded(code: bytes, shares: list[int], length: int) -> list[int]:
    decoder = Decoder(code)
    return [decoder.decode(shares) for _ in range(length)]


class TestArithmetic:
    @given(st.data())
    def test_round_trip(self, data: st.DataObject) -> None:
        edges = data.draw(st.sets(st.integers(1, TOTAL - 1), max_size=20))
        shares = [0, *sorted(edges), TOTAL]
        symbols = data.draw(st.lists(st.integers(0, len(edges)), max_size=60))
        assert decoded(coded(symbols, shares), shares, len(symbols)) == symbols

    @pytest.mark.parametrize(("last", "begins"), [(0, b"\x7f" + b"\xff" * 39), (2, b"\x80")])
    def test_a_carry_runs_through_digits_of_255(self, last: int, begins: bytes) -> None:
        shares = [0, TOTAL // 2 - 1, TOTAL // 2 + 1, TOTAL]
        symbols = [1] * 20 + [last]
        code = coded(symbols, shares)
        assert code.startswith(begins)
        assert decoded(code, shares, 21) == symbols

    @pytest.mark.parametrize("likely", [0.5, 0.9, 0.999])
    def test_costs_what_the_shares_say(self, likely: float) -> None:
        first = round(likely * TOTAL)
        shares = [0, first, first + (TOTAL - first) // 3, TOTAL]
        rng = random.Random(1)
        symbols = rng.choices(range(3), [b - a for a, b in pairwise(shares)], k=20_000)
        bits = sum(TOTAL_BITS - math.log2(shares[s + 1] - shares[s]) for s in symbols)
        code = coded(symbols, shares)
        assert bits - 8 < 8 * len(code) < bits * 1.0002 + 16
        assert decoded(code, shares, len(symbols)) == symbols

    def test_nothing_costs_nothing(self) -> None:
        assert coded([], [0, TOTAL]) == b"\0"
        assert len(coded([0] * 10_000, [0, TOTAL - 255, TOTAL])) < 40

    @pytest.mark.parametrize("symbol", [0, 255])
    def test_what_a_code_holds_at_most(self, symbol: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Coarser shares, so that a digit does not hold hundreds of thousands."""
        monkeypatch.setattr("stlm_models.compression.range_coder.TOTAL_BITS", 12)
        shares = [*range(symbol + 1), *range(2**12 - 255 + symbol, 2**12 + 1)]
        assert shares[symbol + 1] - shares[symbol] == 2**12 - 255
        for count in range(1, 1500, 7):
            digits = len(coded([symbol] * count, shares))
            assert most_symbols(digits - 2, 256) < count <= most_symbols(digits, 256)


class TestShares:
    def test_they_are_the_probabilities(self) -> None:
        logits = 3 * torch.randn(5, 256)
        cumulative = cumulative_shares(logits)
        assert cumulative.shape == (5, 257)
        assert (cumulative[:, 0] == 0).all()
        assert (cumulative[:, -1] == TOTAL).all()
        shares = torch.from_numpy(cumulative).diff()
        expected = logits.double().softmax(-1)
        # One for each symbol, what is left for the likeliest, and rounding down.
        assert (shares / TOTAL - expected).abs().max() < 300 / TOTAL

    def test_what_is_impossible_has_a_share_too(self) -> None:
        logits = torch.full((256,), -200.0)
        logits[7] = 200.0
        shares = torch.from_numpy(cumulative_shares(logits)).diff()
        assert shares.min() == 1
        assert shares[7] == TOTAL - 255

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_logits_that_say_nothing(self, value: float) -> None:
        with pytest.raises(ValueError, match="model: expected finite logits"):
            cumulative_shares(torch.tensor([0.0, value]))


def test_streams() -> None:
    assert [default_streams(n) for n in (0, 1, 4096, 4097, 10**9)] == [1, 1, 1, 2, 64]
    assert stream_boundaries(10, 4) == [0, 2, 5, 7, 10]


FILES = {
    "empty": b"",
    "one byte": b"\xff",
    "all bytes": bytes(range(256)),
    "random": random.Random(0).randbytes(100),
    "not UTF-8": "Zoë".encode()[:-1] + b"\x80\xfe \xc3" + TEXT,
    "a long run": b"\0" * 90,
    "beyond the context": WORDS,
}


@pytest.mark.parametrize("streams", [1, 7])
@pytest.mark.parametrize("name", FILES)
def test_any_file_comes_back(model: STLM, name: str, streams: int) -> None:
    data = FILES[name]
    streams = min(streams, max(1, len(data)))
    threads = torch.get_num_threads()
    done = [0]
    model.train()
    file = compress(model, data, checkpoint=OURS, streams=streams, on_progress=done.append)
    assert len(unpack(file).codes) == streams
    # Each byte once: a stream that has ended is asked for no more.
    assert done[-1] == len(data)
    # Neither the mode nor the threads nor autocast of a caller make a difference.
    model.eval()
    torch.set_num_threads(2)
    with torch.autocast("cpu"):
        assert decompress(model, file, checkpoint=OURS) == data
    assert torch.get_num_threads() == 2
    assert not model.training
    torch.set_num_threads(threads)


def code_bits(file: bytes) -> int:
    return 8 * sum(map(len, unpack(file).codes))


def stepwise_bits(model: STLM, data: bytes) -> float:
    """-log2 p of each byte from a full run over what the model may see of those before it."""
    window, bits = [BOS_ID], 0.0
    for byte in data:
        with torch.no_grad():
            logits = model(torch.tensor(window))[-1, :256].double()
        bits -= float(logits.log_softmax(0)[byte]) / math.log(2)
        window = fit_context(model, [*window, byte])
    return bits


class LookingAhead(STLM):
    """A model that knows the next byte in a full run."""

    def _run(self, byte_ids: Tensor, *arguments: Any) -> Any:
        honest, auxiliary = super()._run(byte_ids, *arguments)
        return honest + 8 * self.embedding.embed(byte_ids.roll(-1)), auxiliary


class TestSize:
    def test_it_is_what_bits_per_byte_says(self, model: STLM) -> None:
        data = WORDS[: 4 * (TINY.context - 1)]
        streams = [data[begin:end] for begin, end in pairwise(stream_boundaries(len(data), 4))]
        bits = len(data) * bits_per_byte(model, streams)
        got = code_bits(compress(model, data, checkpoint=OURS, streams=4))
        assert bits - 8 * 4 < got < bits * 1.001 + 8 * 4

    def test_beyond_the_context(self, model: STLM) -> None:
        exact = stepwise_bits(model, WORDS)
        got = code_bits(compress(model, WORDS, checkpoint=OURS, streams=1))
        assert exact - 8 < got < exact * 1.001 + 8

    def test_a_leak_is_found_out(self, model: STLM) -> None:
        leaking = LookingAhead(TINY)
        leaking.load_state_dict(model.state_dict())
        file = compress(leaking, WORDS, checkpoint=OURS, streams=1)
        promised = len(WORDS) * bits_per_byte(leaking, WORDS)
        assert code_bits(file) > 1.5 * promised
        # Its bytes are worth no more than those of the honest model, and come back as well.
        assert file == compress(model, WORDS, checkpoint=OURS, streams=1)
        assert decompress(leaking, file, checkpoint=OURS) == WORDS


@pytest.fixture(scope="module", name="file")
def one_file(model: STLM) -> bytes:
    return compress(model, TEXT, checkpoint=OURS)


class TestRefusals:
    def test_damage(self, model: STLM, file: bytes) -> None:
        for at in (5, FRONT.size, FRONT.size + 40, len(file) // 2, len(file) - 1):
            broken = bytearray(file)
            broken[at] ^= 4
            with pytest.raises(ValueError, match="file: damaged, its checksum"):
                decompress(model, bytes(broken), checkpoint=OURS)
        for cut in (file[:-1], file + b"\0"):
            with pytest.raises(ValueError, match="file: damaged"):
                decompress(model, cut, checkpoint=OURS)
        with pytest.raises(ValueError, match="file: damaged, it ends after 6 bytes"):
            unpack(file[:6])

    def test_foreign_files(self, file: bytes) -> None:
        for foreign in (b"", b"\x1f\x8b\x08", TEXT):
            with pytest.raises(ValueError, match=r"file: expected one of stlm_models\.compress"):
                unpack(foreign)
        with pytest.raises(ValueError, match="file: expected format version 1, got 2"):
            unpack(file[:4] + b"\x02" + file[5:])

    def test_headers_that_no_encoder_writes(self, file: bytes) -> None:
        packed = vars(unpack(file))
        more = (*HEADER.unpack_from(file, FRONT.size)[:4], 5, 0)
        short = HEADER.pack(*more) + b"\0" * 8
        for made in (
            Compressed(**{**packed, "codes": ()}).pack(),
            Compressed(**{**packed, "codes": (b"",) * (len(TEXT) + 1)}).pack(),
            FRONT.pack(b"STLM", 1, zlib.crc32(short)) + short,
        ):
            with pytest.raises(ValueError, match=f"file: expected 1 to {len(TEXT)} streams"):
                unpack(made)

    @pytest.mark.parametrize("length", [2**62, 2**40, 365_000 * 2])
    def test_more_text_than_the_codes_can_hold(self, model: STLM, file: bytes, length: int) -> None:
        """No memory is asked for what a header promises."""
        packed = Compressed(**{**vars(unpack(file)), "length": length, "codes": (b"ab",)})
        with pytest.raises(ValueError, match=f"file: damaged, its 2 bytes .* got {length}"):
            decompress(model, packed.pack(), checkpoint=OURS)

    def test_another_checkpoint(self, model: STLM, file: bytes) -> None:
        with pytest.raises(ValueError, match=f"checkpoint: expected {OURS}, .* got {OTHERS}"):
            decompress(model, file, checkpoint=OTHERS)

    def test_another_context(self, model: STLM, file: bytes) -> None:
        packed = unpack(file)
        longer = Compressed(**{**vars(packed), "context": 33})
        with pytest.raises(ValueError, match="context: expected 33, which made the file, got 32"):
            decompress(model, longer.pack(), checkpoint=OURS)

    def test_other_arithmetic_is_never_returned_as_data(self, model: STLM, file: bytes) -> None:
        elsewhere = copy.deepcopy(model)
        elsewhere.to_output.weight.data *= 1.01
        expected = rf"expected torch .* on cpu \(.*\), got torch {torch.__version__[:4]}"
        with pytest.raises(ValueError, match=expected):
            decompress(elsewhere, file, checkpoint=OURS)

    @pytest.mark.parametrize("streams", [0, -1, len(TEXT) + 1])
    def test_streams(self, model: STLM, streams: int) -> None:
        with pytest.raises(ValueError, match="streams: expected 1 to the number of bytes"):
            compress(model, TEXT, checkpoint=OURS, streams=streams)


class TestCommands:
    @pytest.fixture(name="run")
    def run_folder(self, tmp_path: Path, model: STLM) -> Path:
        save_checkpoint(tmp_path / "run", Checkpoint(TINY, model.state_dict(), {}, {"step": 1}))
        return tmp_path / "run"

    def test_there_and_back(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = run / "text.txt"
        source.write_bytes(WORDS)
        assert compress_main(["--run", str(run), str(source), "--streams", "3"]) == 0
        small = source.with_name("text.txt.stlm")
        size = small.stat().st_size
        out = capsys.readouterr().out
        assert f"{size} bytes  {8 * size / len(WORDS):.4f} bits per byte" in out
        assert [line[:9].strip() for line in out.splitlines()[1:5]] == [
            "stlm",
            "gzip -9",
            "bzip2 -9",
            "xz -9",
        ]
        source.unlink()
        # Another process, with another number of threads.
        command = [sys.executable, "-m", "stlm_models.decompress", "--run", str(run), str(small)]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
        assert source.read_bytes() == WORDS

    def test_an_empty_file(self, run: Path) -> None:
        source, out = run / "empty", run / "back"
        source.touch()
        assert compress_main(["--run", str(run), str(source)]) == 0
        arguments = ["--run", str(run), str(run / "empty.stlm"), "-o", str(out)]
        assert decompress_main(arguments) == 0
        assert out.read_bytes() == b""

    def test_a_mistake_costs_one_line_and_no_file(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (run / "text.stlm").write_bytes(b"STLM, but not really" * 9)
        (run / "text.stlm.stlm").write_bytes(b"precious")
        (run / "taken").write_bytes(b"precious")
        (run / "taken.stlm").write_bytes(b"x")
        before = sorted(run.iterdir())
        for main, arguments, message in (
            (decompress_main, [run / "text.stlm"], "file: expected format version 1"),
            (decompress_main, [run / "taken.stlm"], "taken: exists already"),
            (decompress_main, [run / "taken"], "taken: expected a name in .stlm"),
            (compress_main, [run / "text.stlm"], "text.stlm.stlm: exists already"),
            (compress_main, [run / "absent"], "No such file"),
            (
                compress_main,
                [run / "taken", "-o", run / "a", "--streams", 0],
                "streams: expected 1",
            ),
        ):
            assert main(["--run", str(run), *map(str, arguments)]) == 1
            error = capsys.readouterr().err
            assert error.startswith("error: ")
            assert message in error
            assert error.count("\n") == 1
        assert sorted(run.iterdir()) == before
        assert (run / "taken").read_bytes() == b"precious"

    def test_the_digest_follows_the_model(self, run: Path, tmp_path: Path) -> None:
        first = load_checkpoint(run)
        later = Checkpoint(TINY, first.model, {}, {"step": 2})
        save_checkpoint(tmp_path / "later", later)
        assert load_checkpoint(tmp_path / "later").digest == first.digest
        model = load_model(run)
        model.to_output.weight.data[0, 0] += 1
        save_checkpoint(tmp_path / "other", Checkpoint(TINY, model.state_dict(), {}, {"step": 1}))
        assert load_checkpoint(tmp_path / "other").digest != first.digest
