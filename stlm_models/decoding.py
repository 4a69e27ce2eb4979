"""Generate bytes with a model: the methods `generate`, `generate_batch` and `stream` of `STLM`."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stlm_kernels import linear_sample

from .cached import CachedRun
from .config import BOS_ID, BYTES
from .modes import eval_mode

if TYPE_CHECKING:
    from .model import STLM

Prompt = bytes | str
Stop = bytes | list[bytes] | None


def generate(
    model: STLM,
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

    The prompt is run once; each byte then costs one row of each byte layer, and the core runs when
    a patch closes. Once the prompt and its continuation outgrow `config.context`, the model begins
    anew with the last half context, cut at a patch border; the end of the prompt is never lost.

    Args:
        prompt: bytes, or text to encode as UTF-8. The model sees just these, as if they stood
            within a document; an empty prompt begins one (id 256).
        max_new_bytes: how many at most.
        temperature, top_k, top_p: see `stlm_kernels.linear_sample`; special ids are never drawn.
        seed: same seed, same bytes; None draws one from torch's generator.
        stop: end with the first byte that completes one of these, in whatever order they are; the
            result goes up to its beginning, that of the longest where one byte completes several.

    Raises:
        ValueError: for an argument out of range.
        FloatingPointError: where the logits of a byte are NaN, +inf, or all -inf.
    """
    return generate_batch(
        model,
        [prompt],
        max_new_bytes=max_new_bytes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )[0]


def generate_batch(
    model: STLM,
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
    for _ in _steps(model, rows, max_new_bytes, settings):
        pass
    return [bytes(row.text) for row in rows]


def stream(
    model: STLM,
    prompt: Prompt,
    *,
    max_new_bytes: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Stop = None,
) -> Iterator[str]:
    """`generate` as text, piece by piece, never with half a character.

    What is not UTF-8 comes as the replacement character. What may turn out to be the beginning of
    a stop is held back until it is not. Between two pieces the model is in the mode that the
    caller has it in; its parameters must not change before the last.
    """
    settings = _Sampling(temperature, top_k, top_p, seed)
    row = _Row.start(prompt, _stops(stop))
    # A generator's body waits for the first piece; wrong arguments should not.
    return _pieces(row, _steps(model, [row], max_new_bytes, settings))


def _pieces(row: _Row, steps: Iterator[None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    given = 0
    for _ in steps:
        safe = len(row.text) - row.held_back()
        if piece := decoder.decode(bytes(row.text[given:safe])):
            yield piece
        given = max(given, safe)
    if piece := decoder.decode(bytes(row.text[given:]), final=True):
        yield piece


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
        """How many bytes at the end may be the beginning of a stop."""
        if self.done:
            return 0
        return max((_overlap(self.text, stop) for stop in self.stops), default=0)


def prompt_ids(prompt: bytes) -> list[int]:
    """What a model is shown of a prompt: its bytes, or id 256 where it has none."""
    return [*prompt] or [BOS_ID]


def _overlap(text: bytearray, stop: bytes) -> int:
    """Length of the longest end of text that a stop begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _stops(stop: Stop) -> list[bytes]:
    stops = [] if stop is None else [stop] if isinstance(stop, bytes) else stop
    if not isinstance(stops, list) or not all(isinstance(s, bytes) and s for s in stops):
        raise ValueError(f"stop: expected None, bytes or a list of them, none empty, got {stop!r}")
    return list(stops)  # the caller's own may change while a stream is read


def check_writes_bytes(model: STLM) -> None:
    """Refuse a model that cannot go on byte by byte with a ValueError."""
    if model.config.tokens == "words":
        raise ValueError(
            'tokens: expected "bytes" to generate, got "words": the word model is a baseline that'
            " is judged by bits per byte and writes no bytes"
        )
    if model.config.patch_rule == "external":
        raise ValueError(
            'patch_rule: expected a rule to generate, got "external": the patches of bytes that are'
            " yet to be written are unknown"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _steps(
    model: STLM, rows: list[_Row], max_new_bytes: int, settings: _Sampling
) -> Iterator[None]:
    check_writes_bytes(model)
    if not _is_int(max_new_bytes) or max_new_bytes < 0:
        raise ValueError(f"max_new_bytes: expected an int of at least 0, got {max_new_bytes!r}")
    base = torch.randint(2**62, ()).item() if settings.seed is None else settings.seed
    return _run_steps(model, rows, max_new_bytes, settings, int(base))


def _run_steps(
    model: STLM, rows: list[_Row], max_new_bytes: int, settings: _Sampling, base: int
) -> Iterator[None]:
    """Add a byte to every row that is not done, again and again."""
    if not rows or max_new_bytes == 0:
        return
    with eval_mode(model), torch.no_grad():
        for row in rows:
            row.window = fit_context(model, row.window)
        run = CachedRun(model, [row.window for row in rows])
    # Between two steps the caller goes on with the model: nothing may be in force there.
    for step in range(max_new_bytes):
        with eval_mode(model), torch.no_grad():
            # Finished rows stay in, so that the noise of the others does not depend on them.
            ids = model.embedding.sample(run.hidden, **settings.at_step(step, base))
            drawn = _checked_ids(model, run, rows, ids)
        for row, byte in zip(rows, drawn, strict=True):
            if not row.done:
                row.append(byte)
        yield
        if all(row.done for row in rows) or step == max_new_bytes - 1:
            return
        active = [i for i, row in enumerate(rows) if not row.done]
        with eval_mode(model), torch.no_grad():
            advance(run, [row.window for row in rows], ids, active)


def _checked_ids(model: STLM, run: CachedRun, rows: Sequence[_Row], ids: Tensor) -> list[int]:
    """The ids (B,) on the host, or a FloatingPointError where they were drawn from no numbers."""
    peaks = model.embedding.logits(run.hidden, valid_vocab=BYTES).amax(-1)  # NaN where one is
    drawn: list[int] = ids.masked_fill(~peaks.isfinite(), -1).tolist()  # waits once for both
    for i, row in enumerate(rows):
        if drawn[i] < 0 and not row.done:
            raise lost_logits(peaks[i], f"prompt {i} after {len(row.text)} bytes")
    return drawn


def lost_logits(peak: Tensor, place: str) -> FloatingPointError:
    """The error of logits to draw from whose maximum, 0-d, is no number."""
    return FloatingPointError(
        f"logits: expected numbers to draw from, got a maximum of {float(peak)} for {place}:"
        " check the model's parameters"
    )


def advance(
    run: CachedRun,
    windows: Sequence[list[int]],
    ids: Tensor,  # (B,) integers
    rows: Sequence[int],
) -> None:
    """Show each of these rows (ascending) its next id, or the window that it goes on with.

    Args:
        windows: what each row sees, its next id included. One that has outgrown the context is
            cut by `fit_context`, in place.
        ids: of all rows; those of rows left out are not read.
    """
    context = run.model.config.context
    going = [i for i in rows if len(windows[i]) <= context]
    outgrown = [i for i in rows if len(windows[i]) > context]
    if going:
        run.step(ids, going)
    if outgrown:
        for i in outgrown:
            windows[i][:] = fit_context(run.model, windows[i])
        run.restart(outgrown, [windows[i] for i in outgrown])


def fit_context(model: STLM, window: list[int]) -> list[int]:
    """The window, or where it has outgrown the context its last half context or a little less.

    The cut falls on the first patch border there, so that no patch is torn; a text without a
    border there, and a flat model's, is cut at the half itself.
    """
    context = model.config.context
    if len(window) <= context:
        return window
    earliest = len(window) - context // 2
    if model.is_flat:
        return window[earliest:]
    starts = model.patcher(torch.tensor(window, dtype=torch.int16)).cu_patchlens[:-1]
    after = starts[starts >= earliest]
    return window[int(after[0]) if after.numel() else earliest :]
