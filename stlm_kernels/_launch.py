"""Launch configurations as data, and the one place a kernel is launched from.

A configuration is looked up in `tuned/<device>.json`, which `bench/tune.py` writes; a device or a
shape that was never tuned takes the op's plain default. Nothing here imports triton.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]
Recorder = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]

_TUNED = Path(__file__).parent / "tuned"
_recorder: ContextVar[Recorder | None] = ContextVar("stlm_launch_recorder", default=None)
_override: ContextVar[dict[str, Config] | None] = ContextVar("stlm_config_override", default=None)


def config_for(kernel: str, bucket: str, default: Config, device: torch.device) -> Config:
    """The configuration of one kernel for one bucket of shapes on one device.

    Args:
        kernel: kernel name without the `stlm_` prefix, e.g. "byte_pool_fwd".
        bucket: the shape bucket, made by the op's `config.py` from what the speed depends on.
        default: what an untuned device takes; also names the keys.
        device: where the kernel will run.
    """
    override = (_override.get() or {}).get(kernel)
    if override is not None:
        return dict(override)
    if device.type != "cuda" or is_recording():
        return default
    entry = _tuned_table(torch.cuda.get_device_name(device)).get(f"{kernel}/{bucket}")
    return default if entry is None else dict(entry["config"])


def device_file(device_name: str) -> Path:
    """Return the file that holds the tuned configurations of a device."""
    return _TUNED / (re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json")


@functools.cache
def _tuned_table(device_name: str) -> dict[str, Any]:
    path = device_file(device_name)
    return json.loads(path.read_text())["configs"] if path.exists() else {}


def launch(kernel: Any, programs: int, *args: Any, device: torch.device, **options: Any) -> None:
    """Run `kernel` on a flat grid of `programs` under the device that holds the tensors."""
    if programs == 0:
        return
    options.setdefault("enable_fp_fusion", True)
    recorder = _recorder.get()
    if recorder is not None:
        recorder(kernel, programs, args, options)
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


def is_recording() -> bool:
    """Return whether `recording` is on: launches reach no device, so tensors may be anywhere."""
    return _recorder.get() is not None


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Hand launches to `recorder` instead of a device (how `inspect` compiles without a GPU)."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def overriding(configs: dict[str, Config]) -> Iterator[None]:
    """Use these configurations, by kernel name, whatever is tuned (how `bench/tune.py` sweeps)."""
    token = _override.set(configs)
    try:
        yield
    finally:
        _override.reset(token)


def splits(count: int, tiles: int, programs: int, block: int) -> tuple[int, int]:
    """Number of runs into which a sum over `count` rows is cut so that the device is full.

    Args:
        count: rows that are summed over.
        tiles: programs that one run takes.
        programs: how many fill the device.
        block: rows that a program takes at a time.

    Returns:
        (number of runs, rows of a run), the latter a multiple of `block`.
    """
    blocks = max(1, ceil_div(count, block))
    run = ceil_div(blocks, max(1, programs // tiles))
    return ceil_div(blocks, run), run * block


def block_of(width: int, limit: int) -> int:
    """The power of two that covers `width`, between 16 (a dot's least) and `limit`."""
    return min(limit, max(16, 1 << (width - 1).bit_length()))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def bucket(*parts: str | torch.dtype) -> str:
    """Return the name of a bucket of shapes, its parts joined; equal ones count once."""
    return "-".join(dict.fromkeys(str(part).removeprefix("torch.") for part in parts))


def width_bucket(width: int, *parts: str | torch.dtype) -> str:
    """`bucket` of the power of two that covers a width, and further parts."""
    return bucket(f"D{block_of(width, 1024)}", *parts)
