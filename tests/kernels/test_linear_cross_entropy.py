"""Properties of linear_cross_entropy alone: reductions, options, memory, agreement with torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.lanes import Way
from helpers.ops import LargestTensor
from helpers.tensors import projection
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stlm_kernels import _checks, _dispatch, linear_cross_entropy

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")


@EVERY_LANE
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_torch(way: Way, reduction: str) -> None:
    hidden, weight, target = projection(40, 24, 50, way)
    target[::5] = -100
    ours = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=way.impl)
    wide = torch.promote_types(way.dtype, torch.float32)
    logits = F.linear(hidden.to(wide), weight.to(wide))
    baseline = F.cross_entropy(logits, target, reduction=reduction)
    assert ours.dtype == wide
    torch.testing.assert_close(ours, baseline, rtol=1e-5, atol=1e-5)


@EVERY_LANE
def test_no_row_counted(way: Way) -> None:
    """The mean of nothing is NaN, like torch; its gradients are exactly 0, unlike others'."""
    hidden, weight, _ = projection(6, 8, 20, way)
    ignored = torch.full((6,), -100, device=way.device)
    mean = linear_cross_entropy(hidden, weight, ignored, impl=way.impl)
    total = linear_cross_entropy(hidden, weight, ignored, reduction="sum", impl=way.impl)
    assert mean.isnan()
    assert total == 0
    for loss in (mean, total):
        for grad in torch.autograd.grad(loss, (hidden, weight)):
            assert (grad == 0).all()


@EVERY_LANE
def test_no_row_at_all(way: Way) -> None:
    hidden, weight, target = projection(0, 8, 20, way)
    assert linear_cross_entropy(hidden, weight, target, impl=way.impl).isnan()
    assert linear_cross_entropy(hidden, weight, target, reduction="sum", impl=way.impl) == 0
    rows = linear_cross_entropy(hidden, weight, target, reduction="none", impl=way.impl)
    assert rows.shape == (0,)
    total = linear_cross_entropy(hidden, weight, target, reduction="sum", impl=way.impl)
    grads = torch.autograd.grad(total, (hidden, weight))
    assert (grads[1] == 0).all()


@EVERY_LANE
def test_the_upstream_gradient_of_each_row_counts(way: Way) -> None:
    """Not the first row's for all (a peer's bug for a year), nor one compared on the host."""
    hidden, weight, target = projection(30, 16, 40, way)
    upstream = torch.linspace(-2, 3, 30, device=way.device)
    rows = linear_cross_entropy(hidden, weight, target, reduction="none", impl=way.impl)
    (got,) = torch.autograd.grad(rows, hidden, upstream.to(rows.dtype), retain_graph=True)
    for i in (0, 11, 29):
        (alone,) = torch.autograd.grad(rows[i], hidden, retain_graph=True)
        eps = torch.finfo(way.dtype).eps
        want = alone[i].double() * float(upstream[i])
        torch.testing.assert_close(
            got[i].double(), want, rtol=8 * eps, atol=8 * eps * float(want.abs().max())
        )


@EVERY_LANE
@pytest.mark.parametrize("vocab", [40, 520])
@pytest.mark.parametrize("scale", [2.0**-12, 2.0**9])
def test_the_scale_costs_the_gradient_no_digits(way: Way, vocab: int, scale: float) -> None:
    """Scale is applied after the products, which 16 bits would hold badly: SpaceByte's is 1 / D."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randint(-1, 2, (20, 16), generator=rng).to(way.device, way.dtype)
    table = torch.randn(vocab, 16, generator=rng).to(way.device)
    target = torch.randint(0, vocab, (20,), generator=rng).to(way.device)

    def gradient(hidden: Tensor, scale: float) -> Tensor:
        weight = table.to(torch.promote_types(way.dtype, torch.float32)).requires_grad_()
        loss = linear_cross_entropy(hidden, weight, target, logit_scale=scale, impl=way.impl)
        return torch.autograd.grad(loss, weight)[0]

    assert torch.equal(gradient(hidden / scale, scale), gradient(hidden, 1.0))


@EVERY_LANE
@pytest.mark.parametrize("vocab", [40, 520])
@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
def test_the_upstream_gradient_of_an_ignored_row_reaches_nothing(
    way: Way, vocab: int, upstream: float
) -> None:
    """A weight of 1 / 0 that torch.where left out of the sum comes back as NaN or infinity."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows where it goes")
    hidden, weight, target = projection(9, 8, vocab, way)
    target[4] = -100
    loss = linear_cross_entropy(hidden, weight, target, reduction="none", impl=way.impl)
    ones = torch.ones_like(loss)
    want = torch.autograd.grad(loss, (hidden, weight), ones, retain_graph=True)
    ones[4] = upstream
    got = torch.autograd.grad(loss, (hidden, weight), ones)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@EVERY_LANE
def test_a_tiny_mean_keeps_its_gradient_in_16_bits(way: Way) -> None:
    """1/N goes in after the products: nothing underflows in fp16."""
    hidden, weight, target = projection(64, 16, 40, way)
    loss = linear_cross_entropy(hidden, weight, target, impl=way.impl)
    (small,) = torch.autograd.grad(loss * 2**-14, weight, retain_graph=True)
    (plain,) = torch.autograd.grad(loss, weight)
    if way.dtype == torch.float16:
        # What is left is the rounding of the result itself to fp16's subnormals.
        assert float((small.double() * 2**14 - plain.double()).abs().max()) <= 2**-11
    else:
        assert torch.equal(small * 2**14, plain)


@EVERY_LANE
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 40),
    vocab=st.integers(1, 300),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.booleans(),
)
def test_any_shape(
    way: Way, rows: int, width: int, vocab: int, smoothing: float, ignored: bool
) -> None:
    if way.dtype not in (torch.float32, torch.float64):
        pytest.skip("shapes do not depend on the dtype")
    hidden, weight, target = projection(rows, width, vocab, way)
    if ignored and rows:
        target[rows // 2] = -100
    options: dict[str, Any] = {"reduction": "sum", "label_smoothing": smoothing}
    ours = linear_cross_entropy(hidden, weight, target, impl=way.impl, **options)
    baseline = F.cross_entropy(F.linear(hidden, weight), target, **options)
    torch.testing.assert_close(ours, baseline, rtol=1e-5, atol=1e-4)
    got = torch.autograd.grad(ours, (hidden, weight))
    want = torch.autograd.grad(baseline, (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("rows", "vocab"), [(20_000, 257), (1500, 8000)])
def test_the_logits_never_exist(reduction: str, rows: int, vocab: int) -> None:
    """Only chunks of logits exist on the torch path, whatever the number of rows."""
    way = Way("torch", "cpu", torch.float32)
    hidden, weight, target = projection(rows, 4, vocab, way)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, target, reduction=reduction).sum().backward()
    assert largest.elements <= max(1 << 20, 512 * vocab)
    assert largest.elements < rows * vocab / 2


@EVERY_LANE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_count_as_little_when_compiled(way: Way, reduction: str) -> None:
    """A peer that counts rows by reading them back gives a wrong mean here, silently."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows what tracing does")
    hidden, weight, target = projection(12, 8, 20, way)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, t, reduction=reduction, impl=way.impl)

    torch._dynamo.reset()
    for ignored in (3, 7):  # the count is no constant of the graph
        target[:ignored] = -100
        eager = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=way.impl)
        traced = compiled(hidden, weight, target)
        torch.testing.assert_close(traced, eager)
        want = torch.autograd.grad(eager.sum(), (hidden, weight))
        got = torch.autograd.grad(traced.sum(), (hidden, weight), retain_graph=True)
        again = torch.autograd.grad(traced.sum(), (hidden, weight))
        for a, b, c in zip(got, again, want, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)


def test_numbers_may_be_traced() -> None:
    """dynamic=True makes symbols of the options that are floats, which have no repr."""
    torch._dynamo.reset()
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    way, options = Way("torch", "cpu", torch.float32), {"softcap": 5.0, "label_smoothing": 0.1}
    for rows in (5, 7):
        tensors = projection(rows, 4, 6, way)
        want = linear_cross_entropy(*tensors, **options)
        torch.testing.assert_close(compiled(*tensors, **options), want)


def test_a_bad_target_is_loud_where_it_is_not_seen() -> None:
    """Autograd differentiates the plain ops under torch.func."""
    hidden, weight, target = projection(5, 4, 6, Way("torch", "cpu", torch.float32))
    target[1] = 6

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, reduction="sum")

    rows, table = torch.func.grad(loss, (0, 1))(hidden, weight)
    assert rows.isnan().all(1).tolist() == [False, True, False, False, False]
    assert table.isnan().all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_gradient_that_is_recorded_under_autocast(reduction: str) -> None:
    """Its logits are no more rounded than those of one that is not."""
    hidden, weight, target = projection(5, 4, 6, Way("torch", "cpu", torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
        (recorded,) = torch.autograd.grad(loss, hidden, create_graph=True)
    (plain,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(recorded, plain)


def test_evaluation_forms_no_gradient() -> None:
    way = Way("torch", "cpu", torch.float32)
    hidden, weight, target = projection(100, 16, 50, way)

    class Products(LargestTensor):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += "mm" in str(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Products() as products, torch.no_grad():
        linear_cross_entropy(hidden, weight, target)
    assert products.count == 1
    with Products() as products:
        linear_cross_entropy(hidden, weight, target)
    assert products.count == 3


def test_training_with_it_follows_plain_torch() -> None:
    """One model, trained by the same steps, has the same losses."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (64,), generator=rng)
    table = torch.randn(30, 16, generator=rng)

    def losses(fused: bool) -> list[float]:
        weight = table.clone().requires_grad_()
        found = []
        for _ in range(30):
            hidden = F.embedding(ids[:-1], weight)
            if fused:
                loss = linear_cross_entropy(hidden, weight, ids[1:])
            else:
                loss = F.cross_entropy(hidden @ weight.T, ids[1:])
            (grad,) = torch.autograd.grad(loss, weight)
            weight = (weight - 0.5 * grad).detach().requires_grad_()
            found.append(loss.item())
        return found

    ours, baseline = losses(fused=True), losses(fused=False)
    assert baseline[-1] < baseline[0] / 2
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(baseline), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "reduction: expected one of 'mean', 'sum', 'none', got 'max'"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ({"z_loss": -1.0}, "z_loss: expected a finite number >= 0, got -1.0"),
        ({"z_loss": float("nan")}, "z_loss: expected a finite number >= 0, got nan"),
        ({"z_loss": "much"}, "z_loss: expected a finite number >= 0, got 'much'"),
        # A tensor would read as a number, and never get its gradient.
        ({"logit_scale": torch.tensor(2.0)}, r"logit_scale: expected a finite number, got tensor"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    hidden, weight, target = projection(3, 4, 5, Way("torch", "cpu", torch.float32))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, target, **change)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_path_is_decided_once_and_targets_are_walked_once(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[str] = []
    walked: list[Tensor] = []
    ids_within = _checks.ids_within

    def decide(name: str, value: Any, choices: Any) -> None:
        decided.append(name)

    def walk(ids: Tensor, low: int, high: int) -> bool:
        walked.append(ids)
        return ids_within(ids, low, high)

    monkeypatch.setattr(_dispatch, "require_choice", decide)  # of impl, each time
    monkeypatch.setattr(_checks, "ids_within", walk)
    targets = torch.tensor([0, -100, 4])
    linear_cross_entropy(torch.ones(3, 2), torch.ones(5, 2), targets, reduction=reduction)
    assert decided == ["impl"]
    assert len(walked) == 1
