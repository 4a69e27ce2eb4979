"""linear_logprobs: log-probabilities of targets straight from hidden states."""

from .op import linear_logprobs

__all__ = ["linear_logprobs"]
