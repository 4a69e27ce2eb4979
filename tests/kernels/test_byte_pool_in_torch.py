"""byte_pool under autocast, compilers, vmap, and on CUDA streams and graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.byte_pool import (
    ON_CPU,
    ON_GPU,
    RESULT_LANES,
    assert_same,
    interpreted,
    looped,
    pool_inputs,
    upstream_for,
    with_gradients,
)
from helpers.lanes import BF16, FP16, FP32, FP64, Way
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from stlm_kernels import byte_pool
from stlm_kernels.ops.byte_pool.reference import yardstick
from stlm_kernels.spec import Inputs
from stlm_kernels.testing import assert_matches

# ---- autocast ---------------------------------------------------------------------------------


@RESULT_LANES
@pytest.mark.parametrize("slots", [None, 3, 40])
@pytest.mark.parametrize("upstream_kind", ["random", "ones"])
@pytest.mark.parametrize("lower", [BF16, FP16], ids=str)
def test_autocast(way: Way, lower: torch.dtype, slots: int | None, upstream_kind: str) -> None:
    """The table is rounded when loaded; its gradient is written once, in fp32.

    Thirds show a scaled gradient that was cut to 16 bits on its way: its error is no chance.
    """
    if way.dtype != FP32 or (interpreted(way) and lower == BF16):
        pytest.skip("an fp32 table, and no bf16 in the interpreter")
    inputs = pool_inputs([3, 6, 0, 3, 12, 1, 3], way, vocab=12, slots=slots)
    upstream = upstream_for(inputs, lower)
    if upstream_kind == "ones":
        upstream.fill_(1)
    held = {
        name: x.to(lower).float() if name in ("weight", "position_weight") else x
        for name, x in inputs.items()
    }
    with torch.autocast(way.device, dtype=lower):
        got = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
        # The rule would forgive digits that the rounded table does not have.
        assert_same(with_gradients(byte_pool, held, upstream, impl=way.impl), got)
    want = looped(held, upstream)
    yard = with_gradients(yardstick, held, upstream)
    yard["out"] = yard["out"].to(lower)
    assert got["out"].dtype == lower
    for name, x in got.items():
        assert name == "out" or x.dtype == FP32
        assert_matches(x, want[name], yard[name], name=name, rows=name == "weight")


@ON_CPU
def test_autocast_leaves_fp64_alone() -> None:
    inputs = pool_inputs([3, 2], Way("torch", "cpu", FP64))
    with torch.autocast("cpu", dtype=BF16):
        out = byte_pool(**inputs)
    assert torch.equal(out, byte_pool(**inputs))


# ---- compilers --------------------------------------------------------------------------------


@RESULT_LANES
def test_dynamic_shapes_do_not_recompile(way: Way) -> None:
    if way.dtype != FP32:
        pytest.skip("one dtype shows what tracing does")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(byte_pool, backend=counter, fullgraph=True)
    for patches in (3, 5, 8, 13, 4):
        inputs = pool_inputs([1 + i % 3 for i in range(patches)], way, tail=patches % 4, vocab=12)
        upstream = upstream_for(inputs)
        got = with_gradients(compiled, inputs, upstream, impl=way.impl)
        want = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.lanes("cpu", "gpu")
def test_inductor(way: Way) -> None:
    if way.dtype != FP32:
        pytest.skip("one compilation is slow enough")
    torch._dynamo.reset()
    inputs = pool_inputs([3, 0, 5, 2], way, tail=2, vocab=300)
    upstream = upstream_for(inputs)
    got = with_gradients(torch.compile(byte_pool), inputs, upstream, impl=way.impl)
    want = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


@ON_CPU
@pytest.mark.filterwarnings("error")
def test_vmap_over_tables_needs_no_slow_fallback() -> None:
    inputs = pool_inputs([3, 0, 5], Way("torch", "cpu", FP32))
    tables = torch.stack([inputs["weight"], 2 * inputs["weight"]])
    both = torch.func.vmap(lambda table: byte_pool(**{**inputs, "weight": table}))(tables)
    torch.testing.assert_close(both[1], 2 * byte_pool(**inputs))


# ---- CUDA -------------------------------------------------------------------------------------


def on_cuda(dtype: torch.dtype = BF16, index: int = 0, **options: Any) -> Inputs:
    lengths = [i % 9 for i in range(500)]
    return pool_inputs(lengths, Way("triton", f"cuda:{index}", dtype), width=96, **options)


@ON_GPU
@pytest.mark.parametrize("slots", [None, 5])
def test_no_synchronisation(slots: int | None) -> None:
    inputs = on_cuda(slots=slots)
    upstream = upstream_for(inputs)
    want = with_gradients(byte_pool, inputs, upstream, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = with_gradients(byte_pool, inputs, upstream, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, want)


@ON_GPU
@pytest.mark.parametrize("slots", [None, 5])
def test_graph_replay_with_changed_contents(slots: int | None) -> None:
    static, other = on_cuda(slots=slots), on_cuda(slots=slots, seed=7)
    other["cu_patchlens"] = other["cu_patchlens"] // 2
    upstream = upstream_for(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with_gradients(byte_pool, static, upstream, impl="triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(byte_pool, static, upstream, impl="triton")
    for name, x in static.items():
        if isinstance(x, Tensor):
            x.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, with_gradients(byte_pool, other, upstream, impl="triton"))


@ON_GPU
def test_another_stream() -> None:
    """The kernels run on the current stream: behind the slow work that makes their inputs."""
    inputs = on_cuda()
    upstream = upstream_for(inputs)
    want = with_gradients(byte_pool, inputs, upstream, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(inputs["byte_ids"])
        torch.cuda._sleep(50_000_000)
        late.copy_(inputs["byte_ids"])
        got = with_gradients(byte_pool, {**inputs, "byte_ids": late}, upstream, impl="triton")
    stream.synchronize()
    assert_same(got, want)


@ON_GPU
def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    first, second = on_cuda(index=0), on_cuda(index=1)
    upstream = upstream_for(first)
    want = with_gradients(byte_pool, first, upstream, impl="triton")
    got = with_gradients(byte_pool, second, upstream.to("cuda:1"), impl="triton")
    assert got["out"].device == torch.device("cuda:1")
    assert_same(got, want)
