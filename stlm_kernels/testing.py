"""Checks that prove an op right: ours in `tests/`, yours wherever you use the library.

The tolerance rule has no magic numbers: how wrong a result may be follows from how wrong plain
torch is on the same stored inputs, both judged against an fp64 reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks
from .runtime import check_ids as check_ids

RMS_FLOOR = {torch.float32: 2e-6, torch.float64: 2e-6 * 2.0**-29}
"""Least RMS error, relative to the reference, that a result in its accumulator's dtype may have.

The two differ by the ratio of the dtypes' eps. Narrower results are rounded, which covers it.
"""


def assert_matches(
    actual: Tensor,
    reference: Tensor,  # fp64
    yardstick: Tensor,  # plain torch, same dtype as actual
    *,
    name: str = "result",
    exact: bool = False,
    rows: bool = False,
    terms: Tensor | None = None,  # fp64, shaped as the reference
) -> None:
    """Hold `actual` to the tolerance rule.

    RMS error <= 1.5 x the yardstick's + eps/4 x RMS(reference), and max error <= 2 x (the
    yardstick's + eps x max|reference|). NaN and infinities must stand where the reference has them.

    A result that may cancel to nothing has no relative error: its terms were rounded. With `terms`
    the floor of the accumulator (`RMS_FLOOR`, of fp32 for 16-bit results) is relative to them; what
    is allowed for rounding to the result's own dtype stays relative to the reference.

    Args:
        actual: the tested result.
        reference: the right result in fp64.
        yardstick: what plain torch ops give, accumulated in fp32 and stored in actual's dtype.
        name: what the message calls the result.
        exact: demand equality with the reference instead (gathers, maxima).
        rows: judge a table row by row too; rows that are zero in the reference must be zero, those
            whose terms are zero where there are terms.
        terms: the sum of the absolute terms that make each element, where they may cancel.

    Raises:
        AssertionError: with the errors found and allowed.
    """
    assert actual.shape == reference.shape, f"{name}: {actual.shape} is not {reference.shape}"
    assert actual.dtype == yardstick.dtype, f"{name}: {actual.dtype} is not {yardstick.dtype}"
    got, want, yardstick = (x.detach().cpu().double() for x in (actual, reference, yardstick))
    if exact:
        assert torch.equal(got.nan_to_num(nan=1e300), want.nan_to_num(nan=1e300)), (
            f"{name}: expected equality, got a largest difference of {_largest(got - want):.3e}"
        )
        return
    finite = want.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    assert bool((same | finite).all()), f"{name}: NaN or infinity of the reference is missing"
    assert bool(got[finite].isfinite().all()), f"{name}: NaN or infinity that should not be there"
    if want.numel() == 0:
        return
    summed = want if terms is None else terms.detach().cpu().double()
    assert summed.shape == want.shape, f"{name}: terms of {summed.shape} for {want.shape}"
    zeros = torch.zeros_like(want)
    got, want, yardstick, summed = (
        torch.where(finite, x, zeros) for x in (got, want, yardstick, summed)
    )
    eps = torch.finfo(actual.dtype).eps
    floor = RMS_FLOOR.get(actual.dtype, 0.0 if terms is None else RMS_FLOOR[torch.float32])
    _assert_within(got - want, yardstick - want, want, floor * summed, eps, name)
    if rows:
        wide = actual.dtype in RMS_FLOOR
        _assert_rows_within(got - want, yardstick - want, want, floor * summed, eps, name, wide)


def _assert_within(
    error: Tensor, yardstick_error: Tensor, want: Tensor, floor: Tensor, eps: float, name: str
) -> None:
    allowed = 1.5 * _rms(yardstick_error) + eps / 4 * _rms(want)
    hold(f"{name}: RMS error", _rms(error), max(allowed, _rms(floor)))
    allowed = 2 * (_largest(yardstick_error) + max(eps * _largest(want), _largest(floor)))
    hold(f"{name}: max error", _largest(error), allowed)


def _assert_rows_within(
    error: Tensor,
    yardstick_error: Tensor,
    want: Tensor,
    floor: Tensor,
    eps: float,
    name: str,
    wide: bool,
) -> None:
    got_rms, yardstick_rms, want_rms, floor_rms = (
        x.square().flatten(1).mean(1).sqrt() for x in (error, yardstick_error, want, floor)
    )
    allowed = 2 * yardstick_rms + torch.maximum(eps * want_rms, floor_rms)
    if wide:
        # Here few entries make a row's error, so one row of the yardstick may be right by luck;
        # its worst row stands for all. A row that vanished is still far beyond this.
        allowed = 2 * yardstick_rms.max() + floor_rms
    allowed = torch.where((want_rms > 0) | (floor_rms > 0), allowed, 0.0)
    wrong = (got_rms > allowed).nonzero().flatten().tolist()
    assert not wrong, f"{name}: rows {wrong[:10]} are beyond their own tolerance ({len(wrong)})"
    _record(f"{name}: a row", float((got_rms / allowed).nan_to_num(nan=0.0).max()))


_recorders: list[list[tuple[str, float]]] = []


@contextlib.contextmanager
def recorded_margins() -> Iterator[list[tuple[str, float]]]:
    """Collect how near each judgement of `assert_matches` came to its limit.

    Yields:
        A list that grows by (what was judged, error over allowed) for all that is accepted.
    """
    found: list[tuple[str, float]] = []
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders[:] = [each for each in _recorders if each is not found]


def _record(what: str, margin: float) -> None:
    for found in _recorders:
        found.append((what, margin))


def hold(what: str, error: float, allowed: float) -> None:
    """Assert that an error is within what is allowed, and record how near it came."""
    assert error <= allowed, f"{what} {error:.3e} > {allowed:.3e}"
    _record(what, error / allowed if allowed else 0.0)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (or the largest integer).

    A result that some program never wrote then shows up, instead of holding lucky zeros.
    """
    with fresh_memory(_poison):
        yield


@contextlib.contextmanager
def fresh_memory(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass every tensor that `torch.empty` and its kin return through `change`."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}
    new_empty = Tensor.new_empty

    def changing(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def changed(*args: Any, **kwargs: Any) -> Tensor:
            return change(make(*args, **kwargs))

        return changed

    try:
        for name, make in originals.items():
            setattr(torch, name, changing(make))
        Tensor.new_empty = changing(new_empty)  # type: ignore[method-assign]
        yield
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)
        Tensor.new_empty = new_empty  # type: ignore[method-assign]


def _poison(x: Tensor) -> Tensor:
    if x.is_meta:
        return x
    if x.is_floating_point():
        return x.fill_(float("nan"))
    if x.dtype == torch.bool:
        return x.fill_(True)
    return x.fill_(torch.iinfo(x.dtype).max)


class GuardBand:
    """A copy of a tensor between two bands of memory that nothing may read or write.

    The bands hold NaN (the largest value for integers), so a read out of bounds poisons the result,
    and `assert_untouched` finds a write.
    """

    def __init__(self, x: Tensor, band: int = 256) -> None:
        self._buffer = _poison(x.new_empty(x.numel() + 2 * band))
        self._band = band
        inside = self._buffer[band : band + x.numel()]
        inside.copy_(x.detach().flatten())
        self.tensor = inside.view(x.shape).requires_grad_(x.requires_grad)

    def assert_untouched(self) -> None:
        clean = _poison(torch.empty_like(self._buffer[: self._band]))
        for band in (self._buffer[: self._band], self._buffer[-self._band :]):
            same = (band == clean) | (band.isnan() & clean.isnan())
            assert bool(same.all()), "memory outside a tensor was written"


def assert_causal(
    fn: Callable[[Tensor], Tensor],
    vocab_size: int,
    *,
    length: int = 64,
    seed: int = 0,
) -> None:
    """Prove that logits at t depend on ids up to t only, patch boundaries included.

    Two checks, both needed: the ids after t are replaced, in ways that create, remove and shift
    the boundaries of patches, by whatever kind of byte those go; and every prefix is run on its
    own, since a boundary rule that looks ahead shows when the text ends.

    Args:
        fn: maps ids (length,) int64 to logits (length, V), deterministically (eval mode) and in
            float32 or float64: 16-bit logits round by more than a small leak moves them.
        vocab_size: ids are drawn below it.
        length: positions to try.
        seed: of the text and its changes.

    Raises:
        AssertionError: names the first position whose logits saw a later byte; or says that two
            calls with the same ids differ, which proves nothing.
        ValueError: fn does not return one row of logits for each id.
    """
    rng = torch.Generator().manual_seed(seed)
    ids = _text_with_boundaries(length, vocab_size, rng)
    with torch.no_grad():
        logits = fn(ids)
        fits = logits.ndim == 2 and len(logits) == length
        _checks.require(fits, "fn", f"logits ({length}, V)", tuple(logits.shape))
        full, tolerance = logits.double(), _rounding_allowance(logits)
        again = _largest(fn(ids).double() - full)
        assert again <= tolerance, f"fn: two calls with the same ids differ by {again:.3e}"
        for t in range(length - 1):
            kind = NEXT_IDS[(t + seed) % len(NEXT_IDS)] % vocab_size
            for tail in _other_tails(ids[t + 1 :], kind, vocab_size, rng):
                changed = fn(torch.cat([ids[: t + 1], tail])).double()
                _assert_same_logits(full, changed, t, tolerance, "a change of the bytes after it")
            prefix = fn(ids[: t + 1]).double()
            _assert_same_logits(full, prefix, t, tolerance, "cutting the text off after it")


NEXT_IDS = (ord("\n"), ord("."), ord("7"), ord("A"), 0xC3, 0xA9, 0xFF, 0, ord("\t"), 256)
"""One of each kind that a rule may look ahead for; the text itself is letters and spaces."""


def _rounding_allowance(logits: Tensor) -> float:
    """Other shapes may round otherwise; a leak moves logits by far more than a few ulps.

    In fp64 a leak is further above rounding still, which leaves room for models that amplify it.
    """
    ulps = 4096 if logits.dtype == torch.float64 else 64
    return ulps * torch.finfo(logits.dtype).eps * max(1.0, _largest(logits))


def _assert_same_logits(full: Tensor, other: Tensor, t: int, tolerance: float, change: str) -> None:
    difference = (full[: t + 1] - other[: t + 1]).abs().amax(1)
    moved = (~(difference <= tolerance)).nonzero().flatten()
    if moved.numel():
        first = int(moved[0])
        raise AssertionError(
            f"logits at position {first} moved by {float(difference[first]):.3e} "
            f"(allowed {tolerance:.1e}) on {change} up to position {t}: a later byte leaks"
        )


def _text_with_boundaries(length: int, vocab_size: int, rng: torch.Generator) -> Tensor:
    """Short words between spaces, with some runs of spaces and some arbitrary ids."""
    letters = torch.randint(97, 123, (length,), generator=rng)
    anything = torch.randint(0, vocab_size, (length,), generator=rng)
    kind = torch.rand(length, generator=rng)
    text = torch.where(kind < 0.7, letters, torch.where(kind < 0.95, 32, anything))
    return text.remainder(vocab_size)


def _other_tails(
    tail: Tensor, kind: int, vocab_size: int, rng: torch.Generator
) -> Iterator[Tensor]:
    """Yield as many ids, changed so that boundaries appear, vanish and move."""
    yield torch.cat([torch.full_like(tail[:1], kind), tail[1:]])
    yield torch.full_like(tail, 32 % vocab_size)
    yield torch.full_like(tail, 101 % vocab_size)
    yield _text_with_boundaries(len(tail), vocab_size, rng)
    yield tail.roll(1)
