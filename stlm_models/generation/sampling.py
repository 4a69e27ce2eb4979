"""Sampling of bytes: the methods `generate`, `generate_batch` and `stream` of `STLM`."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stlm_kernels import linear_sample
from stlm_kernels.runtime import compute_dtype

from ..config import BYTES
from ..layers.embedding import TiedEmbedding
from ..layers.modes import eval_mode
from .engine import (
    CachedRun,
    advance,
    check_writes_bytes,
    fit_context,
    lost_logits,
    prompt_ids,
)
from .plain_layers import DTYPES
from .stages import ByteModel

Prompt = bytes | str
Stop = bytes | list[bytes] | None


class GenerationMixin:
    """Methods that write bytes, for a model with the stages of `ByteModel`."""

    def generate(
        self: ByteModel,
        prompt: Prompt,
        *,
        max_new_bytes: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Stop = None,
    ) -> bytes:
        """The bytes that follow the prompt, without it.

        The prompt is run once; each byte then costs one row of each byte layer, and the core runs
        when a patch closes. Once the prompt and its continuation outgrow `config.context`, the
        model begins anew with the last half context, cut at a patch boundary; the end of the prompt
        is never lost.

        Args:
            prompt: bytes, or text to encode as UTF-8. The model sees just these, as if they stood
                within a document; an empty prompt begins one (id 256).
            max_new_bytes: how many at most.
            temperature, top_k, top_p: see `stlm_kernels.linear_sample`; special ids are never
                drawn.
            seed: same seed, same bytes; None draws one from torch's generator.
            stop: end with the first byte that completes one of these, in whatever order they are;
                the result goes up to its beginning, that of the longest where one byte completes
                several.

        Raises:
            ValueError: for an argument out of range.
            FloatingPointError: where the logits of a byte are NaN, +inf, or all -inf.
        """
        settings = _Sampling(temperature, top_k, top_p, seed)
        return _run_rows(self, [_Row.start(prompt, _stops(stop))], max_new_bytes, settings)[0]

    def generate_batch(
        self: ByteModel,
        prompts: Sequence[Prompt],
        *,
        max_new_bytes: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Stop = None,
    ) -> list[bytes]:
        """`generate` for several prompts of any lengths at once.

        Row 0 gives what `generate` gives; equal prompts in other rows draw noise of their own.
        """
        if isinstance(prompts, bytes | str):
            raise ValueError("prompts: expected a list of prompts, got a single one; use generate")
        settings = _Sampling(temperature, top_k, top_p, seed)
        rows = [_Row.start(prompt, _stops(stop)) for prompt in prompts]
        return _run_rows(self, rows, max_new_bytes, settings)

    def stream(
        self: ByteModel,
        prompt: Prompt,
        *,
        max_new_bytes: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Stop = None,
    ) -> Iterator[str]:
        """`generate` as text, chunk by chunk, never with half a character.

        What is not UTF-8 comes as the replacement character. What may turn out to be the beginning
        of a stop is held back until it is not. Between two chunks the model is in the mode that the
        caller has it in; its parameters must not change before the last.
        """
        settings = _Sampling(temperature, top_k, top_p, seed)
        row = _Row.start(prompt, _stops(stop))
        # A generator's body waits for the first chunk; wrong arguments should not.
        return _chunks(row, _steps(self, [row], max_new_bytes, settings))


def _run_rows(
    model: ByteModel, rows: list[_Row], max_new_bytes: int, settings: _Sampling
) -> list[bytes]:
    """The bytes that follow each prompt."""
    for _ in _steps(model, rows, max_new_bytes, settings):
        pass
    return [bytes(row.text) for row in rows]


def _chunks(row: _Row, steps: Iterator[None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    given = 0
    for _ in steps:
        safe = len(row.text) - row.held_back()
        if chunk := decoder.decode(bytes(row.text[given:safe])):
            yield chunk
        given = max(given, safe)
    if chunk := decoder.decode(bytes(row.text[given:]), final=True):
        yield chunk


@dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None

    def __post_init__(self) -> None:
        if self.seed is not None and not _is_int(self.seed):
            raise ValueError(f"seed: expected None or an int, got {self.seed!r}")
        # The op knows what is allowed. Asked here, it says so before the first byte is awaited.
        nothing = torch.zeros(1, 1)
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        linear_sample(nothing, nothing, seed=0, **options)  # type: ignore[arg-type]

    def at_step(self, step: int, base: int) -> dict[str, Any]:
        # Spread over the int64 range, so that runs with neighbouring seeds share no noise.
        seed = (base * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": seed,
            "valid_vocab": BYTES,
        }


@dataclass
class _Row:
    """One prompt and what followed it."""

    window: list[int]
    """The ids that the model sees."""
    stops: list[bytes]
    text: bytearray = field(default_factory=bytearray)
    done: bool = False

    @classmethod
    def start(cls, prompt: Prompt, stops: list[bytes]) -> _Row:
        if not isinstance(prompt, bytes | str):
            raise ValueError(f"prompt: expected bytes or str, got {type(prompt).__name__}")
        try:
            data = prompt.encode() if isinstance(prompt, str) else prompt
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt: expected text of whole characters, got {error}") from None
        return cls(prompt_ids(data), stops)

    def append(self, byte: int) -> None:
        self.window.append(byte)
        self.text.append(byte)
        ended = max((len(stop) for stop in self.stops if self.text.endswith(stop)), default=0)
        if ended:
            del self.text[-ended:]
            self.done = True

    def held_back(self) -> int:
        """Count the bytes at the end that may be the beginning of a stop."""
        if self.done:
            return 0
        return max((_overlap(self.text, stop) for stop in self.stops), default=0)


def _overlap(text: bytearray, stop: bytes) -> int:
    """Length of the longest end of text that a stop begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _stops(stop: Stop) -> list[bytes]:
    stops = [] if stop is None else [stop] if isinstance(stop, bytes) else stop
    if not isinstance(stops, list) or not all(isinstance(s, bytes) and s for s in stops):
        raise ValueError(f"stop: expected None, bytes or a list of them, none empty, got {stop!r}")
    return list(stops)  # the caller's own may change while a stream is read


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _steps(
    model: ByteModel, rows: list[_Row], max_new_bytes: int, settings: _Sampling
) -> Iterator[None]:
    check_writes_bytes(model)
    if not _is_int(max_new_bytes) or max_new_bytes < 0:
        raise ValueError(f"max_new_bytes: expected an int of at least 0, got {max_new_bytes!r}")
    base = torch.randint(2**62, ()).item() if settings.seed is None else settings.seed
    return _run_steps(model, rows, max_new_bytes, settings, int(base))


def _run_steps(
    model: ByteModel, rows: list[_Row], max_new_bytes: int, settings: _Sampling, base: int
) -> Iterator[None]:
    """Add a byte to every row that is not done, again and again."""
    if not rows or max_new_bytes == 0:
        return
    modules, ids = list(model.modules()), torch.empty(0)
    # Between two steps the caller goes on with the model: nothing may be in force there.
    with eval_mode(model, modules), torch.no_grad():
        for row in rows:
            row.window = fit_context(model, row.window)
        windows = [row.window for row in rows]
        run, largest_norm = CachedRun(model, windows), _largest_norm(model.embedding)
    for step in range(max_new_bytes):
        with eval_mode(model, modules), torch.no_grad():
            if step:
                advance(run, windows, ids, [i for i, row in enumerate(rows) if not row.done])
            # Finished rows stay in, so that the noise of the others does not depend on them.
            ids = model.embedding.sample(run.hidden, **settings.at_step(step, base))
            drawn = _checked_ids(model, run, rows, ids, largest_norm)
        for row, byte in zip(rows, drawn, strict=True):
            if not row.done:
                row.append(byte)
        yield
        if all(row.done for row in rows):
            return


def _checked_ids(
    model: ByteModel,
    run: CachedRun,
    rows: Sequence[_Row],
    ids: Tensor,
    largest_norm: float = math.nan,
) -> list[int]:
    """The ids (B,) on the host, or a FloatingPointError where they were drawn from no numbers.

    Args:
        largest_norm: of `_largest_norm`.
    """
    if _are_bounded(run.hidden, largest_norm):
        kept: list[int] = ids.tolist()
        return kept
    peaks = model.embedding.logits(run.hidden, valid_vocab=BYTES).amax(-1)  # NaN where one is
    is_finite = peaks - peaks == 0  # isfinite takes four launches
    drawn: list[int] = torch.where(is_finite, ids, -1).tolist()  # waits once for both
    for i, row in enumerate(rows):
        if drawn[i] < 0 and not row.done:
            raise lost_logits(peaks[i], f"prompt {i} after {len(row.text)} bytes")
    return drawn


def _largest_norm(embedding: TiedEmbedding) -> float:
    """Return the largest norm of a byte's output row, scaled; NaN where that bounds no logit."""
    weight = embedding.weight
    if "logits" in vars(embedding) or not weight.is_cpu or weight.dtype not in DTYPES:
        return math.nan
    rows = embedding.output_rows(BYTES).detach().double()
    return abs(embedding.logit_scale) * float(rows.square().sum(1).max().sqrt())


def _are_bounded(hidden: Tensor, largest_norm: float) -> bool:
    """Return whether all logits of hidden (B, D) are numbers, for their bounds are.

    |x w| <= |x| |w|: one look at the states in place of a product with the table.
    """
    is_exact = hidden.dtype in DTYPES and compute_dtype(hidden) == hidden.dtype
    if not (is_exact and largest_norm < math.inf):
        return False
    flat = hidden.flatten()
    bound = largest_norm * math.sqrt(float(torch.dot(flat, flat)))
    return 2 * bound < torch.finfo(hidden.dtype).max
