"""The trainer's step through torch.compile: one graph, whatever a batch holds."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from helpers.small_training import CORPUS, SMALL
from torch._dynamo.testing import CompileCounterWithBackend

from stlm_kernels.registry import OPS
from stlm_models import BytePatcher
from stlm_models.training.trainer import Trainer, TrainOptions


@pytest.fixture(name="variants")
def compiled_variants(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts the graphs that torch.compile makes; a break in one is an error."""
    counter = CompileCounterWithBackend("eager")
    torch_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: torch_compile(model, backend=counter, fullgraph=True)
    )
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def losses(
    steps: int, *, compile: bool, patcher: BytePatcher | None = None
) -> tuple[list[float], set[tuple[int, int]]]:
    """Losses of some steps, and the lengths of their offsets of documents and patches."""
    options = TrainOptions(steps=steps, batch_size=2, compile=compile)
    trainer = Trainer(SMALL, CORPUS, options, patcher=patcher)
    batches = [trainer.windows.batch(step) for step in range(steps)]
    shapes = {(len(x.cu_seqlens), len(x.patches.cu_patchlens)) for x in batches if x.patches}
    found: list[float] = []
    trainer.run(lambda result: found.append(float(result.loss)))
    return found, shapes


def test_a_capacity_makes_one_variant(variants: CompileCounterWithBackend) -> None:
    patcher = BytePatcher("space", max_patch_len=5, max_patches=40)
    found, shapes = losses(3, compile=True, patcher=patcher)
    assert len(shapes) == 1
    assert variants.frame_count == 1
    # Not closer: Muon's iterations make more of the order of a sum.
    assert found == pytest.approx(losses(3, compile=False, patcher=patcher)[0], rel=1e-4)


@pytest.mark.lanes("interpret", "gpu")
def test_kernels_need_one_variant_for_all_numbers_of_patches_and_documents(
    variants: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in OPS:
        module = importlib.import_module(f"stlm_kernels.ops.{name}.op")
        if hasattr(module, "use_triton") and name != "find_patches":
            monkeypatch.setattr(module, "use_triton", lambda *args, **options: True)
    _, shapes = losses(2, compile=True)
    assert len({boundaries for boundaries, _ in shapes}) > 1
    assert len({offsets for _, offsets in shapes}) > 1
    assert variants.frame_count == 1
