"""Limits of the swiglu kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, runtime
from ..._launch import Config, amount, block_of, ceil_div, config_for, gpu_of, width_bucket

MOST_WIDTH = 256
"""Widest rows whose sums fit the registers; see `declined_reasons`."""
HIDDEN_MULTIPLE = 128
"""Packed weights are padded to so many of the hidden layer: the largest tile of all."""
ASYNCHRONOUS = (90, 100)
"""Architectures whose products read both operands from shared memory, so that tiles are larger."""


def unsupported_reasons(*, x: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    reasons = _checks.dtype_reasons("x", x)
    if x.shape[-1] > MOST_WIDTH:
        reasons.append(f"rows are {x.shape[-1]} wide; the kernels take up to {MOST_WIDTH}")
    return reasons


def declined_reasons(*, x: Tensor, **_: Any) -> list[str]:
    """List why "auto" leaves a call to the composition: where that costs less by its bounds.

    Counted for an H200 in bfloat16, T = 65,536, F = 768, forward and backward together: 564 us at D
    = 256, of which 364 are products, against 1,052 of the composition, of which 234 are. At D =
    512, F = 1,536 one tile was counted, 64 rows by 16 of the hidden layer: 915 forward against 670
    of the composition's operators by arithmetic; backward 928 for x, and for the weights at least
    780 of products, against 1,284. In float32, where no matrix unit multiplies, 14 products in
    place of 9 decide.
    """
    reasons = []
    if runtime.compute_dtype(x) == torch.float32:
        reasons.append("float32 products are not the matrix units': forming them again costs more")
    if x.shape[-1] > MOST_WIDTH:
        reasons.append(
            f"rows are {x.shape[-1]} wide: beyond {MOST_WIDTH}, tiles that fit the registers read"
            " more again than the composition moves"
        )
    return reasons


def packed_shape(width: int, hidden: int) -> tuple[int, int]:
    """Rows and columns of the packed weights: gate and up in turns, then down transposed."""
    return 3 * ceil_div(hidden, HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE, block_of(width, MOST_WIDTH)


def pack_config(width: int, device: torch.device) -> Config:
    default = {"BLOCK_F": 16, "num_warps": 4}
    return config_for("swiglu_pack", width_bucket(width), default, device)


def rows_config(
    kernel: str, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """`BLOCK_M` rows of a program, `BLOCK_F` of the hidden layer at a time."""
    few = kernel == "bwd_x" and gpu_of(device).arch == 100  # whose operands take more memory
    default = _default(dtype, device, stages=1 if few else 2)
    shape = width_bucket(width, amount(rows * width), dtype)
    return config_for(f"swiglu_{kernel}", shape, default, device)


def weights_config(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """`BLOCK_F` of the hidden layer of a program, `BLOCK_M` rows at a time; one for each SM."""
    default = _default(dtype, device, stages=2 if width <= 128 else 1) | {"PROGRAMS": 132}
    shape = width_bucket(width, amount(rows * width), dtype)
    return config_for("swiglu_bwd_weights", shape, default, device)


def _default(dtype: torch.dtype, device: torch.device, *, stages: int) -> Config:
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_F": 16, "num_warps": 8, "num_stages": 1}
    if gpu_of(device).arch in ASYNCHRONOUS:
        return {"BLOCK_M": 128, "BLOCK_F": 32, "num_warps": 8, "num_stages": stages}
    return {"BLOCK_M": 64, "BLOCK_F": 16, "num_warps": 8, "num_stages": 1}
