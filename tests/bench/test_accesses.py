"""Kernels access memory nearly as seldom as they could, by the committed table, or say why not."""

from __future__ import annotations

from helpers.accepted_accesses import ACCEPTED

from bench.harness import counting
from bench.harness.counting import MOST_ACCESSES, exceeding


def ours() -> list[counting.Record]:
    return [row for row in counting.read(counting.COMMITTED).values() if row["by"] == "stlm"]


def test_accesses_are_few_or_have_a_reason() -> None:
    found = exceeding(ours())
    beyond = {key: x for key, x in found.items() if x > ACCEPTED.get(key, (0.0, ""))[0]}
    assert beyond == {}


def test_what_is_accepted_is_needed() -> None:
    """No kernel that has been mended stays in the list, nor one with much more than it needs."""
    found = exceeding(ours())
    assert set(ACCEPTED) == set(found)
    for key, (most, why) in ACCEPTED.items():
        assert MOST_ACCESSES[key[1]] < most < 1.05 * found[key]
        assert why


def test_a_row_that_exceeds_is_seen() -> None:
    row = {"op": "x", "sectors": 1.0, "wavefronts": 1.11}
    assert exceeding([row]) == {("x", "wavefronts"): 1.11}
    kernels = {"stlm_a": {"sectors": 1.16, "wavefronts": 1.0}}
    assert exceeding([row | {"accesses_of": kernels}]) == {("stlm_a", "sectors"): 1.16}
    assert exceeding([row | {"accesses_of": {}}]) == {}
