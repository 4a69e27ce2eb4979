"""linear_cross_entropy: projection and cross entropy in one, without the logits."""

from .op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
