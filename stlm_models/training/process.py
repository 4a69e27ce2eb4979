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

    By default glibc gives large tensors back to the system, and maps them anew page by page: a
    quarter of the time of a training step whose tensors pass 32 MiB, and an unsteady part of any
    time. The process then stays near the peak of its memory. Without glibc nothing happens.

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
    """Return whether torch has MKL multiply fp32 matrices on a CPU where oneDNN does better.

    On CPUs of AMD MKL makes no use of AVX-512. Torch hands fp32 products to oneDNN where it may
    round their operands to bf16, which the CPU must know, and which oneDNN does with AMX alone.
    """
    cpu = cpu_capabilities()
    is_amd = str(cpu.get("cpu_name", "")).startswith("AMD")
    fits = cpu.get("avx512_bf16") and not cpu.get("amx_bf16")
    return bool(is_amd and fits and cpu["onednn"] and torch.backends.mkl.is_available())


def multiply_by_onednn() -> str | None:
    """Have oneDNN multiply fp32 matrices on the CPU, unless it rounds them; a line for the user.

    `stlm_kernels.attention` then multiplies that way too, instead of by torch's flash attention.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if _rounds_operands():
        matmul.fp32_precision = before
        return None
    return "fp32 products: by oneDNN, faster than MKL on this CPU and as exact"


def _rounds_operands() -> bool:
    """Multiply what fp32 holds and bf16 does not, in the form of each product of a model."""
    fine = torch.full((2, 256, 256), 1 + 2.0**-12)
    exact = 256 * (1 + 2.0**-12) ** 2  # an eighth more than 256
    products = fine[0] @ fine[1], fine @ fine, torch.addmm(fine[0], fine[0], fine[1], beta=0)
    return any(bool((x - exact).abs().max() > 2.0**-6) for x in products)
