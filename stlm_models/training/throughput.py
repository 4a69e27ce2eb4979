"""Share of a device's arithmetic that training uses: need of a byte, rate of the device."""

from __future__ import annotations

import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from .trainer import Trainer

LARGEST_PROBE = 8192
ENOUGH_SECONDS = 0.02


def flops_per_byte(trainer: Trainer) -> float:
    """Floating-point operations of forward and backward per real byte, counted on the first window.

    A multiply and an add are two; unused slots of patches are left out, and so is what
    checkpointing runs again. Parameters, their gradients and random numbers stay as they are.
    """
    windows = copy.copy(trainer.windows)
    windows.own_windows = windows.own_windows[:1]
    batch = windows.batch(0).to(trainer.device)
    patches = batch.patches
    if patches is not None:
        used = patches.cu_patchlens[: int(patches.n_patches) + 1]
        patches = patches._replace(cu_patchlens=used)
    trainer.model.train()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    checkpointing, trainer.model.checkpointing = trainer.model.checkpointing, False
    with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:
        with trainer.autocast():
            loss_sum, _ = trainer.model(
                batch.byte_ids, batch.targets, cu_seqlens=batch.cu_seqlens, patches=patches
            )
        torch.autograd.grad(loss_sum, parameters, allow_unused=True)
    trainer.model.checkpointing = checkpointing
    return counter.get_total_flops() / (batch.n_bytes * trainer.bytes_per_id)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of square matrix products, of growing sizes until one takes 20 ms."""
    best, size = 0.0, 256
    noise = torch.Generator(device).manual_seed(0)
    while size <= LARGEST_PROBE:
        a = torch.randn(size, size, device=device, generator=noise).to(dtype)
        seconds = min(_product_seconds(a) for _ in range(4))
        best = max(best, 2 * size**3 / seconds)
        if seconds > ENOUGH_SECONDS:
            break
        size *= 2
    return best


def _product_seconds(a: torch.Tensor) -> float:
    _wait_for(a.device)
    started = time.perf_counter()
    a @ a
    _wait_for(a.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
