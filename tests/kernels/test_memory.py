"""Peak memory of the loss on a CPU, each way in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys, torch
import torch.nn.functional as F
from stlm_kernels import linear_cross_entropy

way, rows = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
hidden = torch.randn(rows, 512, requires_grad=True)
weight = torch.randn(50_257, 512, requires_grad=True)
target = torch.randint(50_257, (rows,))

def status(name):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(name))

before = status("VmRSS")
if way == "ours":
    linear_cross_entropy(hidden, weight, target).backward()
else:
    F.cross_entropy(F.linear(hidden, weight), target).backward()
print(status("VmHWM") - before)
"""


def extra_kib(way: str, rows: int) -> int:
    """Memory that forward and backward need beyond their arguments, both gradients included."""
    command = [sys.executable, "-c", MEASURE, way, str(rows)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("rows", "share"), [(1024, 1 / 2), (8192, 1 / 4)])
def test_large_vocabulary_needs_a_fraction(rows: int, share: float, full: bool) -> None:
    if not full:
        pytest.skip("seconds to minutes of products: with --full")
    assert extra_kib("ours", rows) <= share * extra_kib("baseline", rows)
