#!/usr/bin/env bash
# Triton 3.7.1: tl.multiple_of of a kernel's argument is dropped without a word.
#
# Guess: the compiler is told that the values are multiples, as the documentation of tl.multiple_of
# says, whatever they are: an argument that is not specialised, because it changes with every call,
# is where such a hint is needed most.
# Seen: the hint becomes an attribute of the operation that made the value, and an argument, of a
# kernel or of an inlined helper, is made by none. Loads at multiples of the argument stay scalar; the
# same hint on the argument's product gives vectors of four. It is the same in 3.6.0 and 3.9.0.
# Nothing was run on a GPU: no GPU is needed to read PTX.
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
def hinted(n):
    return tl.multiple_of(n, 16)


@triton.jit
def copy(x_ptr, y_ptr, stride, WHERE: tl.constexpr):
    step = stride
    if WHERE == "argument":
        step = tl.multiple_of(stride, 16)
    if WHERE == "helper":
        step = hinted(stride)
    start = tl.program_id(0) * step
    if WHERE == "product":
        start = tl.multiple_of(start, 16)
    place = start + tl.arange(0, 1024)
    tl.store(y_ptr + place, tl.load(x_ptr + place))


EXPECTED = {"argument": "b32", "helper": "b32", "product": "v4.b32", "attribute": "v4.b32"}
for where, width in EXPECTED.items():
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "stride": "i32", "WHERE": "constexpr"}
    aligned = [(0,), (1,), *([(2,)] if where == "attribute" else [])]  # as by specialisation
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(copy, types, {"WHERE": where}, attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    (found,) = set(re.findall(r"\bld\.global\.([\w.]+)", ptx))
    print(f"triton {triton.__version__}, multiple of 16 said of the {where}: ld.global.{found}")
    assert found == width
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/show.py"
# Output seen on 2026-11-30:
# triton 3.7.1, multiple of 16 said of the argument: ld.global.b32
# triton 3.7.1, multiple of 16 said of the helper: ld.global.b32
# triton 3.7.1, multiple of 16 said of the product: ld.global.v4.b32
# triton 3.7.1, multiple of 16 said of the attribute: ld.global.v4.b32
