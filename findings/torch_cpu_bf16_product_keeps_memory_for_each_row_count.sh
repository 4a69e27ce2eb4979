#!/usr/bin/env bash
# torch 2.13.0 on a CPU: a product in bf16 keeps half a megabyte for each number of rows it has met.
#
# Guess: a product needs memory for its operands and its result, and what it prepares for a shape is
# small and soon dropped: multiplying 1,000 batches of different lengths leaves the process as large
# as multiplying one of them.
# Seen: on a CPU with AVX512-BF16 each new number of rows leaves about 0.6 MB in the process, 1,000 of
# them 638 MiB, although the result is written to one place (`out=`); 194 MiB where oneDNN may use no
# more than AVX512_CORE. The same products in fp32 leave nothing. oneDNN prepares code for each shape
# and keeps 1,024 of them by default: with ONEDNN_PRIMITIVE_CACHE_CAPACITY=64, 434 MiB were left.
# Packed texts have another number of patches in each batch; rounding it up to one of few numbers
# avoids this. On a CPU without AVX-512 little is kept, and this says so and ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PY'
import random
import sys

import torch

MIB = 2**20


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / MIB


def growth(dtype):
    weight, out = torch.randn(128, 128).to(dtype), torch.empty(2100, 128, dtype=dtype)
    rows = torch.randn(2100, 128).to(dtype)
    counts = list(range(1000, 2000))
    random.Random(0).shuffle(counts)
    for count in (2000, 2001, 2002):
        torch.mm(rows[:count], weight, out=out[:count])
    before = resident()
    for count in counts:
        torch.mm(rows[:count], weight, out=out[:count])
    return resident() - before


print("torch", torch.__version__)
if not torch.cpu.get_capabilities().get("avx512_f"):
    print("this CPU has no AVX-512: nothing to see here")
    sys.exit()
torch.set_num_threads(1)
single, half = growth(torch.float32), growth(torch.bfloat16)
print(f"1,000 numbers of rows: fp32 +{single:.0f} MiB, bf16 +{half:.0f} MiB")
sys.exit(not (single < 50 < 100 < half))
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" "$folder/show.py"
