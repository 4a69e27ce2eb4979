#!/usr/bin/env bash
# Triton 3.7.1: the sum of a product is not one number, its lanes hold sums that differ in the last bit.
#
# Guess: after `total = tl.sum(a * b)` every lane of a warp holds the same bits, since the butterfly
# of shuffles adds the same two numbers in both lanes of a pair, and addition commutes.
# Seen: with one product a lane, the compiler fuses the lane's own product into the first addition
# behind a shuffle (fma.rn.f32 own_a, own_b, other), while the other lane's product arrives rounded.
# Of the pair one sum has its first, the other its second product unrounded. What is computed from
# `total` later, element by element, sees different totals in different lanes; where two lanes store
# it to one address, which one stays is up to the hardware. `enable_fp_fusion=False` avoids it.
# No GPU is needed: the PTX shows the fusion, and fp32 arithmetic shows what it does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import re

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def scaled_by_sum(a_ptr, b_ptr, out_ptr):
    lane = tl.arange(0, 32)
    a, b = tl.load(a_ptr + lane), tl.load(b_ptr + lane)
    tl.store(out_ptr + lane, tl.sum(a * b, 0) - tl.zeros((32,), tl.float32))


def ptx(fuses: bool) -> str:
    source = ASTSource(scaled_by_sum, {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32"})
    options = {"num_warps": 1, "enable_fp_fusion": fuses}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def fused_into_a_shuffle(text: str) -> bool:
    shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+)", text))
    return any(addend in shuffled for addend in re.findall(r"fma\.rn\.f32\s+%r\d+, %r\d+, %r\d+, (%r\d+)", text))


print("fused by default:", fused_into_a_shuffle(ptx(True)), "| with enable_fp_fusion=False:", fused_into_a_shuffle(ptx(False)))
assert fused_into_a_shuffle(ptx(True))
assert not fused_into_a_shuffle(ptx(False))

# Two lanes of a pair, as the PTX has it: each adds its exact product to the other's rounded one.
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 2, 10_000)).astype(np.float32)
exact, rounded = a.astype(np.float64) * b, a * b
lane = [(exact[i] + rounded[1 - i]).astype(np.float32) for i in (0, 1)]
print(f"pairs of lanes with different sums: {np.mean(lane[0] != lane[1]):.0%}")
assert f"{np.mean(lane[0] != lane[1]):.0%}" == "32%"
PY
"$folder/venv/bin/python" "$folder/show.py"
# Output seen on 2026-11-30:
# fused by default: True | with enable_fp_fusion=False: False
# pairs of lanes with different sums: 32%
