"""swiglu: RMS norm, gated feed-forward and residual in one pass over memory."""

from .op import swiglu

__all__ = ["swiglu"]
