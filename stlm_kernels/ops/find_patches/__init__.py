"""find_patches: borders of patches from bytes already seen, and which patch each byte may read."""

from .op import Patches, find_patches

__all__ = ["Patches", "find_patches"]
