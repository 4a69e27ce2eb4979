"""Plain models step on the host, to what their modules give, and only where they may."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import TEXT, TINY, ids_of, scrambled
from helpers.norms import assert_same_rows
from torch import Tensor, nn

from stlm_models import STLM, ModelConfig
from stlm_models.config import BOS_ID
from stlm_models.generation.engine import CachedRun
from stlm_models.generation.host_bytes import HostBytes

CONFIGS = {
    "as it is": TINY,
    "sums, an encoder, tables apart": dataclasses.replace(
        TINY, pooling="sum", encoder_layers=1, tied=False, byte_ngrams=False
    ),
    "no n-grams": dataclasses.replace(TINY, ngram_sizes=(), byte_ngrams=False),
    "look-ups": dataclasses.replace(TINY, match_sizes=(1, 3), memory_sizes=(2, 5)),
    "a memory alone": dataclasses.replace(TINY, match_sizes=(), memory_sizes=(1,)),
    "flat": dataclasses.replace(TINY, patch_rule="none", core_layers=0, byte_ngrams=False),
}


@pytest.fixture(name="served")
def steps_on_the_host(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step that ran on the host."""
    served, own_states = [], HostBytes.own_states

    def noted(self: HostBytes, byte_ids: Tensor, rows: Any) -> Any:
        found = own_states(self, byte_ids, rows)
        served.append(len(found[0]))
        return found

    monkeypatch.setattr(HostBytes, "own_states", noted)
    return served


def by_modules(run: CachedRun) -> Callable[[Tensor, Tensor], Tensor]:
    rows = run._rows
    return super(type(rows), rows).step  # type: ignore[misc, no-any-return]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_as_modules_give(
    config: ModelConfig, dtype: torch.dtype, batch: int, served: list[int]
) -> None:
    model = scrambled(config).to(dtype)
    windows = [ids_of(TEXT)[: 3 + 2 * row].tolist() for row in range(batch)]
    got, want = CachedRun(model, windows), CachedRun(model, windows)
    want._rows.step = by_modules(want)  # type: ignore[method-assign]
    text = ids_of(TEXT * 2).tolist()
    for step in range(40):
        ids = torch.tensor([text[4 + step + row] for row in range(batch)])
        rows = [0, 2] if batch == 3 and step >= 30 else range(batch)
        for run in (got, want):
            run.step(ids, rows)
        assert_same_rows(got.hidden, want.hidden)
    assert served == [batch] * 30 + [min(batch, 2)] * 10
    # A text that begins anew, and steps by turns with those of the modules.
    for step in range(6):
        if step == 2:
            windows = [text[:20]]
            for run in (got, want):
                run.restart([0], windows)
        if step % 2:
            got._rows.step = by_modules(got)  # type: ignore[method-assign]
        for run in (got, want):
            run.step(ids, [0])
        vars(got._rows).pop("step", None)
        assert_same_rows(got.hidden, want.hidden)
    assert len(served) == 43


def watched(model: STLM) -> None:
    model.to_output.register_forward_hook(lambda *_: None)


def replaced(model: STLM) -> None:
    own_states = model.own_states
    model.own_states = lambda *args: own_states(*args)  # type: ignore[method-assign]


def of_another_class(model: STLM) -> None:
    class Adapted(nn.Linear): ...

    model.to_core.__class__ = Adapted


def of_a_class_with_another_stage(model: STLM) -> None:
    class Other(STLM):
        def output_states(self, x: Tensor) -> Tensor:
            return 2 * super().output_states(x)

    model.__class__ = Other


@pytest.mark.parametrize(
    "change", [watched, replaced, of_another_class, of_a_class_with_another_stage]
)
def test_what_is_not_plain_runs_as_modules(
    change: Callable[[STLM], None], served: list[int]
) -> None:
    model = scrambled()
    change(model)
    run = CachedRun(model, [[BOS_ID, 65]])
    run.step(torch.tensor([66]), [0])
    assert not served
    assert_same_rows(run.hidden, CachedRun(model, [[BOS_ID, 65, 66]]).hidden)


def test_a_hook_added_later_sees_the_next_step(served: list[int]) -> None:
    model, seen = scrambled(), []
    run = CachedRun(model, [[BOS_ID, 65]])
    run.step(torch.tensor([66]), [0])
    model.to_output.register_forward_hook(lambda *_: seen.append(1))
    run.step(torch.tensor([67]), [0])
    assert (served, seen) == ([1], [1])
    assert_same_rows(run.hidden, CachedRun(model, [[BOS_ID, 65, 66, 67]]).hidden)


@pytest.mark.parametrize("wrong", [-1, 257, 300])
def test_ids_of_no_byte(wrong: int) -> None:
    run = CachedRun(scrambled(), [[BOS_ID, 65], [BOS_ID]])
    with pytest.raises(IndexError, match=f"byte_ids: expected values .* got {wrong}"):
        run.step(torch.tensor([66, wrong]), [0, 1])
    run.step(torch.tensor([66, wrong]), [0])  # a row that is left out may hold anything
