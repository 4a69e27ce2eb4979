"""Kernels of torch.compile, executed and counted on a CPU.

Inductor writes Triton for CPU tensors as if they lay on a GPU, and its launches run as those of
anybody else do. Of several configurations it would time each on a GPU and keep the fastest; here
the one with the least bound stands in for that choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from stlm_kernels.inspect import target
from stlm_kernels.ptx import run
from stlm_kernels.ptx.bounds import Device, bounds_of
from stlm_kernels.ptx.faults import KINDS

REGISTERS, THREADS, THREADS_OF_BLOCK = 65536, 2048, 1024
"""Registers and threads of an SM, and threads of a block, on the data-center GPUs since sm_80."""


def compiled_here(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function for torch.compile to compile at its first call, for its shapes alone."""
    torch.compiler.reset()  # shapes of earlier cases would make this one dynamic
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


@contextmanager
def inductor(device: Device, sample: int | None = None) -> Iterator[None]:
    """Have torch.compile write Triton for a GPU that is not there, and launch it on CPU tensors.

    Wants `ptx.executing` within it, which runs the launches.

    Args:
        device: what is compiled for, and whose rates choose among configurations.
        sample: blocks of a launch that are run to compare configurations (None: all).
    """
    from torch._inductor import config
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=device.sms,
        cc=device.arch,
        major=device.arch // 10,
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=THREADS,
        max_threads_per_block=THREADS_OF_BLOCK,
        warp_size=32,
    )

    def launch(tuner: Any, *args: Any, **_: Any) -> None:
        configs = tuner.configs
        if len(configs) > 1:
            # What is tried is not counted as work of torch.
            with _disable_current_modes():
                bounds = [_bound(tuner, args, each, device, sample) for each in configs]
            configs = [configs[bounds.index(min(bounds))]]
        given, grid = tuner._interpret_args_grid(args, configs[0])
        tuner.fn[grid](*given, **_options(configs[0]))

    with (
        config.patch(cpu_backend="triton", compile_threads=1, fx_graph_cache=False),
        target(device.arch),
        patch.dict(os.environ),  # an autotuner sets the folder of triton's cache
        patch.object(DeviceProperties, "create", lambda of: properties),
        patch.object(CachingAutotuner, "precompile", lambda *args, **options: None),
        patch.object(CachingAutotuner, "run", launch),
        patch.object(torch._C._dynamo.guards, "_empty_strided_cpu", _empty_strided),
    ):
        yield


def _bound(
    tuner: Any, args: tuple[Any, ...], tried: Any, device: Device, sample: int | None
) -> float:
    """Return the least microseconds of a launch with this configuration; results are undone."""
    copies, _ = tuner.clone_args(*args)  # of what the kernel changes in place
    given, grid = tuner._interpret_args_grid(tuple(copies), tried)
    done = run(
        tuner.fn, grid, *given, arch=device.arch, collect=KINDS, costs=True, sample=sample,
        **_options(tried),
    )  # fmt: skip
    return bounds_of(done, device).largest


def _options(chosen: Any) -> dict[str, Any]:
    return {**chosen.kwargs, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """Allocate where `executing` sees it, which torch's own function for this is hidden from."""
    return torch.empty_strided(size, stride, dtype=dtype)
