"""Properties of linear_sample alone: what may be drawn, how often, and what a draw depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.lanes import Way
from torch import Tensor

from stlm_kernels import _launch, explain, linear_sample
from stlm_kernels.ops.linear_sample.reference import distribution

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
WIDE = {"linear_sample_fwd": {"BLOCK_N": 128, "BLOCK_D": 16, "num_warps": 8}}


def drawn(logits: Tensor, rows: int, way: Way, **options: Any) -> Tensor:
    """(rows,) ids of one row of logits, given as the bias of a table without content."""
    hidden = torch.zeros(rows, 16, device=way.device, dtype=way.dtype)
    weight = torch.zeros(len(logits), 16, device=way.device, dtype=way.dtype)
    bias = logits.to(way.device, way.dtype)
    # The interpreter's time goes by programs.
    wide = WIDE if way.impl == "triton" and way.device == "cpu" else {}
    with _launch.overriding(wide):
        return linear_sample(hidden, weight, linear_bias=bias, impl=way.impl, **options).cpu()


def integers(rows: int, vocab: int, way: Way, width: int = 8) -> tuple[Tensor, Tensor]:
    """Operands whose products are exact however they are summed, so that ids are comparable."""
    rng = torch.Generator().manual_seed(rows)
    hidden = torch.randint(-1, 2, (rows, width), generator=rng)
    weight = torch.randint(-1, 2, (vocab, width), generator=rng)
    return hidden.to(way.device, way.dtype), weight.to(way.device, way.dtype)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Standardised: about normal, 0 expected, where the counts follow the probabilities."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected).square() / expected).sum()
    freedom = max(1, int(possible.sum()) - 1)
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def many(full: bool, way: Way) -> int:
    """Return the number of rows that a statistic is made of; the interpreter is slow."""
    if way.impl == "triton" and way.device == "cpu":
        return 20_000 if full else 2000
    return 200_000 if full or way.device == "cuda" else 20_000


@EVERY_LANE
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 1.5},
        {"top_k": 9, "top_p": 0.7},
        {"softcap": 1.5, "logit_scale": 2.0},
        {"valid_vocab": 13, "top_k": 9, "top_p": 0.9},
    ],
    ids=str,
)
def test_frequencies(way: Way, options: dict[str, Any], full: bool) -> None:
    """Chi-square against the exact distribution, which also says what is never drawn."""
    if options and way.dtype not in (torch.float32, torch.float64):
        pytest.skip("one case shows that the dtype of the operands makes no difference")
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)).to(way.dtype).double()
    ids = drawn(logits, many(full, way), way, seed=11, **options)
    z = logits * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    kept = {k: v for k, v in options.items() if k in ("temperature", "top_k", "top_p")}
    valid = options.get("valid_vocab", 20)
    want = torch.cat([distribution(z[:valid], **kept), z.new_zeros(20 - valid)])
    assert abs(chi_square(torch.bincount(ids, minlength=20), want)) < 4.5


@EVERY_LANE
@pytest.mark.parametrize("neighbour", ["row", "seed"])
def test_neighbouring_draws_are_independent(way: Way, neighbour: str, full: bool) -> None:
    """Pairs of draws of neighbouring rows or seeds follow the product of their distributions.

    Neighbouring ids are judged by the frequencies: only independent noise gives them.
    """
    if way.dtype != torch.float32:
        pytest.skip("the noise does not know the dtype")
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0, -0.4, 0.1])
    rows = many(full, way)
    first = drawn(logits, rows, way, seed=5)
    if neighbour == "row":
        pairs = first[0::2] * 6 + first[1::2]
    else:
        pairs = first * 6 + drawn(logits, rows, way, seed=6)
    joint = torch.outer(logits.double().softmax(0), logits.double().softmax(0)).flatten()
    assert abs(chi_square(torch.bincount(pairs, minlength=36), joint)) < 4.5


@EVERY_LANE
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 299, "temperature": 3.0},
        {"top_p": 0.35},
        {"top_p": 1e-12},
        {"top_k": 12, "top_p": 0.6, "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [3, 16, 300])
def test_the_set_that_may_be_drawn(way: Way, options: dict[str, Any], vocab: int) -> None:
    """Every id of the reference's set is drawn, and no other."""
    if way.dtype not in (torch.float32, torch.float64):
        pytest.skip("what is kept does not know the dtype of the operands")
    # Few values, so that ties lie on every threshold; none so small that it is never drawn.
    rng = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-4, 5, (vocab,), generator=rng).double() / 4
    want = distribution(logits, **options).nonzero().flatten().tolist()
    rows = min(60 * len(want) + 200, 3000)
    found = set(drawn(logits, rows, way, seed=2, **options).tolist())
    assert found <= set(want)
    if len(want) < 50:
        assert found == set(want)
    else:
        assert len(found) > 0.95 * len(want)


@EVERY_LANE
def test_ties_go_to_the_lowest_ids(way: Way) -> None:
    logits = torch.tensor([1.0, 3.0, -0.0, 3.0, 3.0, 0.0, 3.0])
    assert set(drawn(logits, 50, way, temperature=0).tolist()) == {1}
    assert set(drawn(logits, 200, way, top_k=3, seed=1).tolist()) == {1, 3, 4}
    assert set(drawn(logits, 200, way, top_p=0.4, seed=1).tolist()) == {1, 3}
    if way.dtype != torch.float64:
        # -0.0, -0.0, 0.0 and something below: both zeros are the same.
        zeros = torch.tensor([-1e-30, -1e-30, 1e-30, -1.0])
        ids = drawn(zeros, 200, way, top_k=2, seed=1, logit_scale=1e-30)
        assert set(ids.tolist()) == {0, 1}


@EVERY_LANE
def test_the_boundary_of_top_p_is_kept(way: Way) -> None:
    """The set whose mass is just p is the smallest that reaches it."""
    if way.dtype not in (torch.float32, torch.float64):
        pytest.skip("what is kept does not know the dtype of the operands")
    for kept in (1, 2, 5, 8):
        ids = drawn(torch.zeros(8), 300, way, top_p=kept / 8, seed=1)
        assert set(ids.tolist()) == set(range(kept))


def bits_of(seed: int, row: int, column: int) -> int:
    """The 40 random bits of a draw, in Python's integers."""
    whole = 2**64 - 1

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        return x ^ (x >> 31)

    state = mixed(((mixed(seed & whole) ^ row) * 0xD1342543DE82EF95) & whole)
    return mixed(((state ^ column) * 0x9E3779B97F4A7C15) & whole) >> 24


@EVERY_LANE
@pytest.mark.parametrize("options", [{}, {"top_k": 30}], ids=["plain", "cut"])
def test_the_noise_is_a_hash_of_seed_row_and_id(way: Way, options: dict[str, Any]) -> None:
    """Noise alone decides between equal logits."""
    if way.dtype != torch.float32:
        pytest.skip("the noise does not know the dtype")
    ids = range(options.get("top_k", 50))
    for seed in (0, -5, 2**63 - 1):
        want = [min(ids, key=lambda i: bits_of(seed, row, i)) for row in range(20)]
        assert drawn(torch.zeros(50), 20, way, seed=seed, **options).tolist() == want


@EVERY_LANE
def test_temperature_zero_is_the_argmax(way: Way) -> None:
    hidden, weight = integers(40, 130, way)
    want = (hidden.double() @ weight.double().T).argmax(1)
    for options in ({}, {"top_k": 3}, {"top_p": 0.1}, {"seed": 9}):
        got = linear_sample(hidden, weight, temperature=0, impl=way.impl, **options)
        assert torch.equal(got, want)
    cold = linear_sample(hidden[:, :1], weight[:, :1], temperature=1e-60, impl=way.impl)
    z = hidden[:, :1].double() * weight[:, 0].double()
    assert (z.gather(1, cold[:, None])[:, 0] == z.amax(1)).all()


@EVERY_LANE
def test_seeds(way: Way) -> None:
    hidden, weight = integers(64, 40, way)

    def sample(seed: int | Tensor | None) -> Tensor:
        return linear_sample(hidden, weight, seed=seed, impl=way.impl)

    seeds = [0, 7, -3, 2**63 - 1, -(2**63)]
    for seed in seeds:
        assert torch.equal(sample(seed), sample(torch.tensor(seed, device=way.device)))
    assert len({tuple(sample(seed).tolist()) for seed in [*seeds, 8]}) == len(seeds) + 1
    torch.manual_seed(3)
    first, second = sample(None), sample(None)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(sample(None), first)


@EVERY_LANE
def test_a_row_does_not_depend_on_its_batch(way: Way) -> None:
    if way.dtype == torch.float16 and way.device == "cpu":
        pytest.skip("the noise does not know the dtype, and this takes long")
    hidden, weight = integers(50, 70, way)
    options: dict[str, Any] = {"seed": 4, "top_k": 30, "top_p": 0.9, "impl": way.impl}
    together = linear_sample(hidden, weight, **options)
    for count in (1, 16, 33):
        assert torch.equal(linear_sample(hidden[:count], weight, **options), together[:count])
    changed = hidden.clone()
    changed[10:20] = float("nan")
    others = linear_sample(changed, weight, **options)
    assert torch.equal(others[:10], together[:10])
    assert torch.equal(others[20:], together[20:])
    folded = linear_sample(hidden.view(5, 10, -1), weight, **options)
    assert torch.equal(folded, together.view(5, 10))
    assert linear_sample(hidden[0], weight, **options) == together[0]


@pytest.mark.lanes("interpret", "gpu")
def test_tiling_changes_nothing(way: Way) -> None:
    if way.impl == "torch":
        pytest.skip("tiles are the kernel's")
    hidden, weight = integers(50, 70, way)
    options: dict[str, Any] = {"seed": 4, "top_k": 30, "top_p": 0.9, "impl": way.impl}
    narrow = linear_sample(hidden, weight, **options)
    with _launch.overriding(WIDE):
        assert torch.equal(linear_sample(hidden, weight, **options), narrow)


@pytest.mark.lanes("interpret", "gpu")
def test_implementations_draw_the_same_noise(way: Way) -> None:
    """Logarithms may differ by an ulp, which turns a draw in a million."""
    if way.impl == "torch":
        pytest.skip("compares the kernel with it")
    hidden, weight = integers(256, 257, way)
    for options in ({}, {"top_k": 50}, {"top_p": 0.8, "temperature": 0.5}):
        with _launch.overriding(WIDE):
            kernel, plain = (
                linear_sample(hidden, weight, seed=77, impl=impl, **options)
                for impl in (way.impl, "torch")
            )
        assert int((kernel != plain).sum()) <= 1


@EVERY_LANE
def test_columns_that_do_not_exist_are_never_drawn(way: Way) -> None:
    hidden = torch.ones(150, 16, device=way.device, dtype=way.dtype)
    weight = torch.zeros(64, 16, device=way.device, dtype=way.dtype)
    weight[40:] = 100.0
    weight[50:] = float("nan")
    for options in ({}, {"temperature": 0}, {"top_k": 60}, {"top_p": 0.99}):
        ids = linear_sample(hidden, weight, valid_vocab=40, seed=1, impl=way.impl, **options)
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 40
    assert len(linear_sample(hidden, weight, valid_vocab=40, impl=way.impl).unique()) > 30


@EVERY_LANE
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}]
)
def test_logits_that_are_not_finite(way: Way, options: dict[str, Any]) -> None:
    """NaN and -inf are drawn only where there is nothing else, +inf whenever it is there."""
    nan, inf = float("nan"), float("inf")
    options = {"seed": 1, **options}
    assert set(drawn(torch.tensor([nan, 0.0, nan]), 50, way, **options).tolist()) == {1}
    assert set(drawn(torch.tensor([-inf, nan, -5.0]), 50, way, **options).tolist()) == {2}
    assert set(drawn(torch.tensor([0.0, inf, 3.0]), 50, way, **options).tolist()) == {1}
    for nothing in ([nan] * 3, [-inf] * 3):
        assert set(drawn(torch.tensor(nothing), 50, way, **options).tolist()) == {0}


@EVERY_LANE
def test_a_masked_id_is_never_drawn(way: Way) -> None:
    """A bias of -inf forbids an id, whatever else is asked for."""
    logits = torch.zeros(30)
    logits[::2] = float("-inf")
    for options in ({}, {"top_k": 25}, {"top_p": 0.999}):
        ids = drawn(logits, 300, way, seed=1, **options)
        assert (ids % 2 == 1).all()


@EVERY_LANE
def test_autocast_rounds_the_operands(way: Way) -> None:
    if way.dtype != torch.float32:
        pytest.skip("autocast is about fp32 arguments")
    narrow = torch.float16 if way.impl == "triton" and way.device == "cpu" else torch.bfloat16
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=rng).to(way.device)
    weight = torch.randn(100, 32, generator=rng).to(way.device)
    with torch.autocast(way.device, narrow):
        got = linear_sample(hidden, weight, seed=1, impl=way.impl)
    want = linear_sample(hidden.to(narrow), weight, seed=1, impl=way.impl)
    assert torch.equal(got, want)


@EVERY_LANE
def test_nothing_is_recorded_for_autograd(way: Way) -> None:
    hidden, weight = integers(4, 9, way)
    ids = linear_sample(
        hidden.requires_grad_(), weight.requires_grad_(), seed=1, impl=way.impl
    )  # fmt: skip
    assert ids.dtype == torch.int64
    assert not ids.requires_grad


@pytest.mark.lanes("gpu")
def test_a_captured_graph_advances_the_seed(way: Way) -> None:
    hidden, weight = integers(64, 40, way)
    seed = torch.tensor(5, device=way.device)

    def step() -> Tensor:
        seed.add_(1)
        return linear_sample(hidden, weight, seed=seed, impl=way.impl)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = step()
    seed.fill_(10)
    for at in (11, 12):
        graph.replay()
        assert torch.equal(ids, linear_sample(hidden, weight, seed=at, impl=way.impl))


@EVERY_LANE
def test_compiled_with_a_new_seed_each_time(way: Way) -> None:
    """An int seed may recompile; a tensor must not, and both give what eager gives."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows what tracing does")
    hidden, weight = integers(20, 30, way)
    torch._dynamo.reset()
    compiled = torch.compile(linear_sample, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        for given in (seed, torch.tensor(seed, device=way.device)):
            got = compiled(hidden, weight, seed=given, top_k=5, impl=way.impl)
            assert torch.equal(
                got, linear_sample(hidden, weight, seed=seed, top_k=5, impl=way.impl)
            )
    torch.manual_seed(0)
    first, second = (compiled(hidden, weight, impl=way.impl) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_large_vocabulary() -> None:
    """Noise coarse enough to tie would favour low ids: equal logits must all be as likely."""
    way = Way("torch", "cpu", torch.float32)
    ids = drawn(torch.zeros(60_000), 400, way, seed=3)
    assert abs(float(ids.double().mean()) / 30_000 - 1) < 4.5 / (3 * 400) ** 0.5
    assert len(ids.unique()) > 390
    few = drawn(torch.arange(60_000) / 60_000, 400, way, seed=3, top_k=4, top_p=0.7)
    assert set(few.tolist()) == {59_997, 59_998, 59_999}


@pytest.mark.lanes("interpret", "gpu")
def test_a_large_vocabulary_is_refused_with_its_reason(way: Way) -> None:
    hidden, weight = integers(4, 600, way)
    with pytest.raises(NotImplementedError, match=r"600 columns .* \(at most 512\)"):
        linear_sample(hidden, weight, impl="triton")
    assert any("torch's matrix products" in text for text in explain(linear_sample, hidden, weight))


GOOD: dict[str, Any] = {"input": torch.zeros(3, 4), "linear_weight": torch.zeros(5, 4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1]}, ValueError, "input: expected a Tensor, got list"),
        ({"linear_weight": torch.zeros(5, 3)}, ValueError, r"linear_weight: expected shape \(V, 4"),
        ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias: expected shape \(5,\)"),
        ({"temperature": -0.1}, ValueError, "temperature: expected a finite number >= 0, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number >= 0"),
        ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number >= 0"),
        ({"top_k": 0}, ValueError, "top_k: expected an int >= 1, got 0"),
        ({"top_k": 2.0}, ValueError, "top_k: expected an int >= 1, got 2.0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected None or a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected None or a number in \(0, 1\], got 1.5"),
        ({"top_p": float("nan")}, ValueError, r"top_p: expected None or a number in \(0, 1\]"),
        ({"seed": 1.5}, ValueError, "seed: expected an int, got 1.5"),
        ({"seed": 2**63}, ValueError, "seed: expected an int that int64 holds"),
        ({"seed": torch.zeros(1).long()}, ValueError, r"seed: expected shape \(\), got \(1,\)"),
        ({"seed": torch.tensor(1.0)}, ValueError, "seed: expected dtype int64, got float32"),
        ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed: expected device cpu"),
        ({"softcap": 0.0}, ValueError, "softcap: expected None or a finite number > 0, got 0.0"),
        ({"valid_vocab": 6}, ValueError, "valid_vocab: expected at most V = 5, got 6"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
        ({"impl": "triton"}, NotImplementedError, "the tensors are on cpu"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_sample(**(GOOD | change))
