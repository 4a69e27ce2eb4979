"""Batches of packed windows, made by a thread while the model computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from stlm_kernels import Patches

from ..build import patcher_of as patcher_module_of
from ..config import ModelConfig

Patcher = Callable[[Tensor, Tensor], Patches]
"""The patches of packed byte_ids (T,) with document boundaries cu_seqlens (S+1,)."""


def patcher_of(config: ModelConfig) -> Patcher | None:
    """Return the finder of the patches that a model of this shape reads; None where it reads none.

    Raises:
        ValueError: where the config leaves patches to the caller.
    """
    if config.patch_rule == "none":
        return None
    if config.patch_rule == "external":
        raise ValueError('patcher: expected one of your own with patch_rule "external", got None')
    return patcher_module_of(config, max_patches=config.max_patches)


@dataclass(frozen=True)
class Batch:
    """Windows of the corpus, packed.

    >>> batch = TrainingWindows([b"two words" * 9], context=16, batch_size=2, seed=0).batch(0)
    >>> batch.byte_ids.shape, batch.targets.shape
    (torch.Size([32]), torch.Size([32]))
    """

    byte_ids: Tensor  # (T,) int16
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (S+1,) int32
    patches: Patches | None = None
    followers: Tensor | None = None  # (T, sizes) int64

    @property
    def n_bytes(self) -> int:
        return self.byte_ids.shape[0]

    @property
    def lost_patches(self) -> Tensor:
        """0-d, on the device: how many patches found no slot."""
        if self.patches is None:
            return self.byte_ids.new_zeros((), dtype=torch.int32)
        return (self.patches.n_patches - (len(self.patches.cu_patchlens) - 1)).clamp(min=0)

    def with_open_sizes(self) -> Batch:
        """Mark sizes as open for torch.compile: numbers of documents and patches are not built in.

        Where an op must know one (the torch path of attention), it is compiled for that one.
        """
        boundaries = [self.cu_seqlens]
        if self.patches is not None:
            boundaries += [self.patches.cu_patchlens, self.patches.cu_seqlens]
        for offsets in boundaries:
            torch._dynamo.maybe_mark_dynamic(offsets, 0)
        return self

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; a copy to a GPU from pinned memory is not waited for."""
        return self._each(lambda x: x.to(device, non_blocking=device.type == "cuda"))

    def pinned(self) -> Batch:
        """Copy to memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.byte_ids),
            change(self.targets),
            change(self.cu_seqlens),
            None if self.patches is None else Patches(*map(change, self.patches)),
            None if self.followers is None else change(self.followers),
        )


class Loader:
    """Batches by their index; a thread makes the next ones before they are asked for.

    Args:
        make: the batch of an index, always the same one.
        device: where the batches go.
        ahead: how many are kept ready, at most.

    >>> windows = TrainingWindows([b"two words" * 9], context=16, batch_size=2, seed=0)
    >>> Loader(windows.batch, torch.device("cpu"), ahead=0).batch(3).n_bytes
    32
    """

    def __init__(
        self, make: Callable[[int], Batch], device: torch.device, *, ahead: int = 2
    ) -> None:
        self._make, self._device, self._ahead = make, device, ahead
        self._thread: ThreadPoolExecutor | None = None
        self._made: dict[int, Future[Batch]] = {}

    def batch(self, index: int) -> Batch:
        """The batch of an index, on the device.

        Raises:
            Exception: what `make` raised for it.
        """
        if self._thread is None:
            # One core: a second team of threads would fight over cores with the model's.
            self._thread = ThreadPoolExecutor(1, "stlm-loader", torch.set_num_threads, (1,))
        wanted = range(index, index + 1 + self._ahead)
        for other in self._made.keys() - set(wanted):
            self._made.pop(other).cancel()
        for at in wanted:
            if at not in self._made:
                self._made[at] = self._thread.submit(self._on_host, at)
        return self._made.pop(index).result().to(self._device)

    def close(self) -> None:
        """End the thread; the next batch starts another."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = None
        self._made.clear()

    def _on_host(self, index: int) -> Batch:
        batch = self._make(index)
        return batch.pinned() if self._device.type == "cuda" else batch
