"""unpool: patch states back at the bytes that may read them."""

from .op import unpool

__all__ = ["unpool"]
