"""The torch path of linear_sample: how it ranks, its chunks, and what compilers make of it."""

from __future__ import annotations

import pytest
import torch

from stlm_kernels import linear_sample
from stlm_kernels.ops.linear_sample import torch_impl


@pytest.mark.parametrize("share", [0, 8], ids=["topk", "sort"])
def test_ranks(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falling, equal ones by id, whichever way they are found; both zeros are equal."""
    monkeypatch.setattr(torch_impl, "SORTED_SHARE", share)
    for dtype in (torch.float32, torch.float64):
        z = torch.randint(-3, 4, (5, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
        z[0], z[1] = -torch.inf, torch.where(z[1] > 0, -0.0, 0.0)
        z[2] *= torch.finfo(dtype).tiny / 8
        z[3, ::7] = torch.finfo(dtype).max
        for count in (1, 7, 40):
            ranked, ids = torch_impl._ranked(z, count)
            for row, got in zip(z.tolist(), ids.tolist(), strict=True):
                assert got == sorted(range(40), key=lambda i: (-row[i], i))[:count]
            assert torch.equal(ranked, z.gather(1, ids))


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-1, 2, (n, 8), generator=rng).float() for n in (90, 40))
    whole = linear_sample(hidden, weight, seed=3, top_p=0.9)
    monkeypatch.setattr(torch_impl, "CHUNK_ELEMENTS", 40 * 17)
    assert torch.equal(linear_sample(hidden, weight, seed=3, top_p=0.9), whole)


def test_compiled_for_the_cpu() -> None:
    """C++ compilers exploit signed overflow, of which the noise is made; most if the seed is known.

    Equal logits, so that only the noise decides.
    """
    torch._dynamo.reset()
    weight, rows = torch.zeros(258, 8), torch.ones(30, 8)
    compiled = torch.compile(lambda rows: linear_sample(rows, weight, seed=5), fullgraph=True)
    assert torch.equal(compiled(rows), linear_sample(rows, weight, seed=5))
