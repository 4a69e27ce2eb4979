"""linear_kl_div: distillation from a teacher's logits, without the student's."""

from .op import linear_kl_div

__all__ = ["linear_kl_div"]
