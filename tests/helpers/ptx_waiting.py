"""Kernels whose programs wait for each other."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_another(flags_ptr, out_ptr, STEP: tl.constexpr, ATOMIC: tl.constexpr):
    """Each program waits for that of index + `STEP`, if there is one, and then sets its own flag.

    ATOMIC: whether it looks by atomics or by loads.
    """
    program, count = tl.program_id(0), tl.num_programs(0)
    other = program + STEP
    looks = (other >= 0) & (other < count)
    if looks:
        if ATOMIC:
            while tl.atomic_cas(flags_ptr + other, 1, 1) == 0:
                pass
        else:
            while tl.load(flags_ptr + other, volatile=True) == 0:
                pass
    tl.store(out_ptr + program, 1 + (tl.load(out_ptr + other) if looks else 0))
    tl.atomic_xchg(flags_ptr + program, 1)


@triton.jit
def meet(counter_ptr, flags_ptr, out_ptr, N: tl.constexpr):
    """All programs wait for each other twice: by a counter, and by looking through all flags."""
    program = tl.program_id(0)
    tl.atomic_add(counter_ptr, 1)
    while tl.atomic_add(counter_ptr, 0) < N:
        pass
    tl.atomic_xchg(flags_ptr + program, program + 1)
    found = 0
    while found < N:
        found = 0
        for other in range(N):
            found += (tl.load(flags_ptr + other, volatile=True) > 0).to(tl.int32)
    tl.store(out_ptr + program, found)


@triton.jit
def wait_for_a_while(flag_ptr, out_ptr, most, N: tl.constexpr):
    """Wait for a flag, but no longer than so many looks; the looks of each program."""
    looks = 0
    while (tl.load(flag_ptr, volatile=True) == 0) & (looks < most):
        looks += 1
    tl.store(out_ptr + tl.program_id(0) * N + tl.arange(0, N), looks)


@triton.jit
def work_until_told(stop_ptr, count_ptr, most, CONSUMER: tl.constexpr):
    """The first program counts until the other, which looks at the count, tells it to stop."""
    if tl.program_id(0) == 0:
        count = 0
        while tl.load(stop_ptr, volatile=True) == 0:
            count += 1
            tl.store(count_ptr, count)
    elif tl.program_id(0) == CONSUMER:
        while tl.load(count_ptr, volatile=True) < most:
            pass
        tl.atomic_xchg(stop_ptr, 1)


@triton.jit
def same_word(x_ptr, out_ptr, times, N: tl.constexpr):
    """A long loop without anything new but its sum."""
    places = tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.int32)
    for _ in range(times):
        total += tl.load(x_ptr + places)
    tl.store(out_ptr + places, total)


@triton.jit
def add_under_a_lock(lock_ptr, total_ptr):
    """Programs that wait for each other: each takes the lock, adds one and gives it back."""
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(total_ptr, tl.load(total_ptr) + 1)
    tl.atomic_xchg(lock_ptr, 0)
