"""Reasons against the kernels of linear_cross_entropy, which are those of linear_logprobs."""

from ..linear_logprobs.config import unsupported_reasons

__all__ = ["unsupported_reasons"]
