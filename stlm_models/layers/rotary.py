"""Cosines and sines of rotary positions."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from stlm_kernels.runtime import values_visible


def rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin for at least `length` positions, (n_positions, head_dim / 2) fp32."""
    if torch.compiler.is_compiling() or not values_visible(torch.empty(0, device="cpu")):
        # A graph leaves the length open, and makes equal tables of its layers once; what is made
        # inside torch.func or a FakeTensorMode must not outlive it.
        return _rotary_tables(length, head_dim, base, device)
    # Powers of two keep the number of tables small while texts grow byte by byte.
    return _kept_rotary_tables(1 << (length - 1).bit_length(), head_dim, base, device)


def rotary_columns(
    length: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The tables once for each column of a head, (n_positions, head_dim), the first half of sin
    negative: a head turns to head * cos + head.roll(head_dim / 2) * sin.
    """
    return _rotary_columns(1 << (length - 1).bit_length(), head_dim, base, device, dtype)


@functools.lru_cache(maxsize=16)
def _rotary_columns(
    length: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        cos, sin = (x.to(dtype) for x in rotary_tables(length, head_dim, base, device))
        return torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)


@functools.lru_cache(maxsize=16)
def _kept_rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        cos, sin = _rotary_tables(length, head_dim, base, torch.device("cpu"))
        return cos.to(device), sin.to(device)


def _rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * base ** (-pairs / head_dim)
    return angles.cos().float(), angles.sin().float()
