"""Argument checks: what passes, and the one message form (name, expected, got)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stlm_kernels import _checks, runtime
from stlm_kernels._torch.segments import clamped_bounds

CPU = torch.device("cpu")


def refused(call: Callable[[], Any], message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_require() -> None:
    _checks.require(True, "x", "y", "z")
    refused(lambda: _checks.require(False, "x", "y", "z"), "x: expected y, got z")


def test_require_choice() -> None:
    _checks.require_choice("mode", "sum", ("mean", "sum"))
    for value in ("max", None, 3):
        refused(
            lambda value=value: _checks.require_choice("mode", value, ("mean", "sum")),
            f"mode: expected one of 'mean', 'sum', got {value!r}",
        )


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True])
def test_require_int_at_least(value: Any) -> None:
    _checks.require_int_at_least("n", 1, 1)
    refused(
        lambda: _checks.require_int_at_least("n", value, 1),
        f"n: expected an int >= 1, got {value!r}",
    )


def test_require_tensor() -> None:
    x = torch.zeros(3, 4)
    floats = (torch.float32,)
    _checks.require_tensor("x", x, (3, 4), floats, CPU)
    _checks.require_tensor("x", x, ("T", "D"), floats)
    _checks.require_tensor("x", torch.zeros(0, 4), ("T", 4), floats)
    _checks.require_tensor("x", torch.nn.Parameter(x), ("T", 4), floats)
    for got, message in (
        (None, "x: expected a Tensor, got NoneType"),
        (x[0], "x: expected shape (T, 4), got (4,)"),
        (x.T, "x: expected shape (T, 4), got (4, 3)"),
        (x[None], "x: expected shape (T, 4), got (1, 3, 4)"),
        (x.double(), "x: expected dtype float32, got float64"),
        (x.to("meta"), "x: expected device cpu, got meta"),
    ):
        refused(lambda got=got: _checks.require_tensor("x", got, ("T", 4), floats, CPU), message)


def test_require_tensor_writes_one_dimensional_shapes_like_tuples() -> None:
    refused(
        lambda: _checks.require_tensor("gate", torch.zeros(()), ("P",), (torch.float32,)),
        "gate: expected shape (P,), got ()",
    )
    refused(
        lambda: _checks.require_tensor("x", int32(1), (1,), (torch.float32, torch.int64)),
        "x: expected dtype float32 or int64, got int32",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float32, torch.uint16])
def test_ids_have_four_dtypes(dtype: torch.dtype) -> None:
    for good in _checks.ID_DTYPES:
        _checks.require_ids("ids", torch.zeros(3, dtype=good), CPU)
    with pytest.raises(ValueError, match=r"^ids: expected dtype uint8 or int16 or int32 or int64"):
        _checks.require_ids("ids", torch.zeros(3).to(dtype))


def test_offsets() -> None:
    _checks.require_offsets("cu", int32(0), CPU)
    refused(
        lambda: _checks.require_offsets("cu", int32(), CPU),
        "cu: expected at least 1 entry, got 0 entries",
    )
    refused(
        lambda: _checks.require_offsets("cu", int32(0).long(), CPU),
        "cu: expected dtype int32, got int64",
    )


def test_weight_dtypes() -> None:
    assert set(_checks.weight_dtypes(torch.bfloat16)) == {torch.bfloat16, torch.float32}
    assert set(_checks.weight_dtypes(torch.float16)) == {torch.float16, torch.float32}
    assert _checks.weight_dtypes(torch.float32) == (torch.float32,)
    assert _checks.weight_dtypes(torch.float64) == (torch.float64,)


def test_dtypes_under_autocast() -> None:
    wide, double = torch.zeros(1), torch.zeros(1).double()
    assert runtime.compute_dtype(wide) == torch.float32
    assert runtime.activation_dtypes(wide) == (torch.float32,)
    with torch.autocast("cpu", dtype=torch.float16):
        assert runtime.compute_dtype(wide) == torch.float16
        assert runtime.compute_dtype(wide.bfloat16()) == torch.float16
        assert runtime.compute_dtype(double) == torch.float64
        assert set(runtime.activation_dtypes(wide)) == set(_checks.KERNEL_FLOATS)
        assert runtime.activation_dtypes(double) == (torch.float64,)
    with torch.autocast("cpu", dtype=torch.float16, enabled=False):
        assert runtime.compute_dtype(wide) == torch.float32


# ---- values -----------------------------------------------------------------------------------


def test_good_offset_values() -> None:
    for offsets in (int32(0), int32(0, 0), int32(0, 0, 4, 4, 7), int32(0, 9, 0, 9, 7, 9)[::2]):
        _checks.check_offset_values("cu", offsets, 7)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1], "cu: expected first entry 0, got 1"),
        ([-1, 0], "cu: expected first entry 0, got -1"),
        ([0, 3, 2, 1], "cu: expected non-decreasing entries, got 2 after 3 at position 2"),
        ([0, 5, 6, -(2**31)],
         "cu: expected non-decreasing entries, got -2147483648 after 6 at position 3"),
        ([0, -1], "cu: expected non-decreasing entries, got -1 after 0 at position 1"),
        ([0, 2, 8], "cu: expected last entry <= 7, got 8"),
    ],
)  # fmt: skip
def test_bad_offset_values(offsets: list[int], message: str) -> None:
    refused(lambda: _checks.check_offset_values("cu", int32(*offsets), 7), message)


def test_id_values() -> None:
    ids = torch.tensor([-1, 0, 5], dtype=torch.int16)
    _checks.check_id_values("ids", ids, -1, 6)
    refused(
        lambda: _checks.check_id_values("ids", ids, 0, 6),
        "ids: expected values in [0, 5], got -1 at position 0",
        IndexError,
    )
    refused(
        lambda: _checks.check_id_values("ids", ids, -1, 5),
        "ids: expected values in [-1, 4], got 5 at position 2",
        IndexError,
    )


def test_uint8_ids_are_looked_at_where_they_can_be_wrong() -> None:
    ids = torch.tensor([3, 200], dtype=torch.uint8)
    _checks.check_id_values("ids", ids, 0, 256)
    with pytest.raises(IndexError, match="got 200 at position 1"):
        _checks.check_id_values("ids", ids, 0, 200)
    with pytest.raises(IndexError, match="got 3 at position 0"):
        _checks.check_id_values("ids", ids, 4, 256)


def test_clamped_bounds() -> None:
    for offsets, want in (
        ([0, 3, 7], [0, 3, 7]),
        ([-5, 3, 99], [0, 3, 7]),
        ([0, 5, 2, 6], [0, 5, 5, 6]),
        ([9, 2**31 - 1, -(2**31)], [7, 7, 7]),
    ):
        got = clamped_bounds(int32(*offsets), 7)
        assert got.dtype == torch.int32
        assert got.tolist() == want


# ---- where values may be looked at ------------------------------------------------------------


def seen_inside(transform: Callable[..., Any]) -> bool:
    seen: list[bool] = []
    ids = torch.tensor([1])

    def fn(x: Tensor) -> Tensor:
        seen.append(runtime.values_visible(ids))
        return x.square().sum()

    transform(fn)(torch.ones(2, 2))
    return any(seen)


def test_values_are_visible_on_plain_cpu_tensors() -> None:
    ids = torch.tensor([1])
    assert runtime.values_visible(ids, torch.nn.Parameter(torch.ones(1)))
    assert not runtime.values_visible(ids, ids.to("meta"))
    assert seen_inside(lambda fn: fn)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_values_are_not_looked_at_inside_torch_func(transform: Callable[..., Any]) -> None:
    """Not even those of plain tensors: the transforms promise one program for all values."""
    assert not seen_inside(transform)
    assert not runtime.inside_torch_func()


def test_values_are_not_looked_at_while_compiling() -> None:
    def fn(ids: Tensor) -> Tensor:
        return ids + (1 if runtime.values_visible(ids) else 2)

    torch._dynamo.reset()
    ids = torch.tensor([10])
    assert torch.compile(fn, backend="eager", fullgraph=True)(ids).tolist() == [12]
    assert fn(ids).tolist() == [11]


def test_values_of_subclasses_are_not_looked_at() -> None:
    class Wrapped(Tensor):
        pass

    assert not runtime.values_visible(torch.tensor([1]).as_subclass(Wrapped))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert not runtime.values_visible(torch.empty(3))


@pytest.mark.lanes("gpu")
def test_values_on_a_gpu_are_not_looked_at() -> None:
    assert not runtime.values_visible(torch.ones(1, device="cuda"))


class CountedCheck:
    """A check that is made once for a signature."""

    def __init__(self) -> None:
        self.calls = 0
        self.check = _checks.once_per_signature(self._check)

    def _check(self, x: Any, option: Any) -> tuple[Any, ...]:
        self.calls += 1
        _checks.require_tensor("x", x, ("N", 4), (torch.float32,))
        return tuple(x.shape), option


def test_a_signature_is_checked_once() -> None:
    counted = CountedCheck()
    for _ in range(3):
        assert counted.check(torch.zeros(2, 4), 1.5) == ((2, 4), 1.5)
    assert counted.check(torch.nn.Parameter(torch.zeros(2, 4)), 1.5) == ((2, 4), 1.5)
    assert counted.calls == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3, 4), 1),
        (torch.zeros(2, 4, device="meta"), 1),
        (torch.zeros(2, 4), True),
        (torch.zeros(2, 4), 1.0),
        (torch.zeros(2, 4), None),
        (torch.zeros(2, 4), [1]),
    ],
    ids=str,
)
def test_another_signature_is_checked(other: tuple[Any, Any]) -> None:
    counted = CountedCheck()
    counted.check(torch.zeros(2, 4), 1)
    assert counted.check(*other)[1] is other[1]
    assert counted.calls == 2


@pytest.mark.parametrize("bad", [torch.zeros(2, 5), torch.zeros(2, 4).double(), torch.zeros(4)])
def test_a_refusal_is_not_kept(bad: Tensor) -> None:
    counted = CountedCheck()
    counted.check(torch.zeros(2, 4), 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="x: expected"):
            counted.check(bad, 1)
    assert counted.calls == 3


def test_a_signature_knows_of_autocast() -> None:
    counted = CountedCheck()
    counted.check(torch.zeros(2, 4), 1)
    with torch.autocast("cpu", torch.bfloat16):
        counted.check(torch.zeros(2, 4), 1)
    assert counted.calls == 2


def test_signatures_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "MOST_SIGNATURES", 2)
    counted = CountedCheck()
    for rows in (1, 2, 3, 3, 1):
        counted.check(torch.zeros(rows, 4), 1)
    assert counted.calls == 4
