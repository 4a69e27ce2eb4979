#!/usr/bin/env bash
# Triton 3.6.0, sm_90: a pipelined product reads what cp.async wrote without a proxy fence.
#
# Guess: a loop whose tiles cp.async brings into shared memory and wgmma reads from there has, in
# each round, cp.async.wait_group, a barrier, fence.proxy.async, then the product: cp.async writes by
# the generic proxy, wgmma reads by the asynchronous one, and the PTX ISA orders the two by that fence.
# Seen: with num_stages=3 the loop of a plain matrix product has the wait and the barrier, and no
# fence.proxy.async in it or before it; with num_stages=1 (plain stores to shared memory) it has one,
# and so do both in 3.7.1. Whether a GPU ever shows it was not tried: no GPU is needed to read PTX.
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
def product(a_ptr, b_ptr, out_ptr, n, K: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, n, BLOCK):
        k = first + index
        a = tl.load(a_ptr + index[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * BLOCK + index[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + index[:, None] * BLOCK + index[None, :], acc)


aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
source = ASTSource(
    product,
    {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "n": "i32", "K": "constexpr", "BLOCK": "constexpr"},
    {"K": 4096, "BLOCK": 64},
    aligned,
)
for stages in (1, 3):
    options = {"num_warps": 4, "num_stages": stages}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    names = r"cp\.async\.wait_group|bar\.sync|fence\.proxy\.async|wgmma\.mma_async"
    # From the loop's label to its product: what stands between the copies and their reader.
    loop = ptx[ptx.index("$L__BB0_2:") : ptx.index("wgmma.mma_async") + 20]
    print(f"triton {triton.__version__}, num_stages={stages}:", " ".join(re.findall(names, loop)))
    before = "fence.proxy.async" in ptx[: ptx.index("wgmma.mma_async")]
    assert before == ("fence.proxy.async" in loop) == (sys.argv[1] != "3.6.0" or stages == 1)
PY
for version in 3.6.0 3.7.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check triton==$version
    TRITON_CACHE_DIR="$folder/cache-$version" "$folder/$version/bin/python" "$folder/show.py" $version
done
# Output seen on 2026-11-30:
# triton 3.6.0, num_stages=1: bar.sync fence.proxy.async bar.sync wgmma.mma_async
# triton 3.6.0, num_stages=3: cp.async.wait_group bar.sync wgmma.mma_async
# triton 3.7.1, num_stages=1: bar.sync fence.proxy.async bar.sync wgmma.mma_async
# triton 3.7.1, num_stages=3: cp.async.wait_group bar.sync fence.proxy.async wgmma.mma_async
