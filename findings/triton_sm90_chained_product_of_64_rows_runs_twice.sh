#!/usr/bin/env bash
# Triton 3.7.1, sm_90: of two products in a chain, 64 rows and 8 warps, the second is computed twice.
#
# Guess: both warpgroups of a program share the work of a product, whatever its shape; if 64 rows, the
# least of a wgmma, leave none for the second of them, it takes half of the columns. So does it where a
# product stands alone.
# Seen: the second product of `dot(dot(a, b), c)`, the form of attention, gives all its columns to both
# warpgroups, which compute the same numbers: its layout has the 8 warps below each other over 64 rows.
# The program issues 1.5 times the operations of the two products, without a word. With 4 warps, with
# 128 rows, and with the first product alone it is as guessed. The same in 3.6.0 and 3.9.0. Nothing was
# run on a GPU: no GPU is needed to read PTX.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def products(a_ptr, b_ptr, c_ptr, out_ptr, CHAIN: tl.constexpr, ROWS: tl.constexpr):
    m, n = tl.arange(0, ROWS), tl.arange(0, 64)
    a = tl.load(a_ptr + m[:, None] * 64 + n[None, :])
    b = tl.load(b_ptr + n[:, None] * 64 + n[None, :])
    out = tl.dot(a, b)
    if CHAIN:
        c = tl.load(c_ptr + n[:, None] * 64 + n[None, :])
        out = tl.dot(out.to(tl.bfloat16), c)
    tl.store(out_ptr + m[:, None] * 64 + n[None, :], out)


def share(chain, rows, warps):
    """Operations of the wgmma that a program issues over those of its products."""
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", "out_ptr": "*fp32"}
    source = ASTSource(
        products,
        {**pointers, "CHAIN": "constexpr", "ROWS": "constexpr"},
        {"CHAIN": chain, "ROWS": rows},
    )
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    shapes = re.findall(r"wgmma\.mma_async\S*?\.m(\d+)n(\d+)k(\d+)", done.asm["ptx"])
    issued = sum(int(m) * int(n) * int(k) for m, n, k in shapes) * (warps // 4)
    return issued / (rows * 64 * 64 * (2 if chain else 1))


print("triton", triton.__version__)
seen = {}
for chain in (False, True):
    for rows in (64, 128):
        for warps in (4, 8):
            seen[chain, rows, warps] = share(chain, rows, warps)
            what = "two in a chain" if chain else "one product"
            print(f"{what}, {rows} rows, {warps} warps: {seen[chain, rows, warps]:g} of its operations")
twice = seen.pop((True, 64, 8))
sys.exit(not (twice == 1.5 and set(seen.values()) == {1}))
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
"$folder/venv/bin/python" "$folder/show.py"
