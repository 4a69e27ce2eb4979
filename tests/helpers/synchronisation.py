"""Host synchronisation made an error."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def synchronisation_is_an_error() -> Any:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
