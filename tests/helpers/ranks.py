"""A test's function in several processes of one gloo group: begin, end, and nothing in between."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(work: Callable[..., None], folder: Path, *args: Any, world: int = 2) -> None:
    """Call work(rank, *args) in `world` new processes that are one group.

    Args:
        work: a function of a module, as others cannot be sent to a process. What it raises in any
            process is raised here.
        folder: where the processes find each other.
        args: sent to each process.
        world: how many processes.
    """
    store = str(folder / "store")
    torch.multiprocessing.spawn(_rank, args=(work, store, world, args), nprocs=world)


def _rank(index: int, work: Callable[..., None], store: str, world: int, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=world)
    work(index, *args)
    dist.barrier()  # none ends while another still speaks to it
    dist.destroy_process_group()
    # Not by way of the interpreter's end. A thread of gloo releases the tensors of a collective
    # some time after the collective is over, for which it takes Python's lock; where it gets that
    # while the interpreter ends, the process aborts (pytorch issue 190489). Destroying the group
    # does not end the threads as long as a mesh, or a cache of DTensor's, holds it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
