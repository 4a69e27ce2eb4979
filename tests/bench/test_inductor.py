"""Kernels of torch.compile run here with right values and gradients, and are counted."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.ops import require_grads, run
from torch import Tensor

from bench.harness.counting import case_named, entries, line, measure
from bench.harness.inductor import compiled_here, inductor
from bench.harness.targets import Target
from bench.peers import PEERS
from stlm_kernels import ptx
from stlm_kernels.ptx.bounds import Device
from stlm_kernels.registry import OPS

pytestmark = [
    pytest.mark.lanes("compiled"),
    pytest.mark.filterwarnings("ignore:Could not find an active CPU backend"),
]
H200 = Device.load("h200")
BOTH = "F.rms_norm + F.linear + F.silu"
PEERS_OF = {
    "byte_pool": "embedding + index_add",
    "linear_cross_entropy": "F.linear + F.cross_entropy",
    "segment_pool": "scatter_reduce",
    "swiglu": BOTH,
    "unpool": "index_select + add",
}


@pytest.mark.parametrize("op", PEERS_OF)
def test_values_and_gradients_are_those_of_eager_mode(op: str) -> None:
    spec = OPS[op]
    peer = next(x for x in PEERS[op] if x.name == f"compiled {PEERS_OF[op]}")
    case = next(x for x in spec.tagged("smoke") if peer.unsupported(x) is None)
    inputs = spec.make_inputs(case, torch.float32, torch.device("cpu"), 0)
    converted = peer.convert(require_grads(spec, inputs))
    wanted = run(spec, peer.function, converted)
    with inductor(H200, sample=1), ptx.executing(arch=H200.arch, collect=["lanes"]) as session:
        found = run(spec, compiled_here(peer.function), converted)
    torch.testing.assert_close(found, wanted)
    assert any(done.kernel.startswith("triton_") for done in session.executions)


def test_what_is_tried_leaves_no_trace() -> None:
    """A kernel that writes in place has several configurations; one launch counts."""
    x, y = torch.randn(2, 2000).unbind()
    wanted, cache = x + y, os.environ.get("TRITON_CACHE_DIR")
    tried = []
    with inductor(H200), ptx.executing(arch=H200.arch, costs=True) as session:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        copies = CachingAutotuner.clone_args
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                CachingAutotuner, "clone_args",
                lambda tuner, *args: (tried.append(tuner), copies(tuner, *args))[1],
            )  # fmt: skip
            compiled_here(Tensor.add_)(x, y)
    torch.testing.assert_close(x, wanted, rtol=0, atol=0)
    assert len(tried) > 1
    assert len(session.executions) == 1
    assert session.torch_ops == []
    assert os.environ.get("TRITON_CACHE_DIR") == cache


def test_products_of_sampled_launches_are_not_computed() -> None:
    x, out = torch.ones(40, 40), torch.zeros(40, 40)
    with ptx.executing(costs=True, sample=2) as session:
        torch.mm(x, x, out=out)
    assert not out.any()
    assert [(op.name, op.flops, op.nbytes) for op in session.torch_ops] == [
        ("aten::mm", 2 * 40**3, 2 * 40 * 40 * 4)
    ]


def test_a_row_of_compiled_kernels() -> None:
    case = OPS["swiglu"].tagged("smoke")[0]
    ours, compiled = entries("swiglu", case)
    assert (ours.name, compiled.name) == ("stlm", f"compiled {BOTH}")
    found = measure(Target("swiglu", case.name, "both"), compiled, H200, H200.arch, 2)
    assert (found["kernels"], found["torch_ops"]) == (6, 6)
    names = set(found["bound_of"]) - {"aten::mm", "aten::addmm"}
    assert all(name.startswith("triton_") for name in names)
    assert found["faults"] == []
    assert f" both compiled {BOTH} " in line(found, {})


@pytest.mark.parametrize(
    ("op", "size", "names"),
    [
        ("segment_pool", "T300-P50-D48-mean-ragged", ["index_add", "scatter_reduce"]),
        ("attention", "B24-T512-H16-KV4-K32", []),
        ("linear_sample", "N64-D512-V256-k1-p0.9-tensor", ["top-k, top-p, exponentials"]),
    ],
)
def test_peers_that_have_rows(op: str, size: str, names: list[str]) -> None:
    """Rows leave out who cannot run the case and whom torch.compile leaves to one operator."""
    found = entries(op, case_named(OPS[op], size))
    assert [x.name for x in found if x.compiled] == [f"compiled {name}" for name in names]
