"""Properties of linear_logprobs alone: precision of rows, bad and ignored targets, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.tensors import projection
from torch import Tensor

from stlm_kernels import linear_logprobs
from stlm_kernels.ops.linear_logprobs.config import vocab_blocks

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")


def example(rows: int, width: int, vocab: int, way: Way) -> list[Tensor]:
    return [x.detach() for x in projection(rows, width, vocab, way, seed=0)]


@EVERY_LANE
def test_per_row_error_is_below_1e_5(way: Way) -> None:
    """Rows are those of the stored inputs in any dtype: logits are never cast to 16 bits."""
    hidden, weight, target = example(64, 128, 257, way)
    logprob, lse = linear_logprobs(hidden, weight, target, impl=way.impl)
    z = hidden.double() @ weight.double().T
    want = z.log_softmax(1).gather(1, target[:, None])[:, 0]
    assert logprob.dtype == lse.dtype == torch.promote_types(way.dtype, torch.float32)
    assert float((logprob - want).abs().max()) <= 1e-5
    assert float((lse - z.logsumexp(1)).abs().max()) <= 1e-5


@EVERY_LANE
@pytest.mark.parametrize("vocab", [40, 520])
def test_a_cap_far_above_the_logits_changes_little(way: Way, vocab: int) -> None:
    """tanh as a difference of numbers near 1 would have lost the small logits' digits."""
    hidden, weight, target = example(20, 16, vocab, way)
    logprob, lse = linear_logprobs(hidden, weight, target, softcap=1e4, impl=way.impl)
    z = 1e4 * torch.tanh(hidden.double() @ weight.double().T / 1e4)
    want = z.log_softmax(1).gather(1, target[:, None])[:, 0]
    assert float((logprob - want).abs().max()) <= 1e-5
    assert float((lse - z.logsumexp(1)).abs().max()) <= 1e-5


@EVERY_LANE
def test_a_row_does_not_depend_on_its_batch(way: Way) -> None:
    if way.impl == "torch":
        pytest.skip("the BLAS beneath the torch path chooses its kernel by the number of rows")
    hidden, weight, target = example(50, 32, 200, way)
    together, _ = linear_logprobs(hidden, weight, target, impl=way.impl)
    alone, _ = linear_logprobs(hidden[7:8], weight, target[7:8], impl=way.impl)
    assert torch.equal(together[7:8], alone)


@EVERY_LANE
def test_nan_in_an_ignored_row_reaches_nothing(way: Way) -> None:
    hidden, weight, target = example(20, 16, 60, way)
    hidden[3], target[3] = float("nan"), -100
    hidden.requires_grad_()
    weight.requires_grad_()
    logprob, lse = linear_logprobs(hidden, weight, target, impl=way.impl)
    assert logprob[3] == lse[3] == 0
    (logprob.sum() + lse.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[3] == 0).all()


@EVERY_LANE
def test_nan_in_a_counted_row_stays_in_it_and_in_the_weight(way: Way) -> None:
    hidden, weight, target = example(20, 16, 60, way)
    hidden[3] = float("nan")
    hidden.requires_grad_()
    weight.requires_grad_()
    logprob, _ = linear_logprobs(hidden, weight, target, impl=way.impl)
    logprob.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert logprob.isnan().nonzero().flatten().tolist() == [3]
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert weight.grad.isnan().all()


@EVERY_LANE
@pytest.mark.parametrize("bad", [60, -1, 2**40])
def test_an_unseen_bad_target_is_loud(way: Way, bad: int) -> None:
    """Unchecked, a bad target gives NaN in the row, its gradient and the weight's."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows where it goes")
    hidden, weight, target = example(20, 16, 60, way)
    target[5] = bad
    hidden.requires_grad_()
    weight.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_logprobs(h, w, t, impl=way.impl)[0]

    torch._dynamo.reset()
    logprob = compiled(hidden, weight, target)
    assert logprob.isnan().nonzero().flatten().tolist() == [5]
    logprob.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [5]
    assert weight.grad.isnan().any()


@EVERY_LANE
def test_ids_are_widened_before_they_are_compared(way: Way) -> None:
    """Byte 156 is -100 as a signed byte; it is a target all the same."""
    hidden, weight, _ = example(4, 16, 256, way)
    target = torch.tensor([156, 0, 255, 156], dtype=torch.uint8, device=way.device)
    narrow, _ = linear_logprobs(hidden, weight, target, impl=way.impl)
    wide, _ = linear_logprobs(hidden, weight, target.long(), impl=way.impl)
    assert torch.equal(narrow, wide)
    assert (narrow != 0).all()


@EVERY_LANE
def test_ignore_index_inside_the_vocabulary(way: Way) -> None:
    """The row is left out; the column stays in the denominator."""
    hidden, weight, target = example(30, 16, 40, way)
    target[::3] = 7
    skipped, lse = linear_logprobs(hidden, weight, target, ignore_index=7, impl=way.impl)
    counted, full = linear_logprobs(hidden, weight, target, ignore_index=None, impl=way.impl)
    kept = target != 7
    assert (skipped[~kept] == 0).all()
    assert torch.equal(skipped[kept], counted[kept])
    assert torch.equal(lse[kept], full[kept])


@EVERY_LANE
def test_padded_rows_of_the_table_do_not_exist(way: Way) -> None:
    hidden, weight, target = example(30, 16, 64, way)
    target %= 40
    weight[40:] = float("nan")
    weight.requires_grad_()
    logprob, _ = linear_logprobs(hidden, weight, target, valid_vocab=40, impl=way.impl)
    logprob.sum().backward()
    assert logprob.isfinite().all()
    assert weight.grad is not None
    assert (weight.grad[40:] == 0).all()
    assert weight.grad[:40].isfinite().all()


@pytest.mark.parametrize("valid", [1, 15, 16, 17, 100, 128, 200, 255, 256, 257, 258, 260, 400, 512])
def test_vocabulary_blocks(valid: int) -> None:
    main, tail = vocab_blocks(valid)
    assert main & (main - 1) == 0
    assert main >= 16
    assert tail == 0 or (tail >= 16 and tail & (tail - 1) == 0)
    assert valid <= main + tail <= max(16, 1 << (valid - 1).bit_length())
    if valid in (257, 258, 260):
        assert (main, tail) == (256, 16)


GOOD: dict[str, Any] = {
    "input": torch.zeros(3, 4),
    "linear_weight": torch.zeros(5, 4),
    "target": torch.zeros(3, dtype=torch.long),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1]}, ValueError, "input: expected a Tensor, got list"),
        ({"input": torch.zeros(3, 4, dtype=torch.int32)}, ValueError, "input: expected dtype"),
        ({"linear_weight": torch.zeros(5, 3)}, ValueError, r"linear_weight: expected shape \(V, 4"),
        ({"linear_weight": torch.zeros(5, 4).half()}, ValueError, "linear_weight: expected dtype"),
        ({"target": torch.zeros(2).long()}, ValueError, r"target: expected shape \(3,\)"),
        ({"target": torch.zeros(3)}, ValueError, "target: expected dtype"),
        ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias: expected shape \(5,\)"),
        ({"softcap": 0.0}, ValueError, "softcap: expected None or a finite number > 0, got 0.0"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale: expected a finite number"),
        ({"valid_vocab": 6}, ValueError, "valid_vocab: expected at most V = 5, got 6"),
        ({"valid_vocab": 0}, ValueError, "valid_vocab: expected an int >= 1, got 0"),
        (
            {"input": torch.zeros(3, 0), "linear_weight": torch.zeros(5, 0)},
            ValueError,
            r"input: expected D >= 1, got \(3, 0\)",
        ),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int that int64 holds"),
        ({"ignore_index": 1.5}, ValueError, "ignore_index: expected an int, got 1.5"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
        (
            {"target": torch.tensor([0, 5, 0])},
            IndexError,
            r"target: expected values in \[0, 4\], got 5 at position 1",
        ),
        (
            {"target": torch.tensor([0, 3, 0]), "valid_vocab": 3},
            IndexError,
            r"target: expected values in \[0, 2\], got 3 at position 1",
        ),
        ({"impl": "triton"}, NotImplementedError, "the tensors are on cpu"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_logprobs(**(GOOD | change))
