"""Launch configurations that are worth a measurement: they compile, fit, do not spill, and their
counted bound does not rule them out."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from stlm_kernels import _launch
from stlm_kernels._launch import Config
from stlm_kernels.inspect import inspect_op
from stlm_kernels.ptx.bounds import Device, bounds_of
from stlm_kernels.ptx.reports import execute_case
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

from .counting import case_named

LEAST, MOST = {"num_stages": 1}, {"num_warps": 16, "num_stages": 6}
"""Bounds of a config's values where they are not simply 1 and none."""

BLOCKS = 4
"""Blocks of each launch that are counted for a bound."""
MOST_COUNTED = 1 << 29
"""Bytes that a counted case may move: each process makes its inputs."""


@dataclass(frozen=True)
class Target:
    """Kernel in one bucket of shapes, and the first case that reaches it."""

    spec: OpSpec
    case: Case
    direction: str
    kernel: str
    bucket: str
    default: Config

    @property
    def key(self) -> str:
        return f"{self.kernel}/{self.bucket}"


def neighbours(config: Config) -> Iterator[Config]:
    """Yield configs with one value changed: stages by one, others by a factor of two."""
    for key, value in config.items():
        steps = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if LEAST.get(key, 1) <= step <= MOST.get(key, step):
                yield config | {key: step}


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))


class Candidates:
    """Pool of processes that compile configs for a GPU, into the cache that the launch will read,
    and count what they must cost at least.

    Args:
        arch: compute capability without the dot, e.g. 90.
        dtype: of the float inputs.
        processes: None is one for each core but one.
    """

    def __init__(self, arch: int, dtype: torch.dtype, processes: int | None = None) -> None:
        self.arch, self.dtype = arch, dtype
        # Forked processes would share the parent's CUDA context, which does not survive that.
        self.pool = ProcessPoolExecutor(
            processes or max(1, (os.cpu_count() or 1) - 1),
            mp_context=multiprocessing.get_context("spawn"),
        )

    def usable(self, target: Target, configs: Sequence[Config]) -> list[Config]:
        """Return the configs that compile, fit, and do not spill."""
        where = (target.spec.name, target.case.name, target.kernel)
        jobs = [self.pool.submit(_objection, *where, c, self.arch, self.dtype) for c in configs]
        objections = [job.result() for job in jobs]
        for config, objection in zip(configs, objections, strict=True):
            if objection:
                print(f"  dropped {config}: {objection}", flush=True)
        return [c for c, objection in zip(configs, objections, strict=True) if not objection]

    def least_us(self, target: Target, configs: Sequence[Config]) -> list[float]:
        """Return microseconds that the pass takes at least under each config; 0 where the case is
        too large to count."""
        where = (target.spec.name, target.case.name, target.direction, target.kernel)
        jobs = [self.pool.submit(_least_us, *where, c, self.arch, self.dtype) for c in configs]
        return [job.result() for job in jobs]


def countable(spec: OpSpec, case: Case, dtype: torch.dtype) -> bool:
    """Return whether every process of a pool may hold the tensors of a case."""
    return spec.bytes_moved(case, dtype, "fwd") <= MOST_COUNTED


def _least_us(
    op: str, case_name: str, direction: str, kernel: str, config: Config, arch: int,
    dtype: torch.dtype,
) -> float:  # fmt: skip
    torch.set_num_threads(1)
    spec = OPS[op]
    case = case_named(spec, case_name)
    if not countable(spec, case, dtype):
        return 0.0
    passes = "bwd" if direction == "bwd" else "fwd"
    with _launch.overriding({kernel: config}):
        done = execute_case(spec, case, arch=arch, dtype=dtype, direction=passes, sample=BLOCKS)
    device = Device.of_arch(arch)
    return sum(bounds_of(launch, device).largest for launch in done.executions)


def _objection(
    op: str, case_name: str, kernel: str, config: Config, arch: int, dtype: torch.dtype
) -> str:
    """Return the reason why a config is not worth a launch; empty if it is."""
    torch.set_num_threads(1)
    spec = OPS[op]
    case = case_named(spec, case_name)
    try:
        with _launch.overriding({kernel: config}):
            reports = inspect_op(spec, case, arch, dtype, disassemble=False)
    except Exception as error:  # whatever a compiler raises
        return first_line(error)
    name = f"stlm_{kernel}"
    own = [x for x in reports if x.kernel == name]
    for found in own or [x for x in reports if x.kernel.startswith(name)]:  # two share a config
        if found.spill_instructions:
            return f"{found.spill_instructions} spills"
        if found.occupancy <= 0:
            return f"{found.shared_bytes} bytes of shared memory"
    return ""
