"""The registered ops `torch.ops.stlm.*`: opcheck, export, FLOPs, checkpointing.

These run on kernels, so in the interpreter lane or on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.ops import (
    inputs_of,
    map_tensors,
    op_cases,
    run,
    shrunk,
    shrunk_cases,
    skip_unless_covered,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from stlm_kernels._library import NAMESPACE
from stlm_kernels.spec import Case, OpSpec

pytestmark = [pytest.mark.lanes("interpret", "gpu"), pytest.mark.one_dtype]


class Calls(TorchDispatchMode):
    """Records the calls of registered ops with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("spec", "case"), op_cases("smoke"))
def test_opcheck(spec: OpSpec, case: Case, way: Way, full: bool) -> None:
    """Schema, Meta kernel and functionalisation of each pass, on the arguments it really gets."""
    skip_unless_covered(spec, way)
    if case is not spec.tagged("smoke")[0] and not full:
        pytest.skip("one case shows the schema: --full has the others")
    calls = Calls()
    with calls:
        run(spec, spec.op, inputs_of(spec, shrunk(case), way), impl="triton")
    assert len(calls.seen) >= (2 if spec.grad_args else 1)
    for op, args in calls.seen:
        detached = tree_map_only(Tensor, Tensor.detach, args)
        torch.library.opcheck(op, detached)


@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_export_shows_the_op(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_covered(spec, way)
    inputs = map_tensors(inputs_of(spec, case, way), lambda x: x.detach())
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    options = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}

    class Module(torch.nn.Module):
        def forward(self, **given: Tensor) -> Any:
            return spec.op(**given, **options, impl="triton")

    program = torch.export.export(Module(), (), tensors)
    names = [str(node.target) for node in program.graph.nodes]
    assert any(name.startswith(f"{NAMESPACE}.{spec.name}_fwd") for name in names)
    torch.testing.assert_close(
        program.module()(**tensors), spec.op(**inputs, impl="triton"), rtol=0, atol=0
    )


@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_flops_are_counted(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_covered(spec, way, grad=True)
    with FlopCounterMode(display=False) as counter:
        run(spec, spec.op, inputs_of(spec, case, way), impl="triton")
    counted = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert any(f"{spec.name}_fwd" in name for name in counted)
    assert any(f"{spec.name}_bwd" in name for name in counted)


@pytest.mark.parametrize(("spec", "case"), shrunk_cases())
def test_selective_checkpointing_can_save_the_op(spec: OpSpec, case: Case, way: Way) -> None:
    """A policy that saves the op's result runs its forward once; plain checkpointing twice."""
    skip_unless_covered(spec, way, grad=True)
    inputs = inputs_of(spec, case, way)
    leaf = inputs[spec.grad_args[0]]

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = getattr(func, "namespace", "") == NAMESPACE
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x: Tensor) -> Tensor:
        out = spec.op(**{**inputs, spec.grad_args[0]: x}, impl="triton")
        return (out if isinstance(out, Tensor) else out[0]).square()

    def forward_calls(**options: Any) -> int:
        calls = Calls()
        with calls:
            checkpoint(block, leaf, use_reentrant=False, **options).sum().backward()
        return sum("_fwd" in str(op) for op, _ in calls.seen)

    contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}
    assert forward_calls(**contexts) < forward_calls()
