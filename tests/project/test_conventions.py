"""docs/conventions.md: each cell of ours is what the ops do, and each has a test here."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stlm_kernels as ops
from stlm_kernels import linear_cross_entropy
from stlm_models.config import HASH_MULTIPLIERS

PAGE = (Path(__file__).parents[2] / "docs/conventions.md").read_text()
TABLE = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", PAGE, flags=re.M))
"""Our cell by the name of its row."""
HELD: dict[str, tuple[str, Callable[[], None]]] = {}


def holds(row: str, cell: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def note(check: Callable[[], None]) -> Callable[[], None]:
        HELD[row] = cell, check
        return check

    return note


def example(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    h, w = torch.randn(rows, 8, generator=rng), torch.randn(11, 8, generator=rng)
    t = torch.randint(0, 11, (rows,), generator=rng)
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), t


def gradients_of(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def assert_empty(rows: int, reduction: str, want: float) -> None:
    h, w, t = example(rows)
    loss = linear_cross_entropy(h, w, torch.full_like(t, -100), reduction=reduction)
    value = float(loss.detach())
    assert math.isnan(value) if math.isnan(want) else value == want
    assert all(bool((x == 0).all()) for x in gradients_of(loss, h, w))


@holds("order of arguments", "h, w, t")
def check_order() -> None:
    assert list(inspect.signature(linear_cross_entropy).parameters)[:3] == [
        "input", "linear_weight", "target",
    ]  # fmt: skip


for _row, _count, _reduction, _loss, _cell in (
    ("all ignored, mean", 5, "mean", math.nan, "NaN, gradients 0"),
    ("all ignored, sum", 5, "sum", 0.0, "0, gradients 0"),
    ("no rows, mean", 0, "mean", math.nan, "NaN, gradients 0"),
    ("no rows, sum", 0, "sum", 0.0, "0, gradients 0"),
):
    holds(_row, _cell)(partial(assert_empty, _count, _reduction, _loss))


@holds("ignore_index=None", "ignores nothing; a target of -100 is an IndexError")
def check_no_ignore_index() -> None:
    h, w, t = example()
    loss = linear_cross_entropy(h, w, t, ignore_index=None, reduction="none")
    assert bool((loss > 0).all())
    t[2] = -100
    with pytest.raises(IndexError, match="target"):
        linear_cross_entropy(h, w, t, ignore_index=None)


@holds("NaN in an ignored row", "loss and gradients as without it")
def check_hidden_nan() -> None:
    h, w, t = example()
    t[2] = -100
    loss = linear_cross_entropy(h, w, t)
    sick = h.detach().clone()
    sick[2] = math.nan
    sick.requires_grad_()
    got = linear_cross_entropy(sick, w, t)
    torch.testing.assert_close(got, loss)
    for a, b in zip(gradients_of(got, sick, w), gradients_of(loss, h, w), strict=True):
        torch.testing.assert_close(a, b)


@holds("second backward of a retained graph", "the same gradients")
def check_second_backward() -> None:
    h, w, t = example()
    loss = 3 * linear_cross_entropy(h, w, t)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    for a, b in zip(first, gradients_of(loss, h, w), strict=True):
        assert torch.equal(a, b)


@holds("h frozen", "w gets its gradient")
def check_frozen() -> None:
    h, w, t = example()
    (alone,) = gradients_of(linear_cross_entropy(h.detach(), w, t), w)
    torch.testing.assert_close(alone, gradients_of(linear_cross_entropy(h, w, t), h, w)[1])


@holds('reduction="none"', "a loss for each row")
def check_rows() -> None:
    h, w, t = example()
    loss = linear_cross_entropy(h, w, t, reduction="none")
    want = torch.nn.functional.cross_entropy(h @ w.T, t, reduction="none")
    torch.testing.assert_close(loss, want)


@holds("label smoothing of a padded table", "spread over valid_vocab")
def check_smoothing() -> None:
    h, w, t = example()
    padded = torch.cat([w, torch.full((5, 8), math.inf)])
    got = linear_cross_entropy(h, padded, t, label_smoothing=0.1, valid_vocab=11)
    want = torch.nn.functional.cross_entropy(h @ w.T, t, label_smoothing=0.1)
    torch.testing.assert_close(got, want)


@holds("z-loss", "in the loss, over the counted rows")
def check_z_loss() -> None:
    h, w, t = example()
    t[1] = -100
    z = (h @ w.T).logsumexp(-1)[t >= 0].square().mean()
    got = linear_cross_entropy(h, w, t, z_loss=0.5)
    torch.testing.assert_close(got, linear_cross_entropy(h, w, t) + 0.5 * z)


@holds("loss of bf16 inputs", "fp32")
def check_loss_dtype() -> None:
    assert linear_cross_entropy(*example(dtype=torch.bfloat16)).dtype == torch.float32


@holds("bf16 h, fp32 w", "fp32 loss, fp32 gradient of w")
def check_mixed() -> None:
    h, _, t = example(dtype=torch.bfloat16)
    w = example()[1]
    loss = linear_cross_entropy(h, w, t)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in gradients_of(loss, h, w)] == [torch.bfloat16, torch.float32]


@holds("int32 and uint8 targets", "taken")
def check_target_dtypes() -> None:
    h, w, t = example()
    want = linear_cross_entropy(h, w, t)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(linear_cross_entropy(h, w, t.to(dtype)), want)


@holds("uint8 target 156 with ignore_index=-100", "counted")
def check_wrapped_target() -> None:
    h, w = torch.randn(2, 8), torch.randn(256, 8)
    target = torch.tensor([156, 3], dtype=torch.uint8)
    assert bool((linear_cross_entropy(h, w, target, reduction="none") > 0).all())


BOUNDARIES = torch.tensor([0, 3, 3, 5], dtype=torch.int32)


@holds("empty patch", "zeros, in every mode")
def check_empty_patch() -> None:
    x = torch.randn(5, 8)
    for mode in ("mean", "sum", "max", "min", "first", "last"):
        assert bool((ops.segment_pool(x, BOUNDARIES, mode=mode)[1] == 0).all()), mode
    ids, table = torch.arange(5, dtype=torch.uint8), torch.randn(256, 8)
    for mode in ("mean", "sum"):
        assert bool((ops.byte_pool(ids, table, BOUNDARIES, mode=mode)[1] == 0).all()), mode
    q, k, v = torch.randn(1, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    assert bool((ops.attention_pool(q, k, v, BOUNDARIES)[1] == 0).all())


@holds("equal maxima", "the first takes the gradient")
def check_ties() -> None:
    x = torch.ones(5, 1, requires_grad=True)
    (grad,) = gradients_of(ops.segment_pool(x, BOUNDARIES, mode="max").sum(), x)
    assert grad.flatten().tolist() == [1, 0, 0, 1, 0]


@holds("table gradient of bf16", "added up in fp32")
def check_table_gradient() -> None:
    table = torch.zeros(256, 8, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((1024,), 7, dtype=torch.uint8)
    boundaries = torch.arange(1025, dtype=torch.int32)
    (grad,) = gradients_of(ops.byte_pool(ids, table, boundaries, mode="sum").sum(), table)
    assert bool((grad[7] == 1024).all())


@holds("bytes behind the last offset", "belong to no patch, never read")
def check_tail() -> None:
    x = torch.randn(8, 4)
    x[5:] = math.nan
    assert bool(ops.segment_pool(x, BOUNDARIES, mode="mean").isfinite().all())
    ids = torch.tensor([1, 2, 3, 4, 5, 0, 0], dtype=torch.uint8)
    table = torch.randn(256, 4)
    table[0] = math.nan
    assert bool(ops.byte_pool(ids, table, BOUNDARIES, mode="sum").isfinite().all())


def seen(**options: Any) -> list[int]:
    """The keys that the last of six rows sees."""
    v = torch.eye(6)[:, None]
    return ops.attention(torch.zeros(6, 1, 6), v, v, **options)[-1, 0].nonzero().flatten().tolist()


@holds("window w", "the row itself and w - 1 before it")
def check_window() -> None:
    assert seen(window=3) == [3, 4, 5]


@holds("more keys than queries", "the queries are the last rows")
def check_last_rows() -> None:
    v = torch.eye(6)[:, None]
    out = ops.attention(torch.zeros(2, 1, 6), v, v)
    assert [len(row.nonzero()) for row in out[:, 0]] == [5, 6]


@holds("causal with a window (l, r)", "r is 0")
def check_window_of_two_sides() -> None:
    x = torch.randn(6, 1, 8)
    torch.testing.assert_close(
        ops.attention(x, x, x, window=(2, 2)), ops.attention(x, x, x, window=3)
    )


@holds("rows of no document", "zeros, never read")
def check_no_document() -> None:
    x = torch.randn(7, 1, 8)
    x[5:] = math.nan
    out = ops.attention(x, x, x, cu_seqlens=BOUNDARIES)
    assert bool((out[5:] == 0).all())
    assert bool(out[:5].isfinite().all())


@pytest.mark.parametrize("row", HELD)
def test_our_cell_is_true(row: str) -> None:
    cell, check = HELD[row]
    assert TABLE[row] == cell
    check()


def test_every_row_is_held() -> None:
    assert TABLE.keys() - {"case", "---"} == HELD.keys()


def test_end_masks_read_what_the_decoder_of_blt_reads() -> None:
    """Its ids: patches after the first, which is one byte, laid out from the byte before on; the
    last patch lasts one byte longer, the next byte to come."""
    rng = torch.Generator().manual_seed(0)
    starts = torch.rand(41, generator=rng) < 0.3  # of the 40 bytes and the next one
    starts[:2] = True
    first = starts.nonzero().flatten()
    lengths = torch.cat([first, first.new_tensor([41])]).diff()
    decoder_patch_ids = torch.arange(len(lengths) - 1).repeat_interleave(lengths[1:])
    ids = torch.zeros(40, dtype=torch.uint8)
    patches = ops.find_patches(ids, patch_end_mask=starts[1:].clone())
    assert torch.equal(patches.read_ids.long(), decoder_patch_ids)
    begun = ops.find_patches(ids, patch_start_mask=starts[:40].clone())
    assert not torch.equal(begun.read_ids.long(), decoder_patch_ids)


def test_what_is_refused() -> None:
    h, w, _ = example()
    with pytest.raises(ValueError, match="target"):
        linear_cross_entropy(h, w, torch.rand(5, 11))
    assert not {"bias", "alibi_slopes"} & inspect.signature(ops.attention).parameters.keys()
    assert not {"block_table"} & inspect.signature(ops.decode_attention).parameters.keys()


def test_the_page_has_the_primes_of_the_models_hashes() -> None:
    section = PAGE.split("## N-gram hashes of BLT")[1].split("\n## ")[0]
    found = tuple(int(x) for x in re.findall(r"\d{10}", section))
    assert found == HASH_MULTIPLIERS
