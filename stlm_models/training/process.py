"""Settings of a process that trains on a CPU, in torch and the C library: for all of it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

from .precision import cpu_capabilities


def prepare_process() -> str | None:
    """Keep freed memory, and multiply by the faster library: a line that says so if it changes."""
    keep_freed_memory()
    return multiply_by_onednn() if onednn_multiplies_faster() else None


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, for its next tensors on a CPU.

    By default glibc gives large tensors back to the system, and maps them anew page by page, which
    takes an unsteady part of the time of a step whose tensors pass 32 MiB. The process then stays
    near the peak of its memory. Without glibc nothing happens.

    Source: the GNU C library's manual, "Malloc Tunable Parameters".
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def onednn_multiplies_faster() -> bool:
    """Return whether torch trains on a CPU and has MKL multiply where oneDNN does better.

    On the AMD CPU with AVX-512 that this was tried on, oneDNN took less than half of MKL's time, to
    equal errors. Torch hands it fp32 products where it may round their operands to bf16, which a
    CPU without AMX did not do.
    """
    cpu = cpu_capabilities()
    is_amd = str(cpu.get("cpu_name", "")).startswith("AMD")
    fits = cpu.get("avx512_bf16") and not cpu.get("amx_bf16")
    has_both = cpu["onednn"] and torch.backends.mkl.is_available()
    # The permission is for products on GPUs as well.
    return bool(is_amd and fits and has_both and not torch.cuda.is_available())


def multiply_by_onednn() -> str | None:
    """Have oneDNN multiply fp32 matrices on the CPU, unless it rounds them; a line for the user.

    `stlm_kernels.attention` then multiplies that way too, instead of by torch's flash attention.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if matmul.fp32_precision not in ("none", "ieee"):
        return None  # the caller has chosen
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if _rounds_operands():
        torch.set_float32_matmul_precision(before)
        return None
    return "fp32 products: by oneDNN, faster than MKL on this CPU and as exact"


def _rounds_operands() -> bool:
    """Multiply what fp32 holds and bf16 does not, in the form of each product of a model."""
    fine = torch.full((2, 256, 256), 1 + 2.0**-12)
    exact = 256 * (1 + 2.0**-12) ** 2  # an eighth more than 256
    products = fine[0] @ fine[1], fine @ fine, torch.addmm(fine[0], fine[0], fine[1], beta=0)
    return any(bool((x - exact).abs().max() > 2.0**-6) for x in products)
