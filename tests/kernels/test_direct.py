"""Calls of registered ops that go to their launcher, and those that must go by the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stlm_kernels import _launch, _library, unpool
from stlm_kernels._torch import function

X = torch.ones(2)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor): ...


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A registered op that says by which way it was called."""

    def op(*args: Any) -> str:
        return "dispatcher"

    monkeypatch.setitem(_library._launchers, op, lambda *args: "launcher")
    with _launch.recording(lambda *launch: None):
        yield _library.direct(op)


@pytest.mark.parametrize(
    "args", [(X,), (torch.nn.Parameter(X), None, 1, 0.5, True, torch.float16), (1, None, X)]
)
def test_plain_calls_go_to_the_launcher(call: Callable[..., str], args: tuple[Any, ...]) -> None:
    assert call(*args) == "launcher"


@pytest.mark.parametrize(
    "around",
    [Mode, FakeTensorMode, torch.profiler.profile, torch.autograd.profiler.profile],
    ids=lambda x: x.__name__,
)
def test_what_watches_sees_the_op(
    call: Callable[..., str], around: Callable[[], AbstractContextManager[Any]]
) -> None:
    with around():
        assert call(X) == "dispatcher"
    assert call(X) == "launcher"


@pytest.mark.parametrize(
    "x",
    [
        torch.Tensor._make_subclass(Subclass, X),
        X.to("meta"),
        FakeTensorMode().from_tensor(X),
    ],
    ids=["subclass", "meta", "fake"],
)
def test_tensors_of_other_kinds_go_by_the_dispatcher(call: Callable[..., str], x: Tensor) -> None:
    assert call(x) == "dispatcher"


def test_transforms_go_by_the_dispatcher(call: Callable[..., str]) -> None:
    ways = []

    def note(x: Tensor) -> Tensor:
        ways.append(call(x))
        return x

    torch.vmap(note)(X)
    torch._vmap_internals._vmap(note)(X)
    torch.func.grad(lambda x: note(x).sum())(X)
    assert ways == ["dispatcher"] * 3


def test_a_cpu_goes_by_the_dispatcher_that_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "kernels_interpreted", lambda: False)
    monkeypatch.setitem(_library._launchers, len, lambda *args: "launcher")
    assert _library.direct(len)(X) == 2


@pytest.mark.parametrize("recorded", [False, True])
def test_nothing_is_kept_without_gradients(recorded: bool) -> None:
    """Beneath no_grad the forward runs alone."""
    kept = []

    def keep(x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        kept.append(x)
        return (x,), ()

    made = function.differentiable(
        "Made", lambda x: x * 2, of=("x",), keep=keep, gradients=lambda needs, grad, x: grad * 2
    )
    with nullcontext() if recorded else torch.no_grad():
        out = made.apply(torch.ones(2, requires_grad=True))
    assert out.requires_grad is recorded
    assert len(kept) == recorded


def two_results() -> tuple[Any, list[tuple[Tensor, ...]]]:
    """A Function of two results, and the gradients that its backward is given."""
    given: list[tuple[Tensor, ...]] = []

    def gradients(needs: Any, *grads: Tensor) -> tuple[Tensor]:
        given.append(grads)
        return (grads[0].sum() + grads[1].sum() * torch.ones(3),)

    made = function.differentiable(
        "Made",
        lambda x: (x * 2, x.half()[:2]),
        of=("x",),
        keep=lambda: ((), ()),
        gradients=gradients,
        results=("first", "second"),
        derived=2,
    )
    return made, given


def test_missing_gradients_are_one_number() -> None:
    made, given = two_results()
    first, second = made.apply(torch.ones(3, requires_grad=True))
    second.sum().backward()
    ((missing, present),) = given
    assert missing.shape == first.shape
    assert missing.dtype == first.dtype
    assert missing.stride() == (0,)
    assert not missing.any()
    assert present.dtype == torch.float16
    assert present.shape == (2,)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        return args[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def test_no_gradient_at_all_asks_for_none() -> None:
    made, given = two_results()
    x = torch.ones(3, requires_grad=True)
    NoGradient.apply(*made.apply(x)).backward()
    assert x.grad is None
    assert given == []


def test_an_op_that_gets_no_gradient_launches_nothing() -> None:
    states, launches = torch.ones(2, 16, requires_grad=True), []
    with _launch.recording(lambda *launch: launches.append(launch)):
        out = unpool(states, torch.tensor([0, 1], dtype=torch.int32), impl="triton")
        forward = len(launches)
        NoGradient.apply(out, out).backward()
    assert forward
    assert len(launches) == forward
