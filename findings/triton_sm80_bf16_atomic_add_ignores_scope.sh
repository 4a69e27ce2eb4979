#!/usr/bin/env bash
# Triton 3.7.1, sm_80: tl.atomic_add of bf16 is made at scope "gpu", whatever scope is asked for.
#
# Guess: scope="sys" is in the instruction, as it is on sm_90, so that a sum in memory that another
# GPU or the host adds to as well is atomic for them too; where that cannot be had, an error.
# Seen: sm_80 has no bf16 add, so a loop of compare-and-swap is made, and its instruction says
# relaxed.gpu for "cta", "gpu" and "sys" alike. sm_90 keeps all three. It is the same in 3.6.0, 3.8.0
# and on sm_80 in 3.9.0. Nothing was run on a GPU: no GPU is needed to read PTX.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_one(sum_ptr, SCOPE: tl.constexpr):
    place = sum_ptr + tl.arange(0, 128)
    tl.atomic_add(place, tl.full((128,), 1.0, tl.bfloat16), sem="relaxed", scope=SCOPE)


for arch in (80, 90):
    for scope in ("cta", "gpu", "sys"):
        types = {"sum_ptr": "*bf16", "SCOPE": "constexpr"}
        source = ASTSource(add_one, types, {"SCOPE": scope})
        ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
        (found,) = set(re.findall(r"\batom\.[\w.]+", ptx))
        print(f"triton {triton.__version__}, sm_{arch}, scope={scope}: {found}")
        assert f".{scope if arch == 90 else 'gpu'}." in found
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/show.py"
# Output seen on 2026-11-30:
# triton 3.7.1, sm_80, scope=cta: atom.relaxed.gpu.global.cas.b32
# triton 3.7.1, sm_80, scope=gpu: atom.relaxed.gpu.global.cas.b32
# triton 3.7.1, sm_80, scope=sys: atom.relaxed.gpu.global.cas.b32
# triton 3.7.1, sm_90, scope=cta: atom.global.cta.relaxed.add.noftz.bf16
# triton 3.7.1, sm_90, scope=gpu: atom.global.gpu.relaxed.add.noftz.bf16
# triton 3.7.1, sm_90, scope=sys: atom.global.sys.relaxed.add.noftz.bf16
