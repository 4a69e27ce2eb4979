"""Launches that run here, over CPU tensors: those of the library's ops and those of anybody."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _launch, runtime
from ..inspect import gpu_for
from ..testing import fresh_memory
from .launch import Execution, run
from .memory import LINE, Shadow, bytes_at, new_shadow
from .torch_ops import TorchOp, watching

MAPPED_BYTES = 1 << 26
"""Larger memory comes from the system, which clears it."""


class Session:
    """The launches inside `executing`, and the memory that began uninitialised there.

    Args:
        clears: fresh memory holds zeros, so that what no block wrote is no wild address later.
    """

    def __init__(self, clears: bool = False) -> None:
        self.clears = clears
        self.executions: list[Execution] = []
        self.torch_ops: list[TorchOp] = []
        self._fresh: dict[int, tuple[Tensor, int, Shadow]] = {}

    def note(self, x: Tensor) -> Tensor:
        """Remember a tensor whose memory nothing has written yet."""
        if isinstance(x, FakeTensor):
            return x
        storage = x.untyped_storage()
        if x.device.type == "cpu" and storage.nbytes():
            shadow = new_shadow(storage.data_ptr(), storage.nbytes())
            if self.clears and storage.nbytes() <= MAPPED_BYTES:
                ctypes.memset(storage.data_ptr(), 0, storage.nbytes())
            # The tensor is kept, so that its address stays its own.
            self._fresh[storage.data_ptr()] = (x, x._version, shadow)
        return x

    def makes_integers(self, args: Iterable[Any]) -> bool:
        """Return whether a launch writes integers alone: places, which later launches follow.

        Fresh tensors are results; where there is none (a result began as zeros), all tensors count.
        """
        tensors = [x for x in args if isinstance(x, Tensor)]
        fresh = [x for x in tensors if x.untyped_storage().data_ptr() in self._fresh]
        return bool(tensors) and not any(x.is_floating_point() for x in fresh or tensors)

    def shadows(self) -> dict[int, Shadow]:
        """Shadows of fresh memory that only launches have written since."""
        return {
            address: shadow
            for address, (x, version, shadow) in self._fresh.items()
            if x._version == version
        }

    def assert_written(self, *results: Tensor) -> None:
        """Every element of results that kernels made was stored by one.

        Raises:
            AssertionError: with how many were not, and the first of them.
        """
        shadows = self.shadows()
        for position, x in enumerate(results):
            shadow = shadows.get(x.untyped_storage().data_ptr())
            if shadow is None or not x.numel():
                continue
            places = torch.empty(0, dtype=torch.int64).set_(
                torch.arange(len(shadow) // x.itemsize).untyped_storage(),
                x.storage_offset(),
                x.shape,
                x.stride(),
            )
            begins = places.numpy().reshape(-1) * x.itemsize + x.untyped_storage().data_ptr() % LINE
            written = shadow[bytes_at(begins, x.itemsize)].all(1)
            if not written.all():
                first = np.unravel_index(int(np.flatnonzero(~written)[0]), tuple(x.shape))
                count, where = int((~written).sum()), tuple(map(int, first))
                raise AssertionError(
                    f"result {position}: {count} of {x.numel()} elements were never written,"
                    f" the first at {where}"
                )


@contextmanager
def executing(
    arch: int = 90,
    collect: Iterable[str] = (),
    *,
    costs: bool = False,
    sample: int | None = None,
) -> Iterator[Session]:
    """Run launches here inside: of the library's ops (`impl="triton"`) and any `kernel[grid](...)`.

    An autotuned kernel takes the first of its configurations: there is no time to compare.

    Args:
        arch: compute capability without the dot, for which kernels are compiled.
        collect: kinds of faults that executions keep instead of raising them.
        costs, sample: as in `run`. With costs, `session.torch_ops` has what torch itself computes
            in between, and ops do not look at values, as they would not on a GPU. Launches that
            make integers alone run whole whatever `sample` is: later launches may read places
            there. Where blocks are sampled, torch's products are not computed.
    """
    session = Session(clears=sample is not None)
    kinds = tuple(collect)

    def shadows() -> dict[int, Shadow]:
        # Launches of some blocks leave holes for the next to read.
        return session.shadows() if sample is None else {}

    def launch(
        kernel: Any, grid: Sequence[int], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        blocks = None if session.makes_integers(args) else sample
        done = run(
            kernel, grid, *args, arch=arch, collect=kinds, fresh=shadows(),
            costs=costs, sample=blocks, **options,
        )  # fmt: skip
        session.executions.append(done)

    def launch_op(
        kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        launch(kernel, (programs,), args, options)

    with (
        _launch.recording(launch_op, gpu_for(arch)),
        _launches_of_triton(launch),
        fresh_memory(session.note),
        _torch_ops_to(session, skips_products=sample is not None) if costs else nullcontext(),
    ):
        yield session


@contextmanager
def _torch_ops_to(session: Session, skips_products: bool) -> Iterator[None]:
    """Note what torch computes, and have ops see values as on a GPU: not for free."""
    visible = runtime.values_visible
    runtime.values_visible = lambda *tensors: False
    try:
        with watching(session.torch_ops.append, skips_products):
            yield
    finally:
        runtime.values_visible = visible


@contextmanager
def _launches_of_triton(launch: Callable[..., None]) -> Iterator[None]:
    """Pass every `kernel[grid](...)` to `launch`; compiling alone stays triton's."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compile_or_run, bench = JITFunction.run, Autotuner._bench

    def run_here(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup:
            return compile_or_run(kernel, *args, grid=grid, warmup=True, **options)
        if callable(grid):
            names = (parameter.name for parameter in kernel.params)
            grid = grid({**dict(zip(names, args, strict=False)), **options})
        launch(kernel, tuple(grid), args, options)
        return None

    JITFunction.run, Autotuner._bench = run_here, lambda *args, **options: 0.0
    try:
        yield
    finally:
        JITFunction.run, Autotuner._bench = compile_or_run, bench
