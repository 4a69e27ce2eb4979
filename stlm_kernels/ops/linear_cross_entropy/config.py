"""What the kernels beneath linear_cross_entropy take: those of linear_logprobs."""

from ..linear_logprobs.config import unsupported_reasons

__all__ = ["unsupported_reasons"]
