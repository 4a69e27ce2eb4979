"""Error messages of every op begin with its name, and hint at the usual mistakes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import stlm_kernels
from stlm_kernels import _dispatch
from stlm_kernels._errors import named_errors
from stlm_kernels.registry import OPS

CPU = torch.device("cpu")
HEADS_FIRST = "these shapes fit with heads before positions"
SWAPPED = "these shapes fit with the first two arguments swapped"


def public(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(stlm_kernels, name)
    return op


def valid_calls(name: str) -> list[dict[str, Any]]:
    """The arguments of every smoke case."""
    spec = OPS[name]
    return [
        spec.arguments(spec.make_inputs(case, torch.float32, CPU, 0))
        for case in spec.tagged("smoke")
    ]


def message_of(kind: type[Exception], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as refusal:
        call(*args, **kwargs)
    return str(refusal.value)


def parameters() -> list[Any]:
    return [
        pytest.param(name, parameter, id=f"{name}-{parameter}")
        for name in OPS
        for parameter in inspect.signature(public(name)).parameters
    ]


@pytest.mark.parametrize(("name", "parameter"), parameters())
def test_every_argument_of_another_type(name: str, parameter: str) -> None:
    for arguments in valid_calls(name):
        message = message_of(ValueError, public(name), **arguments | {parameter: object()})
        assert re.match(rf"{name}: [^:]*\b{parameter}\b[^:]*: expected ", message), message


@pytest.mark.parametrize("name", OPS)
def test_every_tensor_of_another_dtype_shape_or_device(name: str) -> None:
    changed = 0
    for arguments in valid_calls(name):
        for parameter, value in arguments.items():
            if not isinstance(value, Tensor):
                continue
            for bad in (value.to(torch.complex64), value[..., None, None, None], value.to("meta")):
                given = arguments | {parameter: bad}
                if bad.is_meta and len([x for x in given.values() if isinstance(x, Tensor)]) == 1:
                    continue  # nothing else says where the tensors should be
                message = message_of(ValueError, public(name), **given)
                assert re.match(rf"{name}: \w+(\[\d\])?: expected ", message), message
                changed += 1
    assert changed


BAD_VALUES = {
    "byte_pool": ("byte_ids", 9999),
    "find_patches": ("byte_ids", -1),
    "unpool": ("read_ids", 9999),
    "ema_unpool": ("read_ids", -2),
    "ngram_embedding": ("byte_ids", -1),
    "linear_logprobs": ("target", 9999),
    "linear_cross_entropy": ("target", -1),
    "qk_norm_rope": ("positions", 9999),
    "qkv_rope": ("positions", 9999),
    "decode_attention": ("cache_lens", 9999),
}
"""Integers out of range, for each op that takes some."""


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_out_of_range(name: str) -> None:
    parameter, value = BAD_VALUES[name]
    tried = 0
    for arguments in valid_calls(name):
        integers = arguments.get(parameter)
        if integers is None or (name == "find_patches" and arguments.get("rule") != "space"):
            continue  # the other rules read no ids
        given = arguments | {parameter: torch.full_like(integers, value, dtype=torch.int32)}
        message = message_of(IndexError, public(name), **given)
        assert message.startswith(f"{name}: {parameter}: expected values "), message
        tried += 1
    assert tried


@pytest.mark.parametrize("name", OPS)
def test_arguments_that_do_not_fit_the_signature(name: str) -> None:
    arguments = valid_calls(name)[0]
    for args, kwargs in (((), {}), ((), arguments | {"no_such_argument": 1}), ([1] * 40, {})):
        message = message_of(TypeError, public(name), *args, **kwargs)
        assert message.startswith(f"{name}() "), message


@pytest.mark.parametrize("name", OPS)
def test_a_refused_implementation(name: str) -> None:
    for arguments in valid_calls(name):
        message = message_of(NotImplementedError, public(name), **arguments, impl="triton")
        assert message.startswith(f"{name}: impl='triton' cannot run this call: "), message


@pytest.mark.parametrize("name", OPS)
def test_signatures_and_docstrings_are_the_ops_own(name: str) -> None:
    op = public(name)
    assert op.__name__ == name
    assert op.__module__ == f"stlm_kernels.ops.{name}.op"
    assert "impl" in inspect.signature(op).parameters
    assert "Raises:" in (op.__doc__ or "")


def test_explain() -> None:
    assert message_of(ValueError, stlm_kernels.explain, "os").startswith("explain: op: ")
    message = message_of(TypeError, stlm_kernels.explain, "byte_pool")
    assert message.startswith("explain: missing a required argument"), message


# ---- the decorator ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, IndexError, TypeError, NotImplementedError])
def test_a_message_is_extended_in_place(kind: type[Exception]) -> None:
    """The error keeps its type and the traceback to the line that raised it."""

    @named_errors
    def some_op(x: int) -> None:
        raise kind(f"x: expected 1, got {x}")

    with pytest.raises(kind) as refusal:
        some_op(2)
    assert str(refusal.value) == "some_op: x: expected 1, got 2"
    assert refusal.traceback[-1].name == "some_op"


def test_other_errors_are_left_alone() -> None:
    @named_errors
    def some_op() -> None:
        raise AssertionError("this is a bug")

    assert message_of(AssertionError, some_op) == "this is a bug"


def test_a_compiled_call_raises_the_same_message() -> None:
    op = torch.compile(stlm_kernels.byte_pool, backend="eager")
    cu_patchlens = torch.tensor([0, 2], dtype=torch.int32)
    torch._dynamo.reset()
    message = message_of(ValueError, op, torch.zeros(2), torch.zeros(4, 4), cu_patchlens)
    assert message.startswith("byte_pool: byte_ids: expected dtype uint8")


@pytest.mark.parametrize("name", [name for name, spec in OPS.items() if spec.kernels])
def test_the_warning_of_an_op_points_at_its_caller(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "machine_reasons", lambda kind, index: ["the machine is old"])
    monkeypatch.setattr(_dispatch, "_warned", set())

    use_triton = _dispatch.use_triton

    def on_cuda(op: str, impl: Any, device: Any, *rest: Any, **arguments: Any) -> bool:
        return use_triton(op, impl, torch.device("cuda"), *rest, **arguments)

    for path, module in list(sys.modules.items()):
        if path.startswith("stlm_kernels.") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", on_cuda)
    # In 16 bits, which no op leaves to torch by choice.
    warned = pytest.warns(RuntimeWarning, match=f"^{name}: ")
    with torch.autocast("cpu", torch.bfloat16), warned as seen:
        public(name)(**valid_calls(name)[0])
    assert seen[0].filename == __file__


# ---- hints ------------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_order_of_liger() -> None:
    """LigerFusedLinearCrossEntropyLoss takes (weight, hidden, target)."""
    weight, hidden, target = zeros(256, 16), zeros(6, 16), torch.zeros(6, dtype=torch.int64)
    for op in (stlm_kernels.linear_cross_entropy, stlm_kernels.linear_logprobs):
        for rows in ((6,), (2, 3)):
            message = message_of(ValueError, op, weight, hidden.view(*rows, 16), target.view(rows))
            assert message.startswith(f"{op.__name__}: "), message
            assert SWAPPED in message
        named = {"input": weight, "linear_weight": hidden, "target": target, "impl": "triton"}
        assert SWAPPED in message_of(ValueError, op, **named)
    teacher = zeros(6, 256)
    assert SWAPPED in message_of(ValueError, stlm_kernels.linear_kl_div, weight, hidden, teacher)
    states = hidden.view(2, 3, 16)
    assert SWAPPED in message_of(ValueError, stlm_kernels.linear_sample, weight, states)


def heads_first_calls() -> dict[str, Callable[[], Any]]:
    """Calls with (B, H, T, K), as SDPA and transformers have it, that the shapes give away."""
    cos = zeros(5, 4)
    return {
        "attention-grouped": lambda: stlm_kernels.attention(
            zeros(2, 6, 5, 8), zeros(2, 2, 5, 8), zeros(2, 2, 5, 8)
        ),
        "attention-one-query": lambda: stlm_kernels.attention(
            zeros(2, 6, 1, 8), zeros(2, 6, 5, 8), zeros(2, 6, 5, 8)
        ),
        "attention-packed": lambda: stlm_kernels.attention(
            q=zeros(6, 5, 8), k=zeros(2, 5, 8), v=zeros(2, 5, 8), cu_seqlens=offsets(0, 2, 5)
        ),
        "patch_attention": lambda: stlm_kernels.patch_attention(
            zeros(6, 5, 8), zeros(2, 5, 8), zeros(2, 5, 8), offsets(0, 2, 5)
        ),
        "qk_norm_rope-grouped": lambda: stlm_kernels.qk_norm_rope(
            zeros(2, 6, 5, 8), zeros(2, 2, 5, 8), cos, cos
        ),
        "qk_norm_rope-table": lambda: stlm_kernels.qk_norm_rope(
            zeros(2, 6, 5, 8), zeros(2, 6, 5, 8), cos, cos
        ),
        "qk_norm_rope-positions": lambda: stlm_kernels.qk_norm_rope(
            zeros(2, 4, 5, 8), zeros(2, 4, 5, 8), cos, cos,
            positions=torch.zeros(2, 5, dtype=torch.int64),
        ),
        "decode_attention": lambda: stlm_kernels.decode_attention(
            zeros(2, 6, 8), zeros(2, 3, 5, 8), zeros(2, 3, 5, 8), offsets(5, 1)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", heads_first_calls())
def test_heads_before_positions(name: str) -> None:
    message = message_of(ValueError, heads_first_calls()[name])
    assert message.startswith(name.split("-")[0] + ": "), message
    assert HEADS_FIRST in message


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensors_that_no_hint_can_be_tried_on_keep_their_message() -> None:
    """Quantized tensors have no meta device, and nested ones have dimensions that cannot move."""
    quantized = torch.quantize_per_tensor(torch.randn(4, 16), 0.1, 0, torch.quint8)
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: input: expected dtype"):
        stlm_kernels.linear_cross_entropy(quantized, torch.randn(9, 16), torch.zeros(4).long())
    rows = [torch.randn(length, 4, 16, 16) for length in (2, 3)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"^attention: q: expected shape"):
        stlm_kernels.attention(nested, nested, nested)


def test_no_hint_where_it_would_not_help() -> None:
    q, k = zeros(2, 5, 6, 8), zeros(2, 5, 2, 8)
    weight, states = zeros(256, 16), zeros(6, 16)
    target = torch.zeros(6, dtype=torch.int64)
    for call in (
        lambda: stlm_kernels.attention(q, k, k, softcap=-1.0),
        lambda: stlm_kernels.attention(q, zeros(2, 5, 4, 8), zeros(2, 5, 4, 8)),
        lambda: stlm_kernels.attention(zeros(6, 5, 8), zeros(2, 5, 8), zeros(2, 5, 8), window=0),
        lambda: stlm_kernels.attention(q[0], q[0], q[0], cu_seqlens=offsets(0, 9)),
        lambda: stlm_kernels.attention(q, k, None),  # type: ignore[arg-type]
        lambda: stlm_kernels.linear_cross_entropy(states, weight, target[:4]),
        lambda: stlm_kernels.linear_cross_entropy(weight, states, target[:4]),
        lambda: stlm_kernels.linear_cross_entropy(states, weight, target, reduction="all"),
    ):
        assert "these shapes fit" not in message_of(ValueError, call)


def test_valid_calls_that_look_swapped_run() -> None:
    """Equal counts, of heads and key heads or rows and columns, are what they say they are."""
    x = zeros(2, 6, 5, 8)
    assert stlm_kernels.attention(x, x, x).shape == x.shape
    square = zeros(6, 16)
    loss = stlm_kernels.linear_cross_entropy(square, square, torch.zeros(6, dtype=torch.int64))
    assert loss.isfinite()
