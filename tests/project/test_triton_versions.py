"""Code whose meaning changed between triton's releases: no kernel depends on it.

docs/versions.md says it in words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lanes import FP32, Way
from helpers.ops import require_grads, results, shrunk_cases, skip_unless_covered
from helpers.sources import SOURCES, jitted, name_of
from torch import Tensor

from stlm_kernels import inspect, unpool
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

Binary = Callable[[Any, Any], Any]

CHANGED = {
    "argmax": "3.8: NaN in the interpreter",
    "argmin": "3.8: NaN in the interpreter",
    "cat": "3.7, 3.9: order of elements, shapes it takes",
    "clamp": "3.8: NaN in the interpreter; 3.9: integers",
    "div_rn": "3.9: promotion of scalars",
    "dot_scaled": "3.8, 3.9: formats and scales",
    "fdiv": "3.8: ieee_rounding, ignored before",
    "flip": "3.9: dimensions it takes",
    "fma": "3.9: one rounding in the interpreter, promotion of scalars",
    "histogram": "3.9: values out of range in the interpreter, integers it takes",
    "make_tensor_descriptor": "3.7, 3.9: rounding to tf32, alignment it asks for",
    "softmax": "3.9: the axis is kept whatever keep_dims says",
    "sort": "3.9: the comparison in the interpreter, a single element",
    "squeeze": "3.9: negative dimensions",
    "topk": "3.8, 3.9: order, sizes it takes",
    "umulhi": "3.9: signed integers in the interpreter",
    "unsqueeze": "3.9: negative dimensions",
}
"""Name in triton.language -> the release that changed it, and what."""

KERNEL_SOURCES = [path for path in SOURCES if jitted(path)]
WITH_KERNELS = [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.kernels]
NARROW = re.compile(
    r"\b(arith\.(?:addf|subf|mulf|divf|remf|negf|cmpf|max\w*f|min\w*f)|math\.\w+)\b.*"
    r": (?:tensor<[\dx]+)?b?f16\b"
)
"""Arithmetic on 16-bit floats in triton's intermediate language."""


def names_out_of_tuples(function: ast.FunctionDef) -> Iterator[str]:
    """Names that hold elements of a tuple which a call returned."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    yield from map(ast.unparse, target.elts)


def objections(function: ast.FunctionDef) -> list[str]:
    """List what in a kernel means something else in another release."""
    found = []
    unpacked = set(names_out_of_tuples(function))
    for node in ast.walk(function):
        if isinstance(node, ast.Compare):
            is_identity = isinstance(node.ops[0], ast.Is | ast.IsNot)
            if is_identity and ast.unparse(node.left) in unpacked:
                found.append("None out of a returned tuple (3.6 returns none)")
            if len(node.ops) > 1:
                found.append("a chain of comparisons (3.9)")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
        if name == "umulhi" and all("tl.uint32" in ast.unparse(x) for x in node.args):
            continue
        if name in CHANGED:
            found.append(f"{name} ({CHANGED[name]})")
        if name in ("max", "min") and "return_indices" in keywords:
            found.append(f"{name} with indices ({CHANGED['argmax']})")
        if name == "load":
            if ("mask" in keywords or len(node.args) > 1) and "other" not in keywords:
                found.append("a masked load without other (3.8: undefined)")
            if len(node.args) > 3:
                found.append("options of load by place (3.9: by name)")
        if name == "store" and len(node.args) > 3:
            found.append("options of store by place (3.9: by name)")
    return found


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=name_of)
def test_kernels_use_nothing_that_changed(path: Path) -> None:
    for function in jitted(path):
        assert objections(function) == [], function.name


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("y = tl.argmax(x, 0)", "argmax"),
        ("y = x.sort()", "sort"),
        ("y = tl.umulhi(x, m)", "umulhi"),
        ("y = tl.umulhi(x.to(tl.uint32), m.to(tl.uint32))", ""),
        ("y, i = tl.max(x, 0, return_indices=True)", "max with indices"),
        ("y = tl.load(p, mask=m)", "without other"),
        ("y = tl.load(p, m)", "without other"),
        ("tl.store(p, x, m, (0,))", "by place"),
        ("y = 0 <= x < 3", "chain"),
        ("y, z = f(x)\n    w = x if z is None else z", "None out of a returned tuple"),
        ("y, z = f(x)\n    w = x if m is None else z", ""),
        ("y = tl.max(x, 0) + tl.load(p, mask=m, other=0.0) + tl.load(p)", ""),
    ],
)
def test_the_scan_finds_it(line: str, found: str) -> None:
    (function,) = ast.parse(f"def kernel(x, p, m):\n    {line}").body
    assert isinstance(function, ast.FunctionDef)
    seen = objections(function)
    assert len(seen) == bool(found)
    assert found in "".join(seen)


def run_with_nan(spec: OpSpec, case: Case, way: Way, rows: dict[str, int]) -> dict[str, Tensor]:
    """Results and gradients of a case with one NaN in each of these arguments, at a share of it."""
    inputs = spec.make_inputs(case, way.dtype, torch.device(way.device), 0)
    for name, share in rows.items():
        inputs[name] = inputs[name].clone()
        inputs[name].view(-1)[inputs[name].numel() * share // 8] = torch.nan
    inputs = require_grads(spec, inputs)
    found = results(spec.op(**inputs, impl="triton"))
    heads = [x for x in found.values() if x.requires_grad]
    if heads:
        torch.autograd.backward(heads, [torch.ones_like(x) for x in heads])
    grads = {name: inputs[name].grad for name in spec.grad_args if inputs.get(name) is not None}
    return {name: x.detach() for name, x in found.items()} | grads


def give(patch: pytest.MonkeyPatch, larger: Binary, smaller: Binary) -> list[str]:
    """Let tl.maximum and tl.minimum of the interpreter be these; notes the calls on floats."""
    from triton.runtime.interpreter import InterpreterBuilder

    called: list[str] = []

    def replace(name: str, function: Binary) -> None:
        def chosen(self: Any, a: Any, b: Any) -> Any:
            called.append(name)
            return self.binary_op(a, b, function)

        patch.setattr(InterpreterBuilder, name, chosen)

    replace("create_maxnumf", larger)
    replace("create_minnumf", smaller)
    return called


@pytest.mark.lanes("interpret")
@pytest.mark.one_dtype
@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_maximum_with_nan_may_be_either(
    spec: OpSpec, case: Case, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter's gave NaN up to 3.7; since 3.8 it gives the number, as GPUs do."""
    skip_unless_covered(spec, way)
    inputs = spec.make_inputs(case, FP32, torch.device("cpu"), 0)
    floats = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    # The others together, in rows of their own, so that a NaN does not hide another's.
    for names in (floats[:1], floats[1:]):
        rows = {name: 7 - 2 * i for i, name in enumerate(names)}
        called = give(monkeypatch, np.maximum, np.minimum)
        propagated = run_with_nan(spec, case, way, rows)
        if not called:
            return
        give(monkeypatch, np.fmax, np.fmin)
        dropped = run_with_nan(spec, case, way, rows)
        for name, x in propagated.items():
            assert torch.equal(x.isnan(), dropped[name].isnan()), name
            assert torch.equal(x.nan_to_num(), dropped[name].nan_to_num()), name


@pytest.mark.lanes("interpret")
def test_the_language_is_patched_for_a_launch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast_interpreter` patches once for each launch, of which one may fail."""
    import triton.language as tl
    from triton.runtime import interpreter

    x, read_ids = torch.randn(3, 4), torch.tensor([0, 2, 1], dtype=torch.int32)
    want = x[read_ids]
    seen: list[bool] = []
    load = interpreter.InterpreterBuilder.create_masked_load

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(tl.core.is_builtin(tl.load))
        if len(seen) == 2:
            raise ValueError("no second load")
        return load(self, *args, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", noted)
    with pytest.raises(interpreter.InterpreterError, match="no second load"):
        unpool(x, read_ids, impl="triton")
    assert tl.core.is_builtin(tl.load)
    assert torch.equal(unpool(x, read_ids, impl="triton"), want)
    assert tl.core.is_builtin(tl.load)
    assert len(seen) > 2
    assert not any(seen)


@pytest.mark.lanes("interpret")
@pytest.mark.parametrize(
    ("axis", "keep_dims", "reverse"),
    [(0, False, False), (1, True, False), (0, True, True), (1, False, True), (None, False, True)],
)
def test_functions_of_our_own_combine_in_order(
    axis: int | None, keep_dims: bool, reverse: bool
) -> None:
    """`fast_interpreter` combines many numbers at a time, where triton's takes one by one."""
    from helpers.combining import combined

    x = torch.randint(-3, 4, (8, 16)).float() * (torch.rand(8, 16) < 0.4)
    last, place, running = combined(x, axis, keep_dims, reverse)
    whole = x.flatten()[None] if axis is None else x.movedim(axis, -1)
    places = torch.arange(128).view(8, 16)
    places = places.flatten()[None] if axis is None else places.movedim(axis, -1)
    for i, (row, at) in enumerate(zip(whole, places, strict=True)):
        used = row.nonzero().flatten()
        where = int(used[-1]) if len(used) else 0
        assert (last[i], place[i]) == (row[where], at[where])
    along = running.movedim(axis or 0, -1)
    for row, found in zip(x.movedim(axis or 0, -1), along, strict=True):
        kept = torch.zeros(())
        for j in reversed(range(len(row))) if reverse else range(len(row)):
            kept = row[j] if row[j] else kept
            assert found[j] == kept


EXACT = dict.fromkeys(
    ("stlm_byte_pool_bwd", "stlm_byte_pool_fwd_product", "stlm_byte_pool_fwd_product_long"),
    "arith.subf",
)
"""Arithmetic on 16-bit floats that is exact, and so the same widened: 2^k + n less 2^k, n <= 32."""


@pytest.mark.lanes("aot")
@pytest.mark.parametrize("spec", WITH_KERNELS)
def test_no_arithmetic_on_16_bit_floats(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 sums, scans and compares bf16 as it is where earlier ones widened it."""
    seen: dict[str, str] = {}

    def keep(compiled: Any, *_: Any) -> None:
        seen[compiled.metadata.name] = compiled.asm["ttir"]

    monkeypatch.setattr(inspect, "_report", keep)
    for case in spec.tagged("aot"):
        inspect.inspect_op(spec, case, 90)
    assert {f"stlm_{name}" for name in spec.kernels} <= seen.keys()
    for name, text in seen.items():
        narrow = [line.strip() for line in text.splitlines() if NARROW.search(line)]
        narrow = [line for line in narrow if EXACT.get(name, "none") not in line]
        assert narrow == [], name


@pytest.mark.parametrize(
    ("line", "narrow"),
    [
        ("%4 = arith.addf %2, %3 : tensor<64x16xbf16> loc(#loc1)", True),
        ("%4 = arith.maxnumf %2, %3 : f16 loc(#loc1)", True),
        ("%4 = arith.cmpf une, %2, %3 : tensor<16xbf16>", True),
        ("%4 = math.exp2 %2 : tensor<16xf16>", True),
        ("%4 = arith.addf %2, %3 : tensor<64x16xf32>", False),
        ("%4 = arith.extf %2 : tensor<64x16xbf16> to tensor<64x16xf32>", False),
    ],
)
def test_the_pattern_finds_it(line: str, narrow: bool) -> None:
    assert bool(NARROW.search(line)) == narrow
