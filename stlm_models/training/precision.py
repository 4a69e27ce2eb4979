"""Precision of training by the instructions that the device has; a stopwatch errs when busy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

BF16_INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "bf16": "Arm BF16",
}
"""Names of torch.cpu.get_capabilities() for instructions that multiply bf16 numbers."""


class Precision(NamedTuple):
    """A precision and the reason for it.

    Args:
        name: "bf16" or "fp32", as in `TrainOptions`.
        reason: the rest of a sentence that the name begins.
    """

    name: str
    reason: str


def faster_precision() -> Precision:
    """Choose bf16 where the device, the current GPU or else the CPU, multiplies in it."""
    if torch.cuda.is_available():
        return _of_gpu()
    capabilities = cpu_capabilities()
    found = [name for key, name in BF16_INSTRUCTIONS.items() if capabilities.get(key)]
    if not found:
        return Precision("fp32", "this CPU has no instructions that multiply in bf16")
    if not capabilities["onednn"]:
        return Precision("fp32", f"this torch has no oneDNN, which would use this CPU's {found[0]}")
    return Precision("bf16", f"this CPU multiplies in bf16 ({found[0]})")


def cpu_capabilities() -> Mapping[str, Any]:
    """Instructions of the CPU by torch's names, and "onednn", which makes use of them."""
    return {**torch.cpu.get_capabilities(), "onednn": torch.backends.mkldnn.is_available()}


def _of_gpu() -> Precision:
    name = torch.cuda.get_device_name()
    # By default torch counts what it emulates, slower than fp32, on GPUs older than Ampere.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision("bf16", f"{name} multiplies in bf16")
    return Precision("fp32", f"{name} does not multiply in bf16")
