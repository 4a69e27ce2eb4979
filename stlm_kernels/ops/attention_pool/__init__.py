"""attention_pool: each patch attends to its own bytes."""

from .op import attention_pool

__all__ = ["attention_pool"]
