"""Root-mean-square normalisation without a gain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels import runtime

EPS = 1e-6


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in x's dtype; a GPU's autocast has fp32.

    There is no gain: where a linear map follows, it can learn one. A GPU runs F.rms_norm as one
    kernel; in bf16 on a CPU the composition takes half its time.
    """
    if runtime.on_gpu(x.device):
        return F.rms_norm(x, x.shape[-1:], eps=EPS)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
