"""Proton, triton's profiler: time and rates of each kernel of a task."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from ..harness.jobs import Task

ROUNDS = 20


@contextmanager
def launch_metadata(flops: dict[str, int]) -> Iterator[None]:
    """Let our kernels tell Proton their bytes, and their FLOPs where these are known.

    Kernels count that ran before, since triton's own imports wait for a first run.
    Triton asks a kernel for it only while a launch hook is set, so nothing is added to other runs.
    """
    from triton.runtime.jit import JITFunction

    def describe(grid: Any, metadata: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Count each tensor among the arguments once, as read or written whole."""
        tensors = {x.data_ptr(): x.nbytes for x in arguments.values() if isinstance(x, Tensor)}
        facts = {"name": metadata.name, "bytes": sum(tensors.values())}
        known = flops.get(metadata.name)
        return facts if known is None else facts | {"flops": known}

    with ExitStack() as stack:
        for path, module in list(sys.modules.items()):
            for name, kernel in list(vars(module).items()) if path.startswith("stlm_") else ():
                if name.startswith("stlm_") and isinstance(kernel, JITFunction):
                    stack.enter_context(mock.patch.object(kernel, "launch_metadata", describe))
        yield


def under_proton(task: Task, path: Path, scope: dict[str, int], flops: dict[str, int]) -> str:
    """Run a task repeatedly under Proton.

    Args:
        task: what to run.
        path: of the profile, without its ending.
        scope: bytes and FLOPs of the whole task.
        flops: of those kernels of which they are known.

    Returns:
        A line for each kernel of ours, or why there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import triton.profiler as proton

        proton.start(str(path), hook="triton")
    except (ImportError, RuntimeError) as error:  # not built in, or CUPTI is not to be had
        return f"Proton is not usable here: {error}"
    with launch_metadata(flops):
        with proton.scope(path.name, scope):
            for _ in range(ROUNDS):
                task.run(task.prepare(task.samples[0]))
        proton.finalize()
    tree = json.loads(path.with_name(path.name + ".hatchet").read_text())
    return "\n".join(proton_lines(tree))


def proton_lines(tree: Any) -> Iterator[str]:
    """Format our kernels in Proton's tree: time of a launch, and rates where known."""
    totals: dict[str, dict[str, float]] = {}

    def visit(node: Any) -> None:
        name, metrics = node["frame"]["name"], node["metrics"]
        if name.startswith("stlm_"):
            total = totals.setdefault(name, {})
            for key in ("time (ns)", "count", "bytes", "flops"):
                total[key] = total.get(key, 0.0) + float(metrics.get(key, 0.0))
        for child in node["children"]:
            visit(child)

    for node in tree:
        if "frame" in node:
            visit(node)
    for name, found in totals.items():
        nanoseconds, count = found["time (ns)"], max(1.0, found["count"])
        line = f"  {name:<36} {nanoseconds / count / 1e3:9.2f} us a launch"
        if nanoseconds:
            rates = (found["bytes"] / nanoseconds, found["flops"] / nanoseconds / 1e3)
            line += f" {rates[0]:9.0f} GB/s" + (f" {rates[1]:8.2f} TFLOP/s" if rates[1] else "")
        yield line
