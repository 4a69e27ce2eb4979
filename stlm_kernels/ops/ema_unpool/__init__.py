"""ema_unpool: patch states smoothed by their gates, then back at the bytes that may read them."""

from .op import ema_unpool

__all__ = ["ema_unpool"]
