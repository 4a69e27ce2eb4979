"""The judges judged: each must accept what is right and reject what was planted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stlm_kernels.testing import (
    GuardBand,
    assert_causal,
    assert_matches,
    check_ids,
    poisoned_memory,
    recorded_margins,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB, WIDTH = 256, 8


# ---- the tolerance rule -----------------------------------------------------------------------


def noisy(want: Tensor, dtype: torch.dtype, times: float) -> Tensor:
    """A result in `dtype` whose errors are `times` an ulp's, from a generator of its own."""
    rng = torch.Generator().manual_seed(9)
    eps = torch.finfo(dtype).eps
    noise = torch.rand(want.shape, generator=rng, dtype=torch.float64) - 0.5
    return (want * (1 + times * eps * noise)).to(dtype)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_once_is_accepted(dtype: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for shape in ((1, 1), (300, 1), (7, 130), (64, 48)):
        want = torch.randn(shape, generator=rng, dtype=torch.float64)
        assert_matches(want.to(dtype), want, want.float().to(dtype), rows=True)
        assert_matches(noisy(want, dtype, 0.2), want, want.to(dtype), rows=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_ulps_too_many_are_rejected(dtype: torch.dtype) -> None:
    want = torch.randn(64, 48, dtype=torch.float64)
    times = 100 if dtype == torch.float32 else 6  # an fp32 accumulator may be wrong by 2e-6
    with pytest.raises(AssertionError, match="RMS error"):
        assert_matches(noisy(want, dtype, times), want, want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_is_rejected(dtype: torch.dtype) -> None:
    """Too little for the RMS of a large tensor, so the largest error must show it."""
    want = torch.randn(2000, 50, dtype=torch.float64)
    got = want.to(dtype)
    got[1234, 5] += 100 * torch.finfo(dtype).eps * want.abs().max()
    with pytest.raises(AssertionError, match="error"):
        assert_matches(got, want, want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rare_row_is_judged_by_its_own_size(dtype: torch.dtype) -> None:
    want = torch.rand(40, 16, dtype=torch.float64) / 2 + 0.25
    want[20:] /= 4
    want[:20] *= 2e5 if dtype == torch.float32 else 2000  # where the whole tensor's rule is blind
    want[39] = 0
    yard = want.to(dtype)
    assert_matches(yard, want, yard, rows=True)
    for row, value in ((38, 0.0), (39, 1e-3)):
        got = yard.clone()
        got[row] = value
        with pytest.raises(AssertionError, match=rf"rows \[{row}\]"):
            assert_matches(got, want, yard, rows=True)


@pytest.mark.parametrize("planted", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stand_where_the_reference_has_them(planted: float) -> None:
    want = torch.randn(5, 5, dtype=torch.float64)
    special = want.clone()
    special[2, 3] = planted
    assert_matches(special.float(), special, special.float(), rows=True)
    with pytest.raises(AssertionError, match="that should not be there"):
        assert_matches(special.float(), want, want.float())
    with pytest.raises(AssertionError, match="is missing"):
        assert_matches(want.float(), special, special.float())
    with pytest.raises(AssertionError, match="is missing"):
        assert_matches(torch.full_like(want, 7.0).float(), special, special.float())


def test_a_zero_reference_allows_nothing() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert_matches(zero.half(), zero, zero.half(), rows=True)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_matches(zero.half() + 1e-6, zero, zero.half())


# ---- what cancels ------------------------------------------------------------------------------


def cancelled(dtype: torch.dtype, times: float) -> tuple[Tensor, Tensor, Tensor]:
    """A result that is zero but for `times` an fp32 ulp of its terms; its reference; the terms."""
    rng = torch.Generator().manual_seed(9)
    terms = torch.rand(40, 16, generator=rng, dtype=torch.float64) + 0.5
    noise = torch.rand(40, 16, generator=rng, dtype=torch.float64) - 0.5
    got = (terms * noise * times * torch.finfo(torch.float32).eps).to(dtype)
    return got, torch.zeros_like(terms), terms


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cancels_is_judged_by_its_terms(dtype: torch.dtype, rows: bool) -> None:
    """The yardstick may be exactly zero by luck, as where both numbers come from one product."""
    got, zero, terms = cancelled(dtype, times=4)
    assert_matches(got, zero, zero.to(dtype), terms=terms, rows=rows)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_matches(got, zero, zero.to(dtype), rows=rows)
    for times in (200, 1e4):  # 1e-3 of the terms, and a fiftieth of that
        got, _, _ = cancelled(dtype, times)
        with pytest.raises(AssertionError, match="RMS error"):
            assert_matches(got, zero, zero.to(dtype), terms=terms, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_that_does_not_cancel_is_rejected(dtype: torch.dtype) -> None:
    got, zero, terms = cancelled(dtype, times=0)
    zero, terms, got = (x.expand(40, 16).repeat(100, 10) for x in (zero, terms, got))
    got[17, 3] = 1e-4
    with pytest.raises(AssertionError, match="max error"):
        assert_matches(got, zero, zero.to(dtype), terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_terms_is_zero(dtype: torch.dtype) -> None:
    got, zero, terms = cancelled(dtype, times=4)
    terms[7] = 0
    got[7] = 0
    assert_matches(got, zero, zero.to(dtype), terms=terms, rows=True)
    got[7, 2] = 6e-8
    with pytest.raises(AssertionError, match=r"rows \[7\]"):
        assert_matches(got, zero, zero.to(dtype), terms=terms, rows=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_terms_allow_no_more_rounding_to_16_bits(dtype: torch.dtype) -> None:
    """A narrow result is rounded once, as itself: terms that were rounded to 16 bits show."""
    want = torch.randn(64, 48, dtype=torch.float64)
    got = noisy(want, dtype, 6)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_matches(got, want, want.to(dtype), terms=want.abs() * 50)


def test_terms_are_shaped_as_the_result() -> None:
    got, zero, terms = cancelled(torch.float32, times=1)
    with pytest.raises(AssertionError, match="terms of"):
        assert_matches(got, zero, zero.float(), terms=terms[:, :1])


def test_margins_are_recorded() -> None:
    """Error over allowed, of what is accepted, for everybody who listens."""
    want = torch.ones(8, 8, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    with recorded_margins() as outer:
        with recorded_margins() as found:
            assert_matches((want + 8 * eps).float(), want, want.float(), name="x", rows=True)
            with pytest.raises(AssertionError):
                assert_matches(want.float() + 1e-3, want, want.float())
        assert_matches(want.float(), want, want.float())
    expected = {"x: RMS error": 8 * eps / 2e-6, "x: max error": 8 * eps / 4e-6}
    assert dict(found) == pytest.approx(expected | {"x: a row": 8 * eps / 2e-6})
    assert outer[:3] == found
    assert [margin for _, margin in outer[3:]] == [0, 0]


def test_shapes_must_agree() -> None:
    want = torch.zeros(4, 1, dtype=torch.float64)
    with pytest.raises(AssertionError, match="is not"):
        assert_matches(torch.zeros(1, 4), want, want.float())


def test_dtypes_must_agree() -> None:
    """A bf16 result in place of an fp32 one must not be judged by bf16's eps."""
    want = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"bfloat16.*float32"):
        assert_matches(want.bfloat16(), want, want.float())


def test_empty_results_are_right() -> None:
    want = torch.zeros(0, 4, dtype=torch.float64)
    assert_matches(want.float(), want, want.float(), rows=True)


def test_exact_means_equal() -> None:
    want = torch.tensor([1.0, float("nan"), 3.0], dtype=torch.float64)
    assert_matches(want.float(), want, want.float(), exact=True)
    near = torch.nextafter(want.float(), torch.tensor(9.0))
    with pytest.raises(AssertionError, match="expected equality"):
        assert_matches(near, want, want.float(), exact=True)


# ---- poison and guard bands -------------------------------------------------------------------


def half_written(x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    out = make(x)
    out[: len(x) // 2] = x[: len(x) // 2]
    return out


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.empty_like(x),
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty(x.shape, dtype=x.dtype),
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
    ],
    ids=["empty_like", "new_empty", "empty", "empty_strided"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
def test_poison_shows_an_output_that_was_not_written(
    dtype: torch.dtype, make: Callable[[Tensor], Tensor]
) -> None:
    x = torch.arange(6).to(dtype)
    with poisoned_memory():
        out = half_written(x, make)
    rest = out[3:]
    poison = rest.isnan() if dtype.is_floating_point else rest == torch.iinfo(dtype).max
    assert torch.equal(out[:3], x[:3])
    assert poison.all()


def test_poison_ends_with_its_block() -> None:
    before = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert before == (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)


def neighbourhood(x: Tensor) -> Tensor:
    """The tensor with one element before and one after it, as an address gone astray sees it."""
    return x.as_strided((x.numel() + 2,), (1,), x.storage_offset() - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
@pytest.mark.parametrize("place", [0, -1])
def test_guard_band_finds_a_write(dtype: torch.dtype, place: int) -> None:
    band = GuardBand(torch.arange(10).to(dtype))
    band.tensor.zero_()
    band.assert_untouched()
    neighbourhood(band.tensor)[place] = 0
    with pytest.raises(AssertionError, match="memory outside a tensor was written"):
        band.assert_untouched()


@pytest.mark.parametrize("place", [0, -1])
def test_guard_band_poisons_a_read(place: int) -> None:
    band = GuardBand(torch.ones(3, 4))
    assert band.tensor.sum() == 12
    assert (band.tensor.sum() + neighbourhood(band.tensor)[place]).isnan()
    assert neighbourhood(GuardBand(torch.ones(3).int()).tensor)[place] == 2**31 - 1


def test_guard_band_keeps_values_shape_and_gradient() -> None:
    x = torch.randn(4, 6)[:, ::2].requires_grad_()
    band = GuardBand(x)
    assert torch.equal(band.tensor, x)
    assert band.tensor.requires_grad
    assert band.tensor.is_leaf


# ---- check_ids --------------------------------------------------------------------------------


def test_check_ids_accepts_the_range() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        check_ids(torch.arange(100).to(dtype).view(10, 10), 100)
        check_ids(torch.zeros(0, dtype=dtype), 1)
    check_ids(torch.full((3,), 255, dtype=torch.uint8), 256)


@pytest.mark.parametrize(
    ("ids", "dtype", "message"),
    [
        ([0, 4, 5, 9], torch.int64, "byte_ids: expected values in [0, 4], got 5 at position 2"),
        ([0, -1], torch.int16, "byte_ids: expected values in [0, 4], got -1 at position 1"),
        ([200], torch.uint8, "byte_ids: expected values in [0, 4], got 200 at position 0"),
        ([2**40], torch.int64, f"byte_ids: expected values in [0, 4], got {2**40} at position 0"),
    ],
)
def test_check_ids_names_the_first_bad_value(
    ids: list[int], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(IndexError) as refusal:
        check_ids(torch.tensor(ids).to(dtype), 5)
    assert str(refusal.value) == message


def test_check_ids_uses_the_given_name_and_refuses_floats() -> None:
    with pytest.raises(IndexError, match=r"^target: "):
        check_ids(torch.tensor([[0, 7]]), 7, "target")
    with pytest.raises(ValueError, match=r"^target: expected uint8, int16, int32 or int64 ids"):
        check_ids(torch.ones(3), 7, "target")
    with pytest.raises(ValueError, match=r"^byte_ids: expected a Tensor, got list"):
        check_ids([0, 6], 7)  # type: ignore[arg-type]


@pytest.mark.lanes("gpu")
def test_check_ids_on_a_gpu() -> None:
    check_ids(torch.tensor([0, 6], device="cuda"), 7)
    with pytest.raises(IndexError, match="got 7 at position 1"):
        check_ids(torch.tensor([0, 7], device="cuda"), 7)


# ---- assert_causal ----------------------------------------------------------------------------


def embedded(ids: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(VOCAB, WIDTH, generator=rng)[ids]


def running_sum(ids: Tensor) -> Tensor:
    return embedded(ids).cumsum(0)


def spaces(ids: Tensor) -> Tensor:
    return ids == 32


def last_ended_patch(ids: Tensor, ends: Tensor) -> Tensor:
    """Sum, for each position, the last patch that has ended there, given its last bytes."""
    sums = torch.cat([torch.zeros(1, WIDTH), running_sum(ids)])
    out, first, state = [], 0, torch.zeros(WIDTH)
    for t, ended in enumerate(ends.tolist()):
        if ended:
            state, first = sums[t + 1] - sums[first], t + 1
        out.append(state)
    return torch.stack(out)


def causal_patches(ids: Tensor) -> Tensor:
    """A space closes the patch that it ends: known once it is read."""
    return last_ended_patch(ids, spaces(ids))


def patches_that_look_ahead(ids: Tensor) -> Tensor:
    """A patch ends where the *next* byte is a space, which is not known yet."""
    following = torch.cat([ids[1:], torch.zeros(1, dtype=ids.dtype)])
    return last_ended_patch(ids, spaces(following))


def patches_ended_by_the_text(ids: Tensor) -> Tensor:
    """The text's own end closes the trailing patch: only a prefix that is cut off shows it."""
    ends = spaces(ids)
    ends[-1] = True
    return last_ended_patch(ids, ends)


def mean_of_everything(ids: Tensor) -> Tensor:
    return running_sum(ids) + embedded(ids).mean(0)


def one_byte_ahead(ids: Tensor) -> Tensor:
    return torch.cat([embedded(ids)[1:], torch.zeros(1, WIDTH)])


def own_patch_up_to_its_end(ids: Tensor) -> Tensor:
    """The mean of the patch a byte lies in, later bytes of the patch included."""
    closed = spaces(ids).cumsum(0) - spaces(ids).long()
    sums = torch.zeros(len(ids), WIDTH).index_add(0, closed, embedded(ids))
    return sums[closed]


def number_of_patches(ids: Tensor) -> Tensor:
    """Only a count leaks: a boundary that appears or vanishes later."""
    return running_sum(ids) + spaces(ids).sum() * 1e-3


def scaled_by_length(ids: Tensor) -> Tensor:
    """Any change of bytes leaves the length alone; a prefix does not."""
    return embedded(ids) / len(ids)


CAUSAL = [embedded, running_sum, causal_patches, lambda ids: running_sum(ids).double()]
LEAKING = [
    mean_of_everything,
    one_byte_ahead,
    patches_that_look_ahead,
    patches_ended_by_the_text,
    own_patch_up_to_its_end,
    number_of_patches,
    scaled_by_length,
]


@pytest.mark.parametrize("fn", CAUSAL)
@pytest.mark.parametrize("seed", [0, 1])
def test_causal_models_are_accepted(fn: Callable[[Tensor], Tensor], seed: int) -> None:
    assert_causal(fn, VOCAB, seed=seed)


@pytest.mark.parametrize("fn", LEAKING, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_leaks_are_found(fn: Callable[[Tensor], Tensor], seed: int) -> None:
    with pytest.raises(AssertionError, match="a later byte leaks"):
        assert_causal(fn, VOCAB, seed=seed)


def test_the_message_names_the_position() -> None:
    def reads_ahead_at_ten(ids: Tensor) -> Tensor:
        logits = running_sum(ids)
        if len(ids) > 11:
            logits[10] += embedded(ids)[11]
        return logits

    with pytest.raises(AssertionError, match=r"^logits at position 10 moved .* up to position 10:"):
        assert_causal(reads_ahead_at_ten, VOCAB)


def test_nan_logits_prove_nothing() -> None:
    with pytest.raises(AssertionError):
        assert_causal(lambda ids: embedded(ids) * float("nan"), VOCAB)


def test_a_model_that_drops_out_is_no_leak() -> None:
    with pytest.raises(AssertionError, match=r"^fn: two calls with the same ids differ by "):
        assert_causal(lambda ids: torch.nn.functional.dropout(embedded(ids)), VOCAB)


def test_logits_of_another_shape_prove_nothing() -> None:
    with pytest.raises(ValueError, match=r"^fn: expected logits \(64, V\), got \(1, 64, 8\)"):
        assert_causal(lambda ids: embedded(ids)[None], VOCAB)


@pytest.mark.parametrize("vocab", [2, 30, 300])
def test_ids_stay_below_the_vocabulary(vocab: int) -> None:
    def fn(ids: Tensor) -> Tensor:
        assert int(ids.min()) >= 0
        assert int(ids.max()) < vocab
        assert ids.dtype == torch.int64
        return ids[:, None].float()

    assert_causal(fn, vocab, length=16)
