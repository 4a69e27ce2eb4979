"""Limits of the attention kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, bucket, config_for, remembered

WIDTHS = (16, 32, 48, 64, 128)
WIDE, LONG = 96, 1024
"""Width and length from which dense attention is a library's: cuDNN's on Hopper."""


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
    return _without_kernel(**arguments) + _checks.dtype_reasons("q", arguments["q"])


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


@remembered
def rows_config(
    kernel: str, width: int, reach: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """`BLOCK` rows that a program owns, `INNER` rows of the other side that it takes at a time.

    `reach`: how far back a row can see. Blocks of 64 rows waste little on a short reach; a long
    one is worth larger ones. Products in fp32 run without tensor cores and hold their operands in
    registers. What is smaller or has more warps than the rest would spill otherwise (ahead-of-time
    lane, sm_90).
    """
    long = reach > 512
    default = {"BLOCK": 64, "INNER": 64, "num_warps": 4, "num_stages": 2}
    if kernel == "fwd" and long and width <= 64:
        default |= {"BLOCK": 128, "num_warps": 8}
    if width == 48 and kernel != "fwd":
        default |= {"INNER": 32}
    if width == 128:
        inner = 16 if kernel == "bwd_q" else 32
        stages = 2 if kernel == "fwd" else 1
        default |= {"INNER": inner, "num_warps": 8, "num_stages": stages}
    if dtype == torch.float32:
        most = {"fwd": 0, "bwd_q": 32, "bwd_kv": 64}[kernel]
        many = (width == 128) != (kernel == "bwd_kv") or (kernel, width) == ("bwd_q", 48)
        block, warps = 32 if width <= most else 16, 8 if many else 4
        stages = 2 if kernel == "fwd" else 1
        default = {"BLOCK": block, "INNER": 16, "num_warps": warps, "num_stages": stages}
    shape = bucket(f"K{width}", "long" if long else "short", dtype)
    return config_for(f"attention_{kernel}", shape, default, device)
