"""Fences that triton's code lacks before products that read copies (docs/ptx.md)."""

from __future__ import annotations

from stlm_kernels import env

LACKING = "3.6"
"""A release whose pipelined loops have none after the wait for a copy, in kernels of anybody."""
MAY_LACK = {"stlm_linear_logprobs_bwd_weight": ("3.7", "3.8")}
"""Kernels in which later releases leave one out."""


def release() -> str:
    """Return triton's, as "3.7"."""
    return ".".join(env.version_of("triton").split(".")[:2])


def may_lack_fences(kernel: str) -> bool:
    """Return whether a fault of the kind "proxy" in a kernel is the compiler's."""
    return release() == LACKING or release() in MAY_LACK.get(kernel, ())
