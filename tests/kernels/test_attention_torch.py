"""The torch path of attention: full attention, softcap, dropout, blocks, memory, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.attention import assert_close_to_reference, example
from helpers.lanes import Way
from helpers.ops import LargestTensor
from helpers.tensors import ints
from torch import Tensor

from stlm_kernels import attention, patch_attention
from stlm_kernels._torch import attention_blocks
from stlm_kernels.ops.attention import banded, documents, sight
from stlm_kernels.ops.attention.reference import reference

CPU = Way("torch", "cpu", torch.float32)
BOUNDARIES = ints(0, 6, 6, 9)


OPTIONS = [
    {"causal": False},
    {"causal": False, "cu_seqlens": ints(0, 3, 3, 20, 33)},
    {"softcap": 2.0},
    {"softcap": 0.5, "window": 7, "cu_seqlens": ints(0, 3, 3, 20, 33)},
    {"causal": False, "softcap": 3.0, "scale": -0.4},
]


@pytest.mark.lanes("cpu", "gpu")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(way: Way, options: dict[str, Any]) -> None:
    if way.impl != "torch":
        pytest.skip("the torch path's own")
    assert_close_to_reference(example((40,), 4, 2, 24, way), way, **options)


def test_full_attention_of_documents_is_patch_attention() -> None:
    operands = example((40,), 2, 1, 16, CPU)
    out = attention(*operands, causal=False, cu_seqlens=BOUNDARIES)
    torch.testing.assert_close(out, patch_attention(*operands, BOUNDARIES))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 4, "cu_seqlens": ints(0, 2, 2, 8)},
        {"cu_seqlens": ints(0, 2, 2, 8)},
        *OPTIONS[:3],
    ],
    ids=str,
)
def test_derivatives(options: dict[str, Any]) -> None:
    if "cu_seqlens" in options:
        options = {**options, "cu_seqlens": ints(0, 2, 2, 8)}
    way = Way("torch", "cpu", torch.float64)
    operands = [x.requires_grad_() for x in example((9,), 2, 1, 3, way)]

    def attend(*operands: Tensor) -> Tensor:
        return attention(*operands, **options)

    assert torch.autograd.gradcheck(attend, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, operands, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("length", [1, 2, 9, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_a_query_of_nan_shows(length: int, packed: bool) -> None:
    """Torch's flash attention for CPUs gives zeros there for less than 16 keys."""
    q, k, v = example((length,), 2, 1, 16, CPU)
    q[-1, 1, 3] = torch.nan
    boundaries = ints(0, length)
    documents = {"cu_seqlens": boundaries} if packed else {}
    for causal in (False, True):
        assert attention(q, k, v, causal=causal, **documents)[-1, 1].isnan().all()
        assert patch_attention(q, k, v, boundaries, causal=causal)[-1, 1].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
def test_documents_without_the_flash_attention_of_cpus(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single ones, batches of one length, batches of several lengths: the way of other devices."""
    monkeypatch.setattr(documents, "_has_flash", lambda x: False)
    boundaries = ints(0, 3, 3, 70, 110, 150, 160, 169, 200)
    operands = example((210,), 4, 2, 8, CPU)
    assert_close_to_reference(operands, CPU, cu_seqlens=boundaries, causal=causal)
    plain = attention(*operands, cu_seqlens=boundaries, causal=causal)
    want = reference(*[x.double() for x in operands], cu_seqlens=boundaries, causal=causal)
    torch.testing.assert_close(plain.double(), want, rtol=1e-5, atol=1e-5)


def weights_of(p: float, total: int = 60, **options: Any) -> Tensor:
    """(H, T, T): with an identity for values, the output is the weights."""
    q, k, _ = example((total,), 2, 1, total, CPU)
    v = torch.eye(total)[:, None]
    return attention(q, k, v, dropout_p=p, **options).transpose(0, 1)


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    kept, dropped = weights_of(0.0), weights_of(0.3)
    seen = kept > 0
    share = (dropped[seen] == 0).double().mean()
    assert abs(float(share) - 0.3) < 5 * (0.3 * 0.7 / int(seen.sum())) ** 0.5
    alive = dropped > 0
    torch.testing.assert_close(dropped[alive], kept[alive] / 0.7)
    assert not torch.equal(alive[0], alive[1])  # heads differ
    assert not torch.equal(dropped, weights_of(0.3))  # so do calls
    assert (weights_of(1.0) == 0).all()
    torch.manual_seed(3)
    first = weights_of(0.3)
    torch.manual_seed(3)
    assert torch.equal(first, weights_of(0.3))


def test_dropout_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    before = weights_of(0.5, window=50)
    monkeypatch.setattr(sight, "LEAST_BLOCK", 5)
    monkeypatch.setattr(sight, "LEAST_ROWS", 5)
    monkeypatch.setattr(attention_blocks, "BLOCK_SCORES", 1)
    torch.manual_seed(3)
    torch.testing.assert_close(before, weights_of(0.5, window=50))


@pytest.mark.parametrize("options", [{}, {"window": 3, "cu_seqlens": ints(0, 2, 2, 8)}], ids=str)
def test_the_backward_of_dropout_drops_the_same(options: dict[str, Any]) -> None:
    way = Way("torch", "cpu", torch.float64)
    operands = [x.requires_grad_() for x in example((9,), 2, 1, 3, way)]

    def attend(*operands: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attention(*operands, dropout_p=0.4, softcap=2.0, **options)

    assert torch.autograd.gradcheck(attend, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, operands, atol=1e-4, fast_mode=True)


# ---- the torch path's ways --------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 40, 3000])
@pytest.mark.parametrize("options", [{"window": 7}, {"softcap": 5.0}, {"window": 30}], ids=str)
def test_blocks_of_any_size(
    budget: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_blocks, "BLOCK_SCORES", budget)
    monkeypatch.setattr(sight, "LEAST_ROWS", 3)
    monkeypatch.setattr(sight, "LEAST_BLOCK", 10)
    boundaries = ints(0, 3, 4, 4, 41, 44, 80)
    assert_close_to_reference(example((90,), 2, 1, 16, CPU), CPU, cu_seqlens=boundaries, **options)


def scores_formed(total: int, **options: Any) -> int:
    q = torch.empty(1, total, 8, 64, device="cpu")
    window = options.get("window")
    given = sight.Options(None if window is None else window - 1, 0, 1.0, None, 0.0)
    boundaries, count = sight.Boundaries(options.get("cu_seqlens"), None), 0
    for block in sight.cutter(q, q, boundaries, given)(False):
        size = 8 * attention_blocks.length_of(block.rows) * attention_blocks.length_of(block.keys)
        assert size <= 2 * attention_blocks.BLOCK_SCORES
        count += size
    return count


def test_the_work_of_a_window_grows_with_the_window() -> None:
    """65,536 rows and a window of 512: no block is large, and few scores are for nothing."""
    assert scores_formed(65_536, window=512) <= 3 * 8 * 65_536 * 512
    assert scores_formed(65_536, window=16) <= 8 * 65_536 * (64 + 16)
    even = torch.arange(0, 65_537, 256, dtype=torch.int32)
    assert scores_formed(65_536, cu_seqlens=even) <= 2 * 8 * 65_536 * 256


@pytest.mark.parametrize(("window", "entries"), [(2, 1), (34, 1), (66, 20_000)])
def test_windows_in_blocks_and_calls(
    window: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that just reach another block; several calls, the last one shorter."""
    monkeypatch.setattr(banded, "MASK_ENTRIES", entries)
    monkeypatch.setattr(banded, "LEAST_RUN", 1)
    boundaries = ints(0, 3, 3, 110, 147)
    documents = sight.Boundaries(boundaries, None)
    options = sight.Options(window - 1, 0, 1.0, None, 0.0)
    q = torch.empty(1, 150, 4, 8)
    cut = banded.Bands.short(150, window - 1, 0, 2)
    runs = list(cut.runs(sight.sight_of(q, q, documents, options)))
    assert len(runs) > 1
    assert any(run.whole for run in runs) == (window < 66)
    assert [run.first for run in runs] == [0, *(run.last for run in runs[:-1])]
    assert runs[-1].last == cut.blocks == 5
    assert_close_to_reference(
        example((150,), 4, 2, 8, CPU), CPU, window=window, cu_seqlens=boundaries
    )


@pytest.mark.parametrize(("total", "window"), [(16_384, 512), (8192, 4096)])
def test_blocks_of_a_window_form_nothing_large(total: int, window: int) -> None:
    operands = [torch.randn(1, total, 1, 8, requires_grad=True) for _ in range(3)]
    with LargestTensor() as largest:
        out = attention(*operands, window=window)
        torch.autograd.grad(out.sum(), operands)
    one_block = banded.MOST_ROWS * (window + banded.MOST_ROWS)
    assert largest.elements <= max(banded.MASK_ENTRIES, one_block)


def test_long_windows_fit_in_a_gibibyte(full: bool) -> None:
    if not full:
        pytest.skip("takes a minute")
    import resource

    operands = [torch.randn(1, 65_536, 8, 64, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(1, 65_536, 8, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grads = torch.autograd.grad(attention(*operands, window=512), operands, upstream)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert all(x.isfinite().all() for x in grads)
    assert extra < 1.0, f"{extra:.2f} GiB"


@pytest.mark.parametrize(
    ("options", "boundaries"),
    [
        ({"window": 9}, (0, 25, 13, 39)),
        ({}, (-4, 12, 99)),
        ({"causal": False, "softcap": 2.0}, (0, 10, 30)),
    ],
    ids=str,
)
def test_compiled_documents(options: dict[str, Any], boundaries: tuple[int, ...]) -> None:
    """Offsets are not looked at there: clamped, and a torch path of static shape."""
    meaning = {39: (0, 25, 25, 36), 99: (0, 12, 36), 30: (0, 10, 30)}[boundaries[-1]]
    operands = [x.requires_grad_() for x in example((36,), 2, 1, 16, CPU)]
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = compiled(*operands, cu_seqlens=ints(*boundaries), **options)
    want = reference(*[x.double() for x in operands], cu_seqlens=ints(*meaning), **options)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, operands, upstream)
    wanted = torch.autograd.grad(want, operands, upstream.double())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dense_calls_get_sdpa_of_torch() -> None:
    q, k, v = example((2, 33), 4, 2, 24, CPU)
    baseline = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert torch.equal(attention(q, k, v), baseline.transpose(1, 2))
