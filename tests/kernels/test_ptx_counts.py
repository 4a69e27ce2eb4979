"""Counts of accesses whose cost is known by hand, and bounds made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stlm_kernels import find_patches, ptx, segment_pool, unpool
from stlm_kernels.ptx.bounds import DEVICES, Device, bounds_of, classes_of, ratio
from stlm_kernels.ptx.count import Costs, class_of

pytestmark = pytest.mark.lanes("compiled")
ROOT = Path(__file__).parents[2]
LANE = np.arange(32)


def wavefronts(offsets: np.ndarray, size: int) -> tuple[int, int]:
    costs = Costs()
    costs.shared_access("load", offsets, size, np.zeros(len(offsets), np.int64))
    counts = costs.counts
    return counts["shared_load_wavefronts"], counts["shared_load_ideal_wavefronts"]


@pytest.mark.parametrize(
    ("offsets", "size", "passes", "ideal"),
    [
        (4 * LANE, 4, 1, 1),
        (0 * LANE, 4, 1, 1),  # all lanes read one word
        (8 * LANE, 4, 2, 1),  # every other word: two words a bank
        (128 * LANE, 4, 32, 1),  # a column of a matrix of 32 words a row
        (132 * LANE, 4, 1, 1),  # the same padded by a word
        (8 * LANE, 8, 2, 2),  # half warps
        (16 * LANE, 16, 4, 4),  # quarter warps
        (64 * LANE, 16, 16, 4),
        (2 * LANE, 2, 1, 1),  # two lanes share a word
    ],
)
def test_wavefronts_of_shared_memory(offsets: Any, size: int, passes: int, ideal: int) -> None:
    assert wavefronts(offsets.astype(np.int64), size) == (passes, ideal)


@pytest.mark.parametrize(
    ("addresses", "size", "sectors", "ideal"),
    [
        (4 * LANE, 4, 4, 4),
        (4 * LANE + 16, 4, 5, 4),  # begins in the middle of a sector
        (32 * LANE, 4, 32, 4),
        (16 * LANE, 16, 16, 16),
        (0 * LANE, 4, 1, 1),
    ],
)
def test_sectors_of_global_memory(addresses: Any, size: int, sectors: int, ideal: int) -> None:
    costs = Costs()
    costs.global_access("load", addresses.astype(np.int64), size, np.zeros(32, np.int64))
    assert costs.counts["global_load_sectors"] == sectors
    assert costs.counts["global_load_ideal_sectors"] == ideal
    assert costs.counts["global_load_requests"] == 1


def test_warps_count_by_themselves_whatever_lanes_they_have() -> None:
    """Against sets of places, over random threads of several warps."""
    draw = np.random.default_rng(0)
    for size in (1, 2, 4, 8, 16):
        threads = np.flatnonzero(draw.random(256) < 0.7)
        warps, addresses = threads // 32, draw.integers(0, 200, len(threads)) * size
        costs = Costs()
        costs.global_access("load", addresses, size, warps)
        costs.shared_access("load", addresses, size, warps)
        sectors, ideal, passes = 0, 0, 0
        for warp in np.unique(warps):
            own = addresses[warps == warp]
            sectors += len({place // 32 for place in own})
            ideal += -(-len(set(own.tolist())) * size // 32)
            step = min(32, 128 // size)
            for begin in range(0, len(own), step):
                words = {
                    (place + byte) // 4
                    for place in own[begin : begin + step]
                    for byte in range(0, max(size, 4), 4)
                }
                banks = [word % 32 for word in words]
                passes += max(banks.count(bank) for bank in set(banks))
        assert costs.counts["global_load_sectors"] == sectors
        assert costs.counts["global_load_ideal_sectors"] == ideal
        assert costs.counts["global_load_requests"] == len(np.unique(warps))
        assert costs.counts["shared_load_wavefronts"] == passes


def test_each_sector_goes_to_dram_once() -> None:
    costs = Costs()
    for _ in range(3):
        costs.touch(0, np.array([0, 4, 64]), 4, 96, writes=False)
    costs.touch(0, np.array([0]), 4, 96, writes=True)
    assert costs.dram_bytes() == 32 * (2 + 1)
    assert costs.dram_bytes(1.25) == 32 * (2.5 + 1.25)
    assert costs.dram_bytes(100) == 32 * (3 + 3), "blocks share what the storage has"


def test_counts_of_a_launch() -> None:
    from helpers import ptx_kernels

    n = 4096
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    done = ptx.run(ptx_kernels.add_rows, (8,), x, y, out, n, costs=True, BLOCK=512, num_warps=4)
    bounds = bounds_of(done, Device.load("h200"))
    assert bounds.counts["global_load_sectors"] == 2 * n * 4 / 32
    assert bounds.counts["l2_bytes"] == bounds.counts["dram_bytes"] == 3 * n * 4
    assert bounds.us["dram"] == pytest.approx(3 * n * 4 / 4.8e6)
    assert ratio(bounds.counts, "sectors") == 1
    assert bounds.machine is not None
    assert bounds.machine.issued > 0
    assert 0 < bounds.machine.exact_share <= 1
    assert bounds.largest == max(bounds.us.values())
    sampled = ptx.run(
        ptx_kernels.add_rows, (8,), x, y, out, n, costs=True, sample=2, BLOCK=512, num_warps=4
    )
    few = bounds_of(sampled, Device.load("h200"))
    assert few.factor == 4
    assert few.counts["l2_bytes"] == bounds.counts["l2_bytes"]


def test_flops_of_products() -> None:
    from helpers import ptx_kernels

    for arch in (80, 90):
        a, b = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16()
        done = ptx.run(
            ptx_kernels.multiply, (1,), a, b, torch.empty(64, 64), 128, arch=arch, costs=True,
            M=64, N=64, K=32, num_warps=4, collect=["proxy"],
        )  # fmt: skip
        assert done.counts.costs is not None
        assert done.counts.costs.counts["matrix_flops_bf16"] == 2 * 64 * 64 * 128
        assert classes_of(done)["matrix"] > 0


def test_bounds_need_costs() -> None:
    from helpers import ptx_kernels

    x = torch.zeros(64)
    done = ptx.run(ptx_kernels.add_rows, (1,), x, x, torch.empty(64), 64, BLOCK=64, num_warps=1)
    with pytest.raises(ValueError, match="costs=True"):
        bounds_of(done, Device.load("h200"))


def test_devices_name_their_sources() -> None:
    for path in DEVICES.glob("*.json"):
        assert len(json.loads(path.read_text())["sources"]) >= 2
        assert Device.load(path.stem).clocks_per_us > 0
    with pytest.raises(ValueError, match="device: expected one of"):
        Device.load("h2000")


def test_classes() -> None:
    names = ("ex2.approx.f32", "fma.rn.f32", "add.s32", "ld.global.b32", "bar.sync", "mov.b32")
    assert [class_of(x) for x in names] == ["mufu", "float", "integer", "memory", "barrier", "move"]


def test_sampled_launches_keep_places_that_later_launches_read() -> None:
    """Kernels that make integers run whole; others do not, and leave zeros."""
    ids = torch.randint(32, 123, (4096,), dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, 4096], dtype=torch.int32)
    with ptx.executing(sample=1, costs=True) as session:
        find_patches(ids, rule="space", max_patch_len=16, cu_seqlens=cu_seqlens, impl="triton")
        for done in session.executions:
            assert done.counts.executed_blocks == done.counts.blocks
        assert not any(done.faults for done in session.executions)
        assert any(done.counts.blocks > 1 for done in session.executions)
        x, cu = torch.randn(4096, 32), torch.arange(0, 4097, 8, dtype=torch.int32)
        pooled = segment_pool(x, cu, impl="triton")
    counts = {done.kernel: done.counts for done in session.executions}
    sums = counts["stlm_segment_sum"]
    assert sums.executed_blocks == 1 < sums.blocks
    assert float(pooled.abs().sum()) > 0
    assert not pooled[len(pooled) // 2].any(), "what no block wrote"


def test_sampled_launches_keep_places_that_began_as_zeros() -> None:
    """The runs of unpool's backward are zeros before the kernel writes them."""
    states = torch.randn(512, 32, requires_grad=True)
    read_ids = torch.arange(512, dtype=torch.int32).repeat_interleave(8)
    with ptx.executing(sample=1, costs=True) as session:
        unpool(states, read_ids, impl="triton").sum().backward()
    counts = {done.kernel: done.counts for done in session.executions}
    runs, sums = counts["stlm_unpool_runs"], counts["stlm_segment_sum"]
    assert runs.executed_blocks == runs.blocks > 1
    assert sums.executed_blocks == 1 < sums.blocks
