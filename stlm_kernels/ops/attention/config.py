"""Limits of the attention kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, bucket, config_for, gpu_of, remembered

WIDTHS = (16, 32, 48, 64, 128)
WIDE, LONG = 96, 1024
"""Width and length from which dense attention is a library's: cuDNN's on Hopper."""
FARTHEST = 2**30 - 1024
"""The most keys of a sequence, and the longest side of a window, that still count in int32."""


Window = int | tuple[int | None, int | None] | None


def sides(causal: bool, window: Window) -> tuple[int | None, int | None]:
    """Number of keys that a row sees before its own and of those behind it; None: all."""
    if isinstance(window, tuple | list):
        left, right = (None if side == -1 else side for side in window)
    else:
        left, right = None if window is None else window - 1, None
    return left, 0 if causal else right


def unsupported_reasons(**arguments: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    keys = arguments["k"].shape[-3]
    reasons = _without_kernel(**arguments) + _checks.dtype_reasons("q", arguments["q"])
    if arguments["cu_seqlens"] is None and keys > FARTHEST:
        reasons.append(f"k has {keys} positions; the kernels take {FARTHEST} of a sequence")
    return reasons


def declined_reasons(**arguments: Any) -> list[str]:
    """List the reasons to prefer the torch path, or why only it can run; nothing warns of them."""
    reasons = _without_kernel(**arguments)
    q: Tensor = arguments["q"]
    left, _ = sides(arguments["causal"], arguments["window"])
    dense = q.dim() == 4 or arguments["cu_seqlens"] is None
    length, width = q.shape[-3], q.shape[-1]
    reproducible = torch.are_deterministic_algorithms_enabled()
    dense = dense and (left is None or left >= length - 1) and arguments["k"].shape[-3] == length
    if dense and width >= WIDE and length >= LONG and not reproducible:
        reasons.append(f"dense attention of {length} rows with heads of {width} is faster in SDPA")
    return reasons


def _without_kernel(
    *,
    q: Tensor,
    causal: bool,
    window: Window,
    softcap: float | None,
    dropout_p: float,
    **_: Any,
) -> list[str]:
    reasons = []
    if q.shape[-1] not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        reasons.append(f"heads are {q.shape[-1]} wide; the kernels take {widths}")
    if sides(causal, window) == (None, None):
        reasons.append("causal is False and there is no window; the kernels want either")
    if softcap is not None:
        reasons.append("softcap is given; the kernels have none")
    if dropout_p:
        reasons.append("dropout_p is not 0; the kernels drop nothing")
    return reasons


def main_columns(width: int) -> int:
    """The largest power of two within a head; heads of 48 are 32 + 16 columns."""
    return 1 << (width.bit_length() - 1)


def heads_of_a_tile(group: int, rows: int) -> int:
    """Return how many query heads of a key head share a tile, a power of two of >= 16 rows each."""
    return min(group & -group, max(1, rows // 16))


@remembered
def rows_config(
    kernel: str,
    width: int,
    reach: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    device: torch.device,
) -> Config:
    """`BLOCK` rows that a program owns, `INNER` rows of the other side that it takes at a time.

    `reach`: how far back a row can see. `dtype`: of the products; `stored`: of q. 128 rows read
    keys half as often as 64. What is smaller than the rest would spill otherwise (ahead-of-time
    lane). On Hopper two programs share an SM where 128 registers a thread suffice. Products in fp32
    run without tensor cores and hold their operands in registers.
    """
    arch = gpu_of(device).arch
    default = {"BLOCK": 128, "INNER": 64, "num_warps": 8, "num_stages": 2}
    if reach <= 64:  # two blocks of keys for 64 rows, three for 128
        default |= {"BLOCK": 64, "num_warps": 4}
    elif arch == 90 and kernel == "fwd" and width <= 64 and stored == dtype:
        default |= {"maxnreg": 128}
    if (width == 48 and kernel != "fwd") or (arch != 90 and kernel != "fwd" and width == 64):
        default |= {"INNER": 32}
    if width == 128:
        inner = 16 if kernel == "bwd_q" else 32
        stages = 2 if kernel == "fwd" else 1
        default |= {"BLOCK": 128, "INNER": inner, "num_warps": 8, "num_stages": stages}
        if kernel == "bwd_kv":
            default |= {"BLOCK": 64}
    if dtype == torch.float32:
        most = {"fwd": 0, "bwd_q": 32, "bwd_kv": 64}[kernel]
        many = kernel == "bwd_kv" or width == 128 or (kernel == "bwd_q" and width >= 48)
        block, warps = 32 if width <= most else 16, 8 if many else 4
        stages = 2 if kernel == "fwd" else 1
        default = {"BLOCK": block, "INNER": 16, "num_warps": warps, "num_stages": stages}
    shape = bucket(f"K{width}", "short" if reach <= 64 else "long", dtype)
    return config_for(f"attention_{kernel}", shape, default, device)
