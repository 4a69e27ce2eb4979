"""attention: causal or full attention with windows, documents and grouped heads."""

from .op import attention

__all__ = ["attention"]
