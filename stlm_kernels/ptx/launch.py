"""Compile a kernel with the installed triton for a GPU that is not here, and execute its PTX."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..inspect import target
from .code import Code
from .count import Costs
from .decode import decode
from .faults import Collector, Fault
from .machine import Counts, Machine
from .memory import NO_SHADOWS, GlobalMemory, Shadow
from .parse import Program, parse
from .registers import UNSIGNED
from .state import state_bytes
from .turns import run_in_turn

THREADS_AT_ONCE = 8192
"""Threads whose registers lie side by side: more leave the caches, fewer cost more calls."""
STATE_BYTES = 128 << 20
"""Bytes that registers and memory of a batch of blocks may take, if one block takes no more."""


@dataclass
class Execution:
    """Results of a launch."""

    kernel: str
    grid: tuple[int, int, int]
    program: Program
    counts: Counts
    faults: list[Fault] = field(default_factory=list)
    ptx: str = ""
    arguments: tuple[Any, ...] = ()
    shared_bytes: int = 0
    cubin: bytes = b""


def run(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    arch: int = 90,
    collect: Iterable[str] = (),
    fresh: Mapping[int, Shadow] = NO_SHADOWS,
    costs: bool = False,
    sample: int | None = None,
    **options: Any,
) -> Execution:
    """Execute a `@triton.jit` kernel over the bytes of its CPU tensors.

    Args:
        kernel: the jitted function.
        grid: blocks along up to three dimensions.
        args, options: those of a launch; tensors lie on the CPU.
        arch: compute capability without the dot.
        collect: kinds of faults to keep in the result instead of raising them.
        fresh: by address of a storage, which of its bytes have been written; see `executing`.
        costs: count memory and matrix work too.
        sample: execute so many blocks, spread evenly, instead of all; results are then incomplete.

    Returns:
        The program, how often each instruction was issued, and the faults that were kept.

    Raises:
        Fault: the kernel did what it must not, see `faults.KINDS`.
        PtxError: an instruction that is not known here was reached.
    """
    with target(arch):
        compiled = kernel.warmup(*args, grid=tuple(grid), **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
    bound = bind(kernel, compiled, args, options)
    shared_bytes = compiled.metadata.shared
    text = compiled.asm["ptx"]
    done = execute(
        text, grid, bound, shared_bytes=shared_bytes, collect=collect, fresh=fresh, costs=costs,
        sample=sample,
    )  # fmt: skip
    done.cubin = compiled.asm["cubin"]
    return done


def bind(kernel: Any, compiled: Any, args: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """The arguments that the compiled kernel takes at run time, in its order."""
    names = [parameter.name for parameter in kernel.params]
    given = {**dict(zip(names, args, strict=False)), **options}
    signature = compiled.src.signature
    return [
        argument
        for name in names
        for argument in _run_time_values(given.get(name), signature.get(name, "constexpr"))
    ]


def _run_time_values(value: Any, kind: Any) -> Iterator[Any]:
    """The values of an argument that are parameters of the compiled kernel; tuples one by one."""
    if isinstance(kind, tuple):
        for item, item_kind in zip(value, kind, strict=True):
            yield from _run_time_values(item, item_kind)
    elif kind != "constexpr":
        yield value


def execute(
    ptx: str,
    grid: Sequence[int],
    arguments: Sequence[Any],
    *,
    shared_bytes: int,
    collect: Iterable[str] = (),
    fresh: Mapping[int, Shadow] = NO_SHADOWS,
    costs: bool = False,
    sample: int | None = None,
) -> Execution:
    """Execute PTX text. `arguments` are tensors, ints and floats in the kernel's order.

    Parameters beyond the arguments (triton's scratch pointers) are zero. `costs` and `sample` are
    those of `run`.
    """
    code = _decoded(ptx)
    x, y, z = (*grid, 1, 1)[:3]
    parameters = {
        parameter.name: _bits(argument, parameter.kind)
        for parameter, argument in zip(
            code.program.parameters,
            [*arguments, *[0] * (len(code.program.parameters) - len(arguments))],
            strict=True,
        )
    }
    collector = Collector(frozenset(collect))
    total = x * y * z
    memory = GlobalMemory(_storages(code.program, arguments), fresh, total)
    chosen = _sampled(total, sample)
    n_instructions = len(code.program.instructions) + 1
    counts = Counts(
        np.zeros(n_instructions, np.int64), np.zeros(n_instructions, np.int64), len(chosen), total,
        Costs() if costs else None,
    )  # fmt: skip
    memory.costs = counts.costs
    at_once = blocks_at_once(code, shared_bytes)
    # Lanes that are switched off compute too; what they overflow says nothing.
    with np.errstate(all="ignore"):
        run_in_turn(
            Machine(code, (x, y, z), blocks, parameters, memory, shared_bytes, collector, counts)
            for blocks in np.split(chosen, range(at_once, len(chosen), at_once))
        )
    faults = list(collector.found.values())
    return Execution(
        code.program.name, (x, y, z), code.program, counts, faults, ptx,
        tuple(arguments), shared_bytes,
    )  # fmt: skip


def blocks_at_once(code: Code, shared_bytes: int) -> int:
    """Blocks of a batch: as many as its threads and the bytes of its state allow."""
    of_threads = THREADS_AT_ONCE // code.program.threads
    return max(1, min(of_threads, STATE_BYTES // state_bytes(code, shared_bytes)))


@functools.lru_cache(maxsize=128)
def _decoded(ptx: str) -> Code:
    return decode(parse(ptx))


def _sampled(blocks: int, sample: int | None) -> NDArray[np.int64]:
    """Indices of the blocks to execute: all, or so many spread evenly, the first and last too."""
    if sample is None or sample >= blocks:
        return np.arange(blocks)
    return np.unique(np.linspace(0, blocks - 1, sample).round().astype(np.int64))


def _storages(program: Program, arguments: Sequence[Any]) -> Iterator[tuple[int, int, str]]:
    for name, variable in program.variables.items():
        yield program.symbols[name], len(variable), name
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            storage = argument.untyped_storage()
            shape = tuple(argument.shape)
            yield storage.data_ptr(), storage.nbytes(), f"argument {position} {shape}"


def _bits(argument: Any, kind: str) -> np.ndarray:
    """The bytes of a parameter."""
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu":
            raise ValueError(f"ptx: expected CPU tensors, got one on {argument.device}")
        argument = argument.data_ptr()
    size = int(kind.lstrip("bfus")) // 8
    if kind[0] == "f":
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}[size]
        return np.array([argument], dtype).view(np.uint8)
    value = int(argument or 0) % (1 << 8 * size)
    return np.array([value], UNSIGNED[8 * size]).view(np.uint8)
