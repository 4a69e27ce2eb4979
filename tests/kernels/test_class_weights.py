"""linear_cross_entropy's class weights and lse, held against torch's own functions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.lanes import Way
from helpers.ops import LargestTensor
from torch import Tensor

from stlm_kernels import linear_cross_entropy, linear_logprobs

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
VOCABS = [40, 258, 520]
"""One block of columns, one and a narrow one, and chunks."""
OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "valid": valid, "bias": bias}
    for reduction, smoothing, valid, bias in itertools.product(
        ["mean", "sum", "none"], [0.0, 0.2, 1.0], [False, True], [False, True]
    )
]


def example(vocab: int, way: Way, rows: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, table, target with ignored rows, and class weights, some 0."""
    rng = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, 12, generator=rng)
    table = torch.randn(vocab, 12, generator=rng) / 3
    target = torch.randint(0, vocab - 3, (rows,), generator=rng)
    target[[1, 4]] = -100
    classes = torch.rand(vocab, generator=rng) * 3
    classes[::7] = 0
    leaves = [x.to(way.device, way.dtype).requires_grad_() for x in (hidden, table)]
    return leaves[0], leaves[1], target.to(way.device), classes.to(way.device, way.dtype)


def assert_close(got: Any, want: Any, way: Way) -> None:
    eps = torch.finfo(way.dtype).eps
    for a, b in zip(got, want, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.to(b.dtype), b, rtol=8 * eps, atol=16 * eps * max(scale, 1.0))


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("vocab", VOCABS)
def test_all_of_torch_s_combinations(way: Way, vocab: int) -> None:
    """F.cross_entropy in fp64, values and gradients."""
    hidden, table, target, classes = example(vocab, way)
    wide = [x.detach().double().requires_grad_() for x in (hidden, table)]
    rng = torch.Generator().manual_seed(0)
    bias = torch.randn(vocab, generator=rng).to(way.device, way.dtype)
    # The interpreter takes a second for all of one: every fifth has each option with the others.
    for options in OPTIONS[:: 5 if way.impl == "triton" and way.device == "cpu" else 1]:
        valid = vocab - 3 if options["valid"] else vocab
        shift = bias if options["bias"] else None
        rest = {k: options[k] for k in ("reduction", "label_smoothing")}
        ours = linear_cross_entropy(
            hidden, table, target, linear_bias=shift, weight=classes, impl=way.impl,
            valid_vocab=valid, **rest,
        )  # fmt: skip
        logits = F.linear(*wide, None if shift is None else shift.double())[:, :valid]
        baseline = F.cross_entropy(logits, target, weight=classes[:valid].double(), **rest)
        got = torch.autograd.grad(ours.sum(), (hidden, table))
        want = torch.autograd.grad(baseline.sum(), wide)
        assert_close((ours, *got), (baseline, *want), way)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_torch_s_function_of_the_same_name(reduction: str, smoothing: float) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    way = Way("torch", "cpu", torch.float64)
    hidden, table, target, classes = example(50, way)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    ours = linear_cross_entropy(hidden, table, target, weight=classes, **options)
    baseline = F.linear_cross_entropy(hidden, table, target, weight=classes, **options)
    got = torch.autograd.grad(ours.sum(), (hidden, table))
    want = torch.autograd.grad(baseline.sum(), (hidden, table))
    assert_close((ours, *got), (baseline, *want), way)


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_lse_together(way: Way, vocab: int, reduction: str) -> None:
    """Loss and lse are those of separate calls, whichever of the two is differentiated."""
    hidden, table, target, classes = example(vocab, way)
    options: dict[str, Any] = {"softcap": 4.0, "impl": way.impl}
    own: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
    arguments = (hidden, table, target)
    alone = linear_cross_entropy(*arguments, weight=classes, **own, **options)
    _, lse_alone = linear_logprobs(*arguments, **options)
    both = linear_cross_entropy(*arguments, weight=classes, return_lse=True, **own, **options)
    loss, lse = both
    assert lse.shape == target.shape
    assert lse.dtype == torch.float32
    assert (lse[target == -100] == 0).all()
    assert_close(both, (alone, lse_alone), way)
    slopes = torch.linspace(-1, 2, len(target), device=way.device)
    slopes[1] = float("nan")  # of an ignored row: it reaches nothing
    for heads in ([loss], [lse], [loss, lse]):
        ups = [slopes if x is lse else torch.ones_like(x) for x in heads]
        want_heads = [lse_alone if x is lse else alone for x in heads]
        got = torch.autograd.grad(heads, (hidden, table), ups, retain_graph=True)
        want = torch.autograd.grad(want_heads, (hidden, table), ups, retain_graph=True)
        assert_close(got, want, way)
        assert (got[0][target == -100] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_lse_that_is_not_differentiated_costs_no_product(reduction: str) -> None:
    way = Way("torch", "cpu", torch.float32)
    hidden, table, target, _ = example(50, way)

    class Products(LargestTensor):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += "mm" in str(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Products() as products:
        loss, _ = linear_cross_entropy(hidden, table, target, return_lse=True, reduction=reduction)
        loss.backward()
    assert products.count == 3


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("vocab", VOCABS)
def test_no_weight_at_all(way: Way, vocab: int) -> None:
    """Targets that weigh nothing, and no target: NaN as in torch, and gradients of exactly 0."""
    hidden, table, target, classes = example(vocab, way)
    none = torch.full_like(target, -100)
    for wanted, weights in ((target, torch.zeros_like(classes)), (none, classes)):
        loss = linear_cross_entropy(hidden, table, wanted, weight=weights, impl=way.impl)
        assert loss.isnan()
        for grad in torch.autograd.grad(loss, (hidden, table)):
            assert (grad == 0).all()


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_column_that_is_ruled_out_may_weigh_nothing(
    way: Way, vocab: int, smoothing: float
) -> None:
    hidden, table, target, classes = example(vocab, way)
    bias = torch.zeros(vocab, device=way.device)
    bias[7], classes[7], target[target == 7] = -torch.inf, 0, 8
    left = torch.arange(vocab, device=way.device) != 7
    loss = linear_cross_entropy(
        hidden, table, target, linear_bias=bias, weight=classes, label_smoothing=smoothing,
        reduction="sum", impl=way.impl,
    )  # fmt: skip
    logp = F.linear(hidden, table, bias).log_softmax(1)
    kept = target >= 0
    picked = logp[kept].gather(1, target[kept][:, None])[:, 0]
    hard = (classes[target[kept]] * picked).sum()
    soft = (logp[kept][:, left] * classes[left]).sum() / vocab
    assert_close([loss], [-(1 - smoothing) * hard - smoothing * soft], way)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, (hidden, table)))


@EVERY_LANE
@pytest.mark.one_dtype
def test_weights_of_infinity_that_no_target_has(way: Way) -> None:
    for vocab in VOCABS:
        hidden, table, target, classes = example(vocab, way)
        plain = linear_cross_entropy(hidden, table, target, weight=classes, impl=way.impl)
        classes[-1] = torch.inf
        loss = linear_cross_entropy(hidden, table, target, weight=classes, impl=way.impl)
        assert torch.equal(loss, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    way = Way("torch", "cpu", dtype)
    hidden, table, target, _ = example(50, way)
    classes = 1 + torch.rand(50, generator=torch.Generator().manual_seed(0)) * 2**-10
    rows = linear_cross_entropy(hidden, table, target, reduction="none")
    weighted = linear_cross_entropy(hidden, table, target, weight=classes, reduction="none")
    kept = target >= 0
    assert not torch.equal(classes.to(dtype).float(), classes)
    torch.testing.assert_close(
        weighted[kept] / rows[kept], classes[target[kept]], rtol=4e-7, atol=0
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("rows", "vocab"), [(20_000, 257), (1500, 8000)])
def test_the_logits_never_exist(reduction: str, rows: int, vocab: int) -> None:
    way = Way("torch", "cpu", torch.float32)
    hidden, table, target, classes = example(vocab, way, rows)
    with LargestTensor() as largest:
        loss, lse = linear_cross_entropy(
            hidden, table, target, weight=classes, return_lse=True, reduction=reduction,
            label_smoothing=0.1,
        )  # fmt: skip
        (loss.sum() + lse.sum()).backward()
    assert largest.elements <= max(1 << 20, 512 * vocab)
    assert largest.elements < rows * vocab / 2


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("vocab", [40, 520])
def test_compiled(way: Way, vocab: int) -> None:
    hidden, table, target, classes = example(vocab, way)

    def both(h: Tensor, w: Tensor) -> Tensor:
        loss, lse = linear_cross_entropy(
            h, w, target, weight=classes, return_lse=True, label_smoothing=0.1, impl=way.impl
        )
        return loss + lse.square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, table)
    eager = both(hidden, table)
    got, want = (torch.autograd.grad(x, (hidden, table)) for x in (compiled, eager))
    assert_close((compiled, *got), (eager, *want), way)


def test_second_derivatives_and_transforms() -> None:
    way = Way("torch", "cpu", torch.float64)
    hidden, table, target, classes = example(30, way)

    def both(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            h, w, target, weight=classes, return_lse=True, label_smoothing=0.1, z_loss=0.1
        )

    assert torch.autograd.gradcheck(both, (hidden, table), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, (hidden, table), fast_mode=True)

    def scalar(h: Tensor) -> Tensor:
        loss, lse = both(h, table.detach())
        return loss + lse.square().sum()

    (want,) = torch.autograd.grad(scalar(hidden), hidden)
    torch.testing.assert_close(torch.func.grad(scalar)(hidden.detach()), want)
    several = torch.stack([hidden.detach(), hidden.detach() / 2])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(scalar))(several)[0], want)


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.one_dtype
@pytest.mark.parametrize("vocab", [40, 520])
def test_the_kernels_refuse_a_second_derivative(way: Way, vocab: int) -> None:
    hidden, table, target, classes = example(vocab, way)
    _, lse = linear_cross_entropy(
        hidden, table, target, weight=classes, return_lse=True, impl="triton"
    )
    (grad,) = torch.autograd.grad(lse.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^linear_cross_entropy: .*impl='torch'"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight: expected shape \(5,\), got \(4,\)"),
        ({"weight": torch.ones(1, 5)}, r"weight: expected shape \(5,\), got \(1, 5\)"),
        ({"weight": torch.ones(5).double()}, "weight: expected dtype float32, got float64"),
        ({"weight": torch.ones(5).bfloat16()}, "weight: expected dtype float32, got bfloat16"),
        ({"weight": [1.0] * 5}, "weight: expected a Tensor, got list"),
        ({"weight": torch.ones(5, device="meta")}, "weight: expected device cpu, got meta"),
        (
            {"weight": torch.ones(5, requires_grad=True)},
            r"weight: expected class weights that are constants, got one that is differentiated",
        ),
        ({"return_lse": 1}, "return_lse: expected a bool, got 1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    hidden, table = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, table, torch.tensor([0, 1, 2]), **change)


def test_a_tangent_of_class_weights_is_not_lost_silently() -> None:
    hidden, table, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    classes = torch.ones(5)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(ValueError, match="weight: expected class weights that are constants"):
            transform(lambda w: linear_cross_entropy(hidden, table, target, weight=w))(classes)


def test_a_parameter_may_weigh_where_nothing_is_recorded() -> None:
    hidden, table, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with torch.no_grad():
        linear_cross_entropy(hidden, table, target, weight=torch.ones(5, requires_grad=True))
