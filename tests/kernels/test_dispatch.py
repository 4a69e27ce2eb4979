"""Dispatch: the implementation that runs, and what a caller is told about it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stlm_kernels
from stlm_kernels import _dispatch, byte_pool, explain
from stlm_kernels._dispatch import use_triton, without_kernel
from stlm_kernels.ops.byte_pool import torch_impl
from stlm_kernels.registry import OPS

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
EVERY_CPU_LANE = pytest.mark.lanes("cpu", "interpret")


def arguments() -> dict[str, Any]:
    return {
        "byte_ids": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "weight": torch.ones(8, 4),
        "cu_patchlens": torch.tensor([0, 1, 3], dtype=torch.int32),
    }


def nothing(**_: Any) -> list[str]:
    return []


def two_reasons(**given: Any) -> list[str]:
    assert given == {"x": 1}
    return ["x is odd", "x is small"]


def one_reason(**given: Any) -> list[str]:
    assert given == {"x": 1}
    return ["a library does this better"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that runs kernels, until reasons are put into the list; no warning was given yet."""
    reasons: list[str] = []
    monkeypatch.setattr(_dispatch, "machine_reasons", lambda kind, index: list(reasons))
    monkeypatch.setattr(_dispatch, "_warned", set())
    return reasons


# ---- the interpreter --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git1a2b3c", "2.10.1", False),
        ("3.7.1", "2.4.6", True),
        ("3.10.0", "3.0.0rc1", True),
    ],
)
def test_the_interpreter_of_triton_3_6_needs_an_older_numpy(
    triton_version: str, numpy_version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    monkeypatch.setattr(_dispatch, "kernels_interpreted", lambda: True)
    reasons = _dispatch.machine_reasons("cpu", None)
    if works:
        assert reasons == []
    else:
        (reason,) = reasons
        for part in (triton_version, numpy_version, "pip install 'numpy<2.4'", "3.7.1"):
            assert part in reason


# ---- an explicit wish -------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_torch_is_obeyed_without_asking(device: torch.device, machine: list[str]) -> None:
    def never(**_: Any) -> list[str]:
        raise AssertionError("nothing to ask")

    assert use_triton("op", "torch", device, never, never) is False


def test_triton_is_obeyed_and_no_declined_reason_counts(machine: list[str]) -> None:
    assert use_triton("op", "triton", CUDA, nothing, one_reason, x=1) is True


def test_triton_is_refused_with_all_reasons(machine: list[str]) -> None:
    machine[:] = ["the machine is old", "the driver too"]
    with pytest.raises(NotImplementedError) as refusal:
        use_triton("some_op", "triton", CUDA, two_reasons, x=1)
    assert str(refusal.value) == (
        "some_op: impl='triton' cannot run this call: "
        "the machine is old; the driver too; x is odd; x is small"
    )


@pytest.mark.parametrize("impl", ["cuda", "", None, "Triton"])
def test_an_unknown_wish_is_a_value_error(impl: Any) -> None:
    message = f"impl: expected one of 'auto', 'triton', 'torch', got {impl!r}"
    for call, prefix in (
        (lambda: use_triton("op", impl, CPU, nothing), ""),
        (lambda: without_kernel("op", impl, CPU), ""),
        (lambda: byte_pool(**arguments(), impl=impl), "byte_pool: "),
        (lambda: explain(byte_pool, **arguments(), impl=impl), "explain: "),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        assert str(refusal.value) == prefix + message


def test_ops_without_a_kernel(machine: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without_kernel("op", "auto", CUDA)
        without_kernel("op", "torch", CUDA)
    machine[:] = ["the machine is old"]
    with pytest.raises(NotImplementedError) as refusal:
        without_kernel("some_op", "triton", CUDA)
    assert str(refusal.value) == (
        "some_op: impl='triton' cannot run this call: the machine is old; "
        "this op has no Triton kernel yet"
    )


# ---- auto -------------------------------------------------------------------------------------


@EVERY_CPU_LANE
def test_auto_on_cpu_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors never take the kernels, even where triton is interpreted; nothing warns."""
    calls: list[Tensor] = []
    path = torch_impl.byte_pool

    def counting(*args: Any) -> Tensor:
        calls.append(path(*args))
        return calls[-1]

    monkeypatch.setattr(torch_impl, "byte_pool", counting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        byte_pool(**arguments())
        assert use_triton("op", "auto", CPU, nothing) is False
        assert use_triton("op", "auto", torch.device("mps"), nothing) is False
    assert len(calls) == 1


def test_auto_on_cuda_takes_the_kernel_silently(machine: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_triton("op", "auto", CUDA, nothing, nothing) is True


def test_auto_on_cuda_warns_once_for_each_set_of_reasons(machine: list[str]) -> None:
    def ask(op: str = "some_op") -> bool:
        return use_triton(op, "auto", CUDA, two_reasons, x=1)

    with warnings.catch_warnings(record=True) as seen:
        assert [ask(), ask(), ask()] == [False] * 3
    assert [w.category for w in seen] == [RuntimeWarning]
    assert [str(w.message) for w in seen] == [
        "some_op: taking the torch path: x is odd; x is small"
    ]
    with pytest.warns(RuntimeWarning, match="^other_op: "):
        ask("other_op")
    machine[:] = ["the machine is old"]
    with pytest.warns(RuntimeWarning, match="the machine is old; x is odd; x is small"):
        assert ask() is False


def test_the_warning_points_at_the_caller(
    machine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine[:] = ["the machine is old"]
    monkeypatch.setattr(_dispatch, "_warned", set())

    def op() -> bool:
        return use_triton("op", "auto", CUDA, nothing)

    with pytest.warns(RuntimeWarning) as seen:
        op()
    assert seen[0].filename == __file__


def test_declined_cases_are_silent(machine: list[str]) -> None:
    """A library that does a case better is a choice, not a failure, whatever else speaks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_triton("op", "auto", CUDA, nothing, one_reason, x=1) is False
        machine[:] = ["the machine is old"]
        assert use_triton("op", "auto", CUDA, two_reasons, one_reason, x=1) is False


# ---- reasons of the machine -------------------------------------------------------------------


def test_machine_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)
    reasons = _dispatch.machine_reasons("cuda", 0)
    assert reasons == ["triton is not installed (pip install triton)"]


@pytest.mark.parametrize(
    ("capability", "reasons"),
    [((7, 5), ["compute capability (7, 5) is below (8, 0)"]), ((8, 0), []), ((12, 0), [])],
)
def test_machine_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reasons: list[str]
) -> None:
    monkeypatch.setattr(_dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_dispatch, "_capability", lambda index: capability)
    assert _dispatch.machine_reasons("cuda", 0) == reasons


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "has_triton", lambda: True)
    assert "mps" in _dispatch.machine_reasons("mps", None)[0]
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in _dispatch.machine_reasons("cuda", 0)[0]


@EVERY_CPU_LANE
def test_cpu_runs_kernels_only_when_they_are_interpreted() -> None:
    pytest.importorskip("triton")
    expected = (
        []
        if _dispatch.kernels_interpreted()
        else ["the tensors are on cpu and the kernels run on CUDA devices"]
    )
    assert _dispatch.machine_reasons("cpu", None) == expected


@pytest.mark.lanes("interpret")
def test_this_lane_is_interpreted() -> None:
    assert _dispatch.kernels_interpreted()


# ---- explain ----------------------------------------------------------------------------------


@EVERY_CPU_LANE
def test_explain_takes_a_function_or_its_name() -> None:
    for impl in ("auto", "triton", "torch"):
        reasons = explain(byte_pool, **arguments(), impl=impl)
        assert reasons == explain("byte_pool", **arguments(), impl=impl)
    positional = list(arguments().values())
    assert explain("byte_pool", *positional) == explain(byte_pool, **arguments())


def test_explain_gives_all_reasons(machine: list[str]) -> None:
    machine[:] = ["the machine is old"]
    given = {**arguments(), "weight": torch.ones(8, 4, dtype=torch.float64)}
    reasons = explain(byte_pool, **given, impl="torch")
    assert reasons[:2] == ["impl='torch' was asked for", "the machine is old"]
    assert "float64" in reasons[2]
    assert len(reasons) == 3


def test_explain_is_empty_where_a_kernel_would_run(machine: list[str]) -> None:
    assert explain(byte_pool, **arguments(), impl="triton") == []
    assert explain(byte_pool, **arguments()) == ["impl='auto' takes the torch path on cpu tensors"]


@pytest.mark.parametrize("name", ["no_such_op", "byte_pool.op", "", "os"])
def test_explain_knows_its_ops(name: str) -> None:
    with pytest.raises(ValueError, match=r"^explain: op: expected a public op, got "):
        explain(name)


def test_explain_binds_like_a_call() -> None:
    with pytest.raises(TypeError, match="cu_patchlens"):
        explain(byte_pool, arguments()["byte_ids"], arguments()["weight"])


@EVERY_CPU_LANE
@pytest.mark.parametrize("name", sorted(OPS))
def test_explain_agrees_with_every_op(name: str) -> None:
    """No reason against impl="triton": the call runs. A reason: the call is refused with it."""
    spec = OPS[name]
    inputs = spec.make_inputs(spec.tagged("smoke")[0], torch.float32, CPU, 0)
    reasons = explain(getattr(stlm_kernels, name), **spec.arguments(inputs), impl="triton")
    if not spec.kernels:
        assert _dispatch.NO_KERNEL in reasons
    if not reasons:
        spec.op(**inputs, impl="triton")
        return
    with pytest.raises(NotImplementedError) as refusal:
        spec.op(**inputs, impl="triton")
    assert str(refusal.value).endswith("; ".join(reasons))
