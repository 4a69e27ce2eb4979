"""Margins of each test's results to their limits: error over what was allowed.

A limit that is nearly reached here is one that another CPU, seed or release breaks. Every
comparison that a test passes, by the tolerance rule or by `torch.testing.assert_close`, is
measured; a run prints the tests whose largest figure is above `NEAR`, and under `--full` or
`--margins` it fails for those that have no reason below.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Generator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from stlm_kernels.testing import recorded_margins

NEAR = 0.8
REASONS: dict[str, str] = {
    "*[triton-*-bfloat16-linear_cross_entropy-N12-D16-V520-sum-valid515-weights1-*": (
        "the chunked kernels keep gradients of logits in bf16, and few rows average that out"
    ),
}
"""Reasons why a test (a pattern of its id) may be near its limit on every machine."""

# As torch.testing documents them: rtol, atol.
DEFAULTS = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
}


def margin(got: Any, want: Any, rtol: float | None, atol: float | None) -> float:
    """The largest error over what assert_close allows it; 0 where it allows none."""
    if isinstance(got, list | tuple):
        return max((margin(a, b, rtol, atol) for a, b in zip(got, want, strict=True)), default=0.0)
    if not isinstance(got, Tensor) or got.dtype not in DEFAULTS or not got.numel():
        return 0.0
    wide = [x.detach().cpu().double() for x in (got, want)]
    defaults = [DEFAULTS[x.dtype] for x in (got, want)]
    if rtol is None or atol is None:
        rtol, atol = (max(pair) for pair in zip(*defaults, strict=True))
    if rtol == atol == 0:
        return 0.0
    error, allowed = (wide[0] - wide[1]).abs(), atol + rtol * wide[1].abs()
    return float((error / allowed).nan_to_num(0.0, posinf=0.0).max())


class Margins:
    """The plugin: measures in each test, reports at the end (pytest-xdist's processes included)."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.near: list[tuple[float, str, str]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        assert_close = torch.testing.assert_close

        def measured(got: Any, want: Any, **options: Any) -> None:
            assert_close(got, want, **options)
            figure = margin(got, want, options.get("rtol"), options.get("atol"))
            found.append(("assert_close", figure))

        with (
            recorded_margins() as found,
            mock.patch.object(torch.testing, "assert_close", measured),
        ):
            done = yield
        if found:
            what, largest = max(found, key=lambda pair: pair[1])
            item.user_properties.append(("margin", f"{largest:.3f} {what}"))
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            figure, _, what = str(value).partition(" ")
            if name == "margin" and float(figure) > NEAR:
                self.near.append((float(figure), report.nodeid, what))

    def unexplained(self) -> list[str]:
        return [test for _, test, _ in self.near if reason_of(test) is None]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.strict and self.unexplained() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for figure, test, what in sorted(self.near, reverse=True):
            why = reason_of(test) or ("NO REASON: fails this run" if self.strict else "no reason")
            terminalreporter.write_line(f"NEAR ITS LIMIT {figure:.2f} {test}: {what} ({why})")


def reason_of(test: str) -> str | None:
    """Brackets of an id are no pattern."""
    plain = test.replace("[", "<").replace("]", ">")
    for pattern, reason in REASONS.items():
        if fnmatch.fnmatchcase(plain, pattern.replace("[", "<").replace("]", ">")):
            return reason
    return None
