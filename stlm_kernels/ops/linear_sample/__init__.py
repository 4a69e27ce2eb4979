"""linear_sample: next ids straight from hidden states."""

from .op import linear_sample

__all__ = ["linear_sample"]
