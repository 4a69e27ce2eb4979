"""Training on several processes: what the model needs to run under `torch.distributed`.

    torchrun --nproc-per-node 2 -m stlm_models.train --preset 10m

The command trains by DistributedDataParallel; in your own loop, wrap the model with that or with
`apply_fsdp2`, and divide by the valid bytes of all processes: `mean_loss`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from .model import STLM, PatchCore


@dataclass(frozen=True)
class Ranks:
    """Rank of this process among those that train together; one without torchrun."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Meet the processes that torchrun started, if it did, in one group."""
        if not dist.is_torchelastic_launched():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this process: one GPU each, in the order of ranks on a machine."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = dist.get_node_local_rank(fallback_rank=0) if self.world > 1 else 0
        return torch.device("cuda", local)

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, averaging its gradients over the processes."""
        # No buffer changes in training, and a memory is large.
        return DistributedDataParallel(model, broadcast_buffers=False) if self.world > 1 else model

    def agree(self, seconds: float, should_stop: bool) -> tuple[float, bool]:
        """The first process's clock, and whether any wants to stop: all go on or none does."""
        if self.world == 1:
            return seconds, should_stop
        said = torch.tensor(
            [seconds if self.is_first else 0.0, float(should_stop)], dtype=torch.float64
        ).to(self.device)
        dist.all_reduce(said)
        return float(said[0]), bool(said[1] > 0)

    def total(self, count: Tensor) -> Tensor:
        """The sum of a count over the processes, on the device."""
        if self.world > 1:
            dist.all_reduce(count)
        return count

    def leave(self) -> None:
        """End the group, if there is one."""
        if self.world > 1:
            dist.destroy_process_group()
            # A thread of gloo, which may outlive the group, takes Python's lock to release what it
            # sent last; if it gets that when the interpreter ends, the process aborts (pytorch
            # issue 190489). So give it the lock now.
            time.sleep(0.1)


def mean_loss(loss_sum: Tensor, n_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss to call backward on, and the mean loss over the valid bytes of all processes.

    DDP and FSDP average gradients over processes, which counts a byte for less where there are
    more of them; this counts every valid byte the same. Alone it is loss_sum / n_valid.

    Args:
        loss_sum: 0-d, this process's sum over its valid bytes.
        n_valid: 0-d, how many these are. Where a step is done in parts, those of all its parts:
            the losses and means of the parts then add up to the step's.

    Returns:
        (loss, mean), both 0-d: loss with a gradient, of this process; mean without, of all.
    """
    if not dist.is_initialized():
        loss = loss_sum / n_valid.clamp(min=1)
        return loss, loss.detach()
    everywhere = torch.stack([loss_sum.detach().double(), n_valid.double()])
    dist.all_reduce(everywhere)
    total = everywhere[1].clamp(min=1)
    loss = loss_sum * (dist.get_world_size() / total).to(loss_sum.dtype)
    return loss, (everywhere[0] / total).to(loss_sum.dtype)


def apply_fsdp2(model: STLM, mesh: DeviceMesh | None = None, **options: Any) -> STLM:
    """Shard the parameters over processes, block by block, in place (FSDP2).

    The tied table stays in the root group: input and output share it, and two groups must not.

    Args:
        model: an `STLM`, on the device it will run on.
        mesh: of processes; None is all of them.
        options: further arguments of `torch.distributed.fsdp.fully_shard`, such as mp_policy.

    Returns:
        The same model.
    """
    blocks = [*model.decoder]
    if not model.is_flat:
        blocks += [
            *model.encoder,
            *(model.core.blocks if isinstance(model.core, PatchCore) else []),
        ]
    for block in blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    for name in ("hidden", "generate", "generate_batch"):
        register_fsdp_forward_method(model, name)
    return model


def save_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, sharded or not, from all processes as safetensors (no pickle).

    Args:
        folder: empty or yet to be made, and the same for all processes.
        tensors: by name, as `model.state_dict()` and `Optimizers.state_tensors()` give them.

    Raises:
        FileExistsError: in all processes, where the folder holds anything: reading would mix it
            with what is written.
    """
    import torch.distributed.checkpoint as dcp

    taken = [folder.exists() and any(folder.iterdir())]
    if dist.is_initialized():
        # The first process says, before any of them writes.
        dist.broadcast_object_list(taken, src=0)
    if taken[0]:
        raise FileExistsError(f"folder: expected an empty one, got {folder}: move it")
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())


def load_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read in place what any number of processes wrote with `save_sharded`."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
