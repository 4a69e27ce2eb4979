"""The judges of whole models judged, and the report of what is near its limit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers import margins
from helpers.margins import Margins, margin
from helpers.norms import (
    assert_as_right,
    assert_greedy,
    assert_same_gradients,
    assert_same_rows,
    relative_error,
)
from torch import Tensor

STATES = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


def changed(row: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    states = STATES.clone()
    states[row] = change(states[row])
    return states


def test_rounding_of_rows_is_accepted() -> None:
    assert_same_rows(STATES * (1 + 1e-5), STATES)
    assert_same_rows(STATES.double() + 1e-12, STATES.double())
    assert_same_rows(STATES[:0], STATES[:0])
    assert_same_rows(STATES.sum(), STATES.sum())
    with pytest.raises(AssertionError, match="a row's error"):
        assert_same_rows(STATES.double() * (1 + 1e-5), STATES.double())


@pytest.mark.parametrize(
    "change",
    [
        torch.zeros_like,
        lambda x: 1.001 * x,
        lambda x: x.roll(1),
        lambda x: torch.cat([x[:-1], x[-1:] + 0.01]),
        lambda x: x + float("nan"),
    ],
    ids=["dropped", "scaled", "rolled", "one element", "NaN"],
)
@pytest.mark.parametrize("row", [0, 17, 39])
def test_one_wrong_row_shows(row: int, change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match=r"a row's error|not finite"):
        assert_same_rows(changed(row, change), STATES)


def test_rows_are_of_one_shape_and_dtype() -> None:
    with pytest.raises(AssertionError, match="is not"):
        assert_same_rows(STATES[:1], STATES)
    with pytest.raises(AssertionError, match="is not"):
        assert_same_rows(STATES.double(), STATES)


def test_a_gradient_of_zero_is_zero() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1e-9, zero) == float("inf")
    with pytest.raises(AssertionError, match="relative error of ours"):
        assert_as_right({"x": zero.float() + 1e-9}, {"x": zero.float()}, {"x": zero})


def test_narrow_states_are_judged_by_their_own_digits() -> None:
    exact = {"x": STATES.double()}
    once = {"x": STATES.bfloat16()}
    assert_as_right(once, once, exact)
    thrice = {"x": (STATES * 1.03).bfloat16()}
    for pair in ((thrice, once), (once, thrice)):
        with pytest.raises(AssertionError, match="relative error"):
            assert_as_right(*pair, exact)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda x: 1.001 * x, lambda x: x.roll(1, 0)])
def test_one_wrong_gradient_shows(change: Callable[[Tensor], Tensor]) -> None:
    want = {"a": STATES, "b": STATES[0], "zero": torch.zeros(3)}
    assert_same_gradients({name: x * (1 + 1e-5) for name, x in want.items()}, want)
    for name in ("a", "b"):
        with pytest.raises(AssertionError, match=f"gradient of {name}"):
            assert_same_gradients(want | {name: change(want[name])}, want)
    with pytest.raises(AssertionError, match="gradient of zero"):
        assert_same_gradients(want | {"zero": torch.full((3,), 1e-9)}, want)
    with pytest.raises(AssertionError, match=r"only in one: \['b'\]"):
        assert_same_gradients({"a": STATES, "zero": torch.zeros(3)}, want)


def test_greedy_ids_may_tie_and_nothing_more() -> None:
    logits = torch.tensor([[1.0, 1.0 - 1e-6, 0.0], [0.0, 0.5, 0.2]])
    assert_greedy([0, 1], logits)
    assert_greedy([1, 1], logits)
    for ids in ([2, 1], [0, 2]):
        with pytest.raises(AssertionError, match="greedy"):
            assert_greedy(ids, logits)


# ---- what is near its limit -------------------------------------------------------------------


def test_the_margin_of_a_comparison() -> None:
    want = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    assert margin(want + 1e-3, want, 0.0, 4e-3) == pytest.approx(0.25)
    assert margin([want * 1.001, want], [want, want], 2e-3, 0.0) == pytest.approx(0.5)
    assert margin(want.float() + 1e-5, want.float(), None, None) == pytest.approx(1, rel=0.05)
    for got, tolerance in ((want, 0.0), (want[:0], 1.0), (3, 1.0)):
        assert margin(got, got, tolerance, tolerance) == 0


def report(figure: float, test: str = "tests/test_x.py::test_y[a-b]") -> SimpleNamespace:
    properties = [("other", 3), ("margin", f"{figure:.3f} out: RMS error")]
    return SimpleNamespace(when="call", passed=True, user_properties=properties, nodeid=test)


class Session(SimpleNamespace):
    exitstatus = pytest.ExitCode.OK


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_near_is_printed_and_fails_a_strict_run(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, session, lines = Margins(strict), Session(), list[str]()
    plugin.pytest_runtest_logreport(report(0.79))
    plugin.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.OK
    plugin.pytest_runtest_logreport(report(0.93))
    plugin.pytest_sessionfinish(session)
    assert (session.exitstatus == pytest.ExitCode.TESTS_FAILED) is strict
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert len(lines) == 1
    assert "NEAR ITS LIMIT 0.93 tests/test_x.py::test_y[a-b]: out: RMS error" in lines[0]
    assert ("fails this run" in lines[0]) is strict
    monkeypatch.setitem(margins.REASONS, "*test_y[a-*", "two elements")
    assert plugin.unexplained() == []
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert "(two elements)" in lines[1]


def test_this_run_measures(request: pytest.FixtureRequest) -> None:
    plugins = [x for x in request.config.pluginmanager.get_plugins() if type(x) is Margins]
    assert len(plugins) == 1
    item = SimpleNamespace(user_properties=[])
    steps = plugins[0].pytest_runtest_call(item)
    next(steps)
    torch.testing.assert_close(STATES + 5e-6, STATES, rtol=0, atol=1e-5)
    with pytest.raises(StopIteration):
        steps.send(None)
    [(name, value)] = item.user_properties
    assert name == "margin"
    assert 0.4 < float(value.split()[0]) < 0.6
