"""Faults planted in the PTX of matrix kernels and of the library's ops: what finds each of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ptx_launches import again, products, replaced
from torch import Tensor

from stlm_kernels import ptx
from stlm_kernels.ptx import Fault, launch
from stlm_kernels.ptx.faults import KINDS
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

pytestmark = pytest.mark.lanes("compiled")
REGISTER = r"(%r\d+)"
FOUR = ", ".join([REGISTER] * 4)
COPY = r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ )0"
PLANTED: dict[str, tuple[int, str, str, int, set[str]]] = {
    # Rows of the left operand have 64 bytes, of the right one 128, of the result's tile 512.
    "one copy to the next row": (80, COPY, r"\g<1>64", 1, {"async", "race", "unwritten"}),
    "copies to the next row": (80, COPY, r"\g<1>64", 99, {"outside", "unwritten"}),
    "copies to the row before": (80, COPY, r"\g<1>-64", 99, {"outside", "unwritten"}),
    "copies to the next row on sm_90": (90, COPY, r"\g<1>64", 99, {"outside", "unwritten"}),
    "left operand from the next row": (
        80, r"(ldmatrix\.sync\.aligned\.m8n8\.x4\.shared[^[]*\[%r\d+)\]", r"\1+64]", 1, set(),
    ),
    "right operand from the next row": (
        80, r"(ldmatrix\.sync\.aligned\.m8n8\.x4\.trans[^[]*\[%r\d+\+)8192", r"\g<1>8320", 1,
        {"async", "outside"},
    ),
    "descriptor of the next row": (
        90, r"(wgmma\.mma_async[^}]*\}, )(%rd\d+), ", r"add.s64 \2, \2, 4;\n\1\2, ", 1, {"async"},
    ),
    "swapped descriptors": (
        90, r"(wgmma\.mma_async[^;]*), (%rd\d+), (%rd\d+),", r"\1, \3, \2,", 1,
        {"async", "outside"},
    ),
    "result's tile stored to the next row": (
        80, r"(st\.shared\.v4\.b32 \[ %r\d+ \+ )0", r"\g<1>512", 1, {"race"},
    ),
    "result's tile loaded from the next row": (
        80, r"(ld\.shared\.v4\.b32[^[]*\[%r\d+)\]", r"\1+512]", 1, set(),
    ),
    "rows of the left fragment": (
        80, rf"(mma\.sync[^{{]*\{{[^}}]*\}}, \{{ ){REGISTER}, {REGISTER}", r"\1\3, \2", 1, set(),
    ),
    "halves of the left fragment": (
        80, rf"(mma\.sync[^{{]*\{{[^}}]*\}}, \{{ ){FOUR}", r"\1\4, \5, \2, \3", 1, set(),
    ),
    "right fragment": (
        80, rf"(mma\.sync[^{{]*\{{[^}}]*\}}, \{{[^}}]*\}}, \{{ ){REGISTER}, {REGISTER}",
        r"\1\3, \2", 1, set(),
    ),
    "rows of the sums": (
        80, rf"(mma\.sync[^{{]*\{{ ){FOUR} \}}, (\{{[^}}]*\}}, \{{[^}}]*\}}), \{{ {FOUR}",
        r"\1\4, \5, \2, \3 }, \6, { \2, \3, \4, \5", 1, set(),
    ),
    "columns of a warpgroup's sums": (
        90, rf"(wgmma\.mma_async[^{{]*\{{){REGISTER},{REGISTER}", r"\1\3,\2", 1, set(),
    ),
}  # fmt: skip
"""Architecture, pattern, replacement, times, and kinds of faults that must be among those found.

Values are wrong in all of them; in some nothing else is.
"""


@pytest.fixture(name="kernels")
def kernels_of_the_tests() -> Any:
    from helpers import ptx_kernels

    return ptx_kernels


@pytest.mark.parametrize("name", PLANTED)
def test_rows_and_fragments_of_matrices(kernels: Any, name: str) -> None:
    arch, pattern, new, count, kinds = PLANTED[name]
    done, out, want = products(kernels, arch)
    if not re.search(pattern, done.ptx):
        pytest.skip("this triton writes the product otherwise")
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)
    out.fill_(float("nan"))
    found = again(done, replaced(pattern, new, count=count), collect=KINDS).faults
    assert not torch.allclose(out, want, rtol=1e-3, atol=1e-2)
    assert kinds <= {fault.kind for fault in found}


STORE = r"(?m)^\s*(?:@!?%p\d+ )?st\.global[^;]*;"
SILENT = {"stlm_unpool_runs", "stlm_qkv_rope_bwd"}
"""Kernels whose result torch has filled, or multiplies: what they leave out is a wrong value."""


def results(spec: OpSpec, case: Case, backward: bool) -> list[Tensor]:
    """The op's results and gradients, which kernels have written whole."""
    inputs = spec.make_inputs(case, torch.bfloat16, torch.device("cpu"), 0)
    leaves = [inputs[name] for name in spec.grad_args if inputs.get(name) is not None]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    with ptx.executing(arch=90, collect=("lanes", "proxy")) as session:
        out = spec.op(**inputs, impl="triton")
        made = [out] if isinstance(out, Tensor) else list(out)
        if backward:
            roots = [x for x in made if x.requires_grad]
            upstream = [torch.ones_like(x) for x in roots]
            made += torch.autograd.grad(roots, leaves, upstream, allow_unused=True)
        made = [x.detach() for x in made if x is not None]
        session.assert_written(*made)
    return made


@pytest.mark.parametrize(
    ("name", "backward"),
    [
        ("byte_pool", True),
        ("segment_pool", True),
        ("unpool", True),
        ("qk_norm_rope", False),
        ("qkv_rope", True),
        ("swiglu", True),
    ],
)
def test_elements_that_are_never_stored(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each store of each kernel in turn is left out: whole rows, and those under a mask."""
    spec = OPS[name]
    # The second of swiglu has no norm: torch multiplies what is not written by the first one's.
    case = spec.tagged("smoke")[name == "swiglu"]
    want = results(spec, case, backward)
    execute, stores = launch.execute, {}

    def without(kernel: str, index: int) -> Callable[..., Any]:
        def run(text: str, *args: Any, **options: Any) -> Any:
            found = list(re.finditer(STORE, text))
            label = re.search(r"\.entry (\w+)", text)[1]
            # With one partial result the sum of splits has fewer stores than with two.
            stores[label] = max(len(found), stores.get(label, 0))
            if label == kernel and index < len(found):
                begin, end = found[index].span()
                text = text[:begin] + text[end:]
            return execute(text, *args, **options)

        return run

    monkeypatch.setattr(launch, "execute", without("", 0))
    results(spec, case, backward)
    assert stores
    for kernel, count in dict(stores).items():
        found = []
        for index in range(count):
            monkeypatch.setattr(launch, "execute", without(kernel, index))
            try:
                got = results(spec, case, backward)
            except (AssertionError, Fault) as error:
                found.append(error.kind if isinstance(error, Fault) else str(error))
                continue
            is_same = all(map(torch.equal, got, want))  # it stores nothing in this case
            assert is_same or kernel in SILENT, f"{kernel}: store {index}"
            found += [] if is_same else ["wrong"]
        assert found, kernel
        for text in found:
            assert text in ("unwritten", "wrong") or "elements were never written" in text
