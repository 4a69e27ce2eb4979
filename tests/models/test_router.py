"""The learned router and given scores: values, gradients, documents, and what may read what."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tensors import ints
from torch import Tensor

from stlm_kernels import ema_unpool, find_patches, segment_pool, unpool
from stlm_kernels.testing import assert_causal
from stlm_models import Router, RouterState, Routing

VOCAB, DIM = 257, 8


def random_router(**options: Any) -> Router:
    router = Router(DIM, **options)
    torch.nn.init.normal_(router.query.weight)
    torch.nn.init.normal_(router.key.weight)
    return router


# ---- values -----------------------------------------------------------------------------------


def test_probabilities_by_hand() -> None:
    router = Router(2)
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, -1.0], [1.0, -1.0], [0.0, 0.0]])
    routing = router(x)
    wanted = [1, 0, 0.5, 1, (1 - math.sqrt(0.5)) / 2, 0.5]
    torch.testing.assert_close(routing.probs, torch.tensor(wanted), rtol=0, atol=1e-5)
    # Where p = 1/2 the code of H-Net, whose argmax takes the first of equals, begins no patch.
    assert routing.starts.tolist() == [True, False, False, True, False, False]
    assert routing.confidence.tolist() == [1.0] * 6


def test_probabilities_are_those_of_plain_torch() -> None:
    router, x = random_router(), 3 * torch.randn(50, DIM)
    cosine = F.cosine_similarity(router.query(x[1:]), router.key(x[:-1]))
    torch.testing.assert_close(router(x).probs[1:], (1 - cosine) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_probabilities_are_the_cosines_for_states_of_any_size(
    scale: float, dtype: torch.dtype
) -> None:
    """Scaling by a power of two changes neither directions nor their rounding."""
    power = 2.0 ** math.floor(math.log2(scale))
    router, unit = random_router().to(dtype), torch.randn(200, DIM).to(dtype)
    x = unit * power
    routing = router(x)
    query, key = (linear(x).double() for linear in (router.query, router.key))
    norms = query[1:].norm(dim=-1) * key[:-1].norm(dim=-1)
    want = (1 - (query[1:] * key[:-1]).sum(-1) / norms) / 2
    torch.testing.assert_close(routing.probs[1:].double(), want, rtol=0, atol=1e-6)
    assert torch.equal(routing.starts, router(unit).starts)


@pytest.mark.parametrize("norm", [1e-30, 1e-13, 1e-12, 1e-11])
def test_states_of_next_to_nothing_are_as_in_h_net(norm: float) -> None:
    """Its code divides by F.normalize's eps, which turns the cosine to 0 below it."""
    router, x = Router(DIM), F.normalize(torch.randn(30, DIM), dim=-1) * norm
    cosine = (F.normalize(x[1:], dim=-1) * F.normalize(x[:-1], dim=-1)).sum(-1)
    torch.testing.assert_close(router(x).probs[1:], (1 - cosine) / 2, rtol=0, atol=1e-6)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(router(x).probs.sum(), x)
    assert gradient.isfinite().all()


def test_documents_are_apart_and_slots_beyond_are_never_read() -> None:
    router, x = random_router(), torch.randn(20, DIM)
    x[5], x[15:] = math.nan, math.nan
    boundaries = ints(0, 6, 6, 15)
    x.requires_grad_()
    routing = router(x, boundaries)
    torch.testing.assert_close(routing.probs[6:15], router(x[6:15]).probs)
    assert routing.probs[[0, 6]].tolist() == [1, 1]
    assert not routing.probs[15:].any()
    assert not routing.starts[15:].any()
    (gradient,) = torch.autograd.grad(routing.probs[6:].sum(), x)
    assert gradient[6:15].isfinite().all()
    assert not gradient[15:].any()


def test_dense_states_are_packed_ones() -> None:
    router, x = random_router(), torch.randn(3, 7, DIM)
    for a, b in zip(router(x), router(x.flatten(0, 1), ints(0, 7, 14, 21)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="cu_seqlens: expected None"):
        router(x, ints(0, 21))


def test_nothing_to_route() -> None:
    routing = Router(DIM)(torch.zeros(0, DIM))
    assert [len(part) for part in routing] == [0, 0, 0]
    assert Router(DIM, target_length=4.0).ratio_loss(routing).item() == pytest.approx(4 / 3)


def test_the_gate_is_that_of_each_first_byte() -> None:
    routing = Routing(torch.rand(6), torch.zeros(6, dtype=torch.bool), torch.ones(6))
    starts = torch.tensor([False, False, True, False, False, True])
    patches = find_patches(torch.zeros(6).int(), patch_start_mask=starts, max_patches=5)
    with torch.autocast("cpu", torch.bfloat16):
        gate = Router(DIM).gate(routing, patches)
    assert torch.equal(gate, torch.cat([routing.probs[[0, 2, 5]], torch.zeros(2)]))


def test_the_router_is_kept_wide_under_autocast() -> None:
    router, x = random_router(), torch.randn(30, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert (routing.probs.dtype, routing.confidence.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(routing.probs, router(x).probs, rtol=0, atol=0.02)


@pytest.mark.parametrize("bad", [{"dim": 0}, {"dim": 4, "target_length": 1.0}])
def test_wrong_options(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Router(**bad)


@pytest.mark.parametrize("shape", [(5, DIM + 1), (DIM,), (1, 2, 3, DIM)])
def test_wrong_states(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \(T, 8\) or \(B, T, 8\)"):
        Router(DIM)(torch.zeros(shape))


# ---- gradients --------------------------------------------------------------------------------


def test_the_confidence_passes_the_gradient_of_the_choice() -> None:
    router, x = random_router().double(), torch.randn(40, DIM, dtype=torch.float64)
    routing, upstream = router(x), torch.randn(40, dtype=torch.float64)
    signs = torch.where(routing.starts, 1.0, -1.0)
    (got,) = torch.autograd.grad(routing.confidence, router.key.weight, upstream, retain_graph=True)
    (want,) = torch.autograd.grad(routing.probs, router.key.weight, signs * upstream)
    torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda x: router(x).probs, x.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_of_zeros_have_no_gradient(dtype: torch.dtype) -> None:
    """Nor send one of 1e12 to their neighbours, which are states like any other."""
    router = random_router().to(dtype)
    x = torch.randn(9, DIM).to(dtype)
    x[3:6] = 0
    x.requires_grad_()
    routing = router(x)
    assert routing.probs[3:7].tolist() == [0.5] * 4
    assert not routing.starts[3:7].any()
    routing.probs.sum().backward()
    assert x.grad is not None
    assert not x.grad[3:6].any()
    assert 0 < x.grad.abs().max() < 100
    assert router.query.weight.grad.isfinite().all()


@pytest.mark.parametrize("documents", [None, (0, 7, 30)])
def test_ratio_loss(documents: tuple[int, ...] | None) -> None:
    router = Router(DIM, target_length=5.0)
    boundaries = None if documents is None else ints(*documents)
    count = 40 if documents is None else documents[-1]
    inside = torch.arange(40) < count
    starts = (torch.arange(40) % 5 == 0) & inside
    probs = (torch.full((40,), 0.2) * inside).requires_grad_()
    assert router.ratio_loss(Routing(probs, starts, probs), boundaries).item() == pytest.approx(1)
    often = inside & (torch.arange(40) % 2 == 0)
    loss = router.ratio_loss(Routing(probs, often, probs), boundaries)
    fraction, mean = often.sum() / count, 0.2
    want = 5 / 4 * (4 * fraction * mean + (1 - fraction) * (1 - mean))
    assert loss.item() == pytest.approx(want.item())
    (gradient,) = torch.autograd.grad(loss, probs)
    slope = 5 / 4 * (4 * fraction - (1 - fraction)) / count
    torch.testing.assert_close(gradient[:count], slope.expand(count))
    assert slope > 0  # too many boundaries: p must fall


# ---- what may be read -------------------------------------------------------------------------


class RoutedModel(torch.nn.Module):
    """Causal states, a router's patches, their pool smoothed and read through `patch_ids`."""

    def __init__(self, mode: str, read: str) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, DIM)
        self.router = random_router()
        self.core = torch.nn.Linear(DIM, DIM)
        self.mode, self.read = mode, read

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        embedded = self.table(ids)
        previous = torch.cat([torch.zeros_like(embedded[:1]), embedded[:-1]])
        if cu_seqlens is not None:
            previous = previous.index_fill(0, cu_seqlens[:-1].long(), 0)
        x = embedded + 0.5 * previous
        routing = self.router(x, cu_seqlens)
        patches = find_patches(ids, patch_start_mask=routing.starts, cu_seqlens=cu_seqlens)
        pooled = segment_pool(x, patches.cu_patchlens, mode=self.mode)
        smooth = ema_unpool(
            self.core(pooled),
            self.router.gate(routing, patches),
            getattr(patches, self.read),
            cu_seqlens=patches.cu_seqlens,
        )
        return x + smooth * routing.confidence[:, None]


def model(mode: str, read: str = "patch_ids") -> RoutedModel:
    return RoutedModel(mode, read).double()


def test_a_routed_model_is_causal() -> None:
    routed = model("first")
    starts = routed.router(routed.table(torch.arange(97, 123).repeat(3))).starts.sum()
    assert 10 < starts < 70  # some begin a patch, some do not
    assert_causal(routed, VOCAB, length=40)


@pytest.mark.parametrize(("mode", "read"), [("mean", "patch_ids"), ("last", "patch_ids")])
def test_what_else_is_read_through_patch_ids_leaks(mode: str, read: str) -> None:
    with pytest.raises(AssertionError, match="leaks"):
        assert_causal(model(mode, read), VOCAB, length=40)


def test_mean_pooling_is_causal_through_read_ids() -> None:
    assert_causal(model("mean", "read_ids"), VOCAB, length=40)


def test_gradients_reach_everything() -> None:
    routed = model("first")
    out = routed(torch.randint(0, VOCAB, (60,)), ints(0, 25, 60))
    out.square().sum().backward()
    for name, parameter in routed.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_packed_document_is_as_on_its_own() -> None:
    routed, ids = model("first"), torch.randint(0, VOCAB, (60,))
    packed = routed(ids, ints(0, 25, 60))
    torch.testing.assert_close(packed[25:], routed(ids[25:]))


def entropies(table: Tensor) -> Callable[[Tensor], Tensor]:
    """Entropies of the next byte by a model that knows the last two, (T,) nats."""

    def score(ids: Tensor) -> Tensor:
        logits = table[ids] + 0.5 * table[torch.cat([ids[:1], ids[:-1]])]
        return torch.distributions.Categorical(logits=logits).entropy()

    return score


@pytest.mark.parametrize("read", ["read_ids", "patch_ids"])
def test_boundaries_where_the_next_byte_is_uncertain(read: str) -> None:
    """A patch ends after a byte whose successor is hard to tell, and may be read there."""
    score = entropies(3 * torch.randn(VOCAB, VOCAB, dtype=torch.float64))
    table = torch.randn(VOCAB, DIM, dtype=torch.float64)
    threshold = score(torch.randint(0, VOCAB, (500,))).median()

    def patched(ids: Tensor) -> Tensor:
        patches = find_patches(ids, patch_end_mask=score(ids) > threshold, max_patch_len=12)
        pooled = segment_pool(table[ids], patches.cu_patchlens, mode="mean")
        return unpool(pooled, getattr(patches, read), residual=table[ids])

    if read == "read_ids":
        assert_causal(patched, VOCAB, length=40)
        return
    with pytest.raises(AssertionError, match="leaks"):
        assert_causal(patched, VOCAB, length=40)


# ---- one byte after another ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_equal_the_full_run(dtype: torch.dtype) -> None:
    """Rows of documents of other lengths, some states of zeros; a step sees no other row."""
    router, texts = random_router().to(dtype), ((5, 9, 1), (7, 8), (15,))
    x = torch.randn(3, 15, DIM).to(dtype)
    x[1, 3] = x[2, 4] = 0
    state = RouterState(3)
    got = []
    with torch.no_grad():
        full = [
            router(x[row], ints(0, *torch.tensor(lengths).cumsum(0).tolist()))
            for row, lengths in enumerate(texts)
        ]
        ends = [torch.tensor(lengths).cumsum(0).tolist() for lengths in texts]
        for t in range(15):
            state.begin_documents(torch.tensor([t in row for row in ends]))
            got.append(router.step(x[:, t], state))
    probs = torch.stack([routing.probs for routing in got], 1)
    want = torch.stack([routing.probs for routing in full])
    assert probs.dtype == want.dtype
    torch.testing.assert_close(probs, want, rtol=0, atol=4e-2 if dtype.itemsize == 2 else 1e-5)
    clear = (want - 0.5).abs() > 0.05
    for name in ("starts", "confidence"):
        ours = torch.stack([getattr(routing, name) for routing in got], 1)
        theirs = torch.stack([getattr(routing, name) for routing in full])
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours[clear], theirs[clear])
    assert (probs[:, 0] == 1).all()
    assert probs[0, 5] == probs[1, 7] == 1


def test_steps_go_on_after_a_full_run() -> None:
    router, x = random_router(), torch.randn(2, 9, DIM)
    state = RouterState(2)
    router.step(x[:, 5], state)
    want = router(x).probs.view(2, 9)
    for t in range(6, 9):
        torch.testing.assert_close(router.step(x[:, t], state).probs, want[:, t])


def test_a_document_that_begins_reads_nothing_of_the_last_one() -> None:
    router, state, x = random_router(), RouterState(2), torch.randn(2, DIM)
    router.step(torch.full((2, DIM), math.nan), state)
    state.begin_documents(torch.tensor([True, False]))
    x.requires_grad_()
    probs = router.step(x, state).probs
    assert probs[0] == 1
    assert probs[1].isnan()
    (grad,) = torch.autograd.grad(probs[0], x)
    assert (grad[0] == 0).all()


def test_wrong_arguments_of_a_step() -> None:
    router, state = Router(DIM), RouterState(2)
    for x, expected in (
        (torch.randn(2, DIM + 1), r"x: expected shape \(2, 8\), got \(2, 9\)"),
        (torch.randn(3, DIM), r"x: expected shape \(2, 8\), got \(3, 8\)"),
        (torch.randn(2, 1, DIM), r"x: expected shape \(2, 8\), got \(2, 1, 8\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            router.step(x, state)
    assert state.begins.all()
