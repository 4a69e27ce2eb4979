"""One kernel for every atomic of triton's language."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def update(
    x_ptr, out_ptr, before_ptr, NAME: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr,
    N: tl.constexpr, TIMES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Change `out` by the first `LAST` elements of x, each of its places by `TIMES` of them."""
    places = tl.arange(0, N)
    x = tl.load(x_ptr + places)
    out = out_ptr + places // TIMES
    inside = places < LAST
    if NAME == "add":
        before = tl.atomic_add(out, x, inside, SEM, SCOPE)
    elif NAME == "max":
        before = tl.atomic_max(out, x, inside, SEM, SCOPE)
    elif NAME == "min":
        before = tl.atomic_min(out, x, inside, SEM, SCOPE)
    elif NAME == "and":
        before = tl.atomic_and(out, x, inside, SEM, SCOPE)
    elif NAME == "or":
        before = tl.atomic_or(out, x, inside, SEM, SCOPE)
    elif NAME == "xor":
        before = tl.atomic_xor(out, x, inside, SEM, SCOPE)
    elif NAME == "xchg":
        before = tl.atomic_xchg(out, x, inside, SEM, SCOPE)
    else:  # store -x where x stands
        before = tl.atomic_cas(out, x, -x, SEM, SCOPE)
    tl.store(before_ptr + places, before, inside)
