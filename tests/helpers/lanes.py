"""The lanes of the tests: implementations, devices and dtypes that each covers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LANES = ("cpu", "interpret", "aot", "compiled", "gpu")
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Way:
    """One implementation on one device with one dtype."""

    impl: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


WAYS = {
    "cpu": [Way("torch", "cpu", dtype) for dtype in (FP32, BF16, FP16, FP64)],
    "interpret": [Way("triton", "cpu", dtype) for dtype in (FP32, FP16)],
    "aot": [],
    "compiled": [Way("triton", "cpu", dtype) for dtype in (BF16, FP16, FP32)],
    "gpu": [
        *(Way("triton", "cuda", dtype) for dtype in (FP32, BF16, FP16)),
        *(Way("torch", "cuda", dtype) for dtype in (FP32, BF16)),
    ],
}
