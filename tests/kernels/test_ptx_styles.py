"""Kernels in the styles of others: what triton's language has and the library's ops do not use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stlm_kernels import ptx

pytestmark = [pytest.mark.lanes("compiled"), pytest.mark.parametrize("arch", [80, 90])]


@pytest.fixture(name="kernels")
def kernels_of_the_tests() -> Any:
    from helpers import ptx_kernels

    return ptx_kernels


def test_atomics_on_shared_memory(kernels: Any, arch: int) -> None:
    ids, bins = torch.randint(0, 16, (256,), dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    done = ptx.run(kernels.histogram, (1,), ids, bins, N=256, BINS=16, arch=arch)
    assert "atom.shared" in done.ptx
    assert torch.equal(bins, torch.bincount(ids, minlength=16).int())


def test_cache_policies_and_the_device_library(kernels: Any, arch: int) -> None:
    x = torch.cat([torch.linspace(-110, 90, 251), torch.tensor([0.0, -0.0, 1.0, 5e3, -5e3])])
    out = torch.empty(256)
    done = ptx.run(kernels.exponentials, (1,), x, out, N=256, arch=arch)
    assert "createpolicy" in done.ptx
    torch.testing.assert_close(out, x.double().exp().float(), rtol=3e-7, atol=1e-44)


def test_sorts(kernels: Any, arch: int) -> None:
    x, out = torch.randn(3, 64), torch.empty(3, 64)
    ptx.run(kernels.sort_rows, (3,), x, out, N=64, arch=arch)
    assert torch.equal(out, x.sort(1).values)


def test_products_of_three_dimensions(kernels: Any, arch: int) -> None:
    a, b = (torch.randn(4, 16, 16, dtype=torch.float16) for _ in range(2))
    out = torch.empty(4, 16, 16)
    ptx.run(kernels.multiply_batches, (1,), a, b, out, B=4, N=16, arch=arch)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
