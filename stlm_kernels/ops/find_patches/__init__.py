"""find_patches: boundaries of patches from bytes already seen, and the patch each byte may read."""

from .op import Patches, find_patches

__all__ = ["Patches", "find_patches"]
