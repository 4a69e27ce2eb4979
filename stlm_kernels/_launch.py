"""Launch configurations as data, and the one place a kernel is launched from.

A configuration is looked up in `tuned/<device>.json`, which `bench/tune.py` writes; a device or a
shape that was never tuned takes the op's plain default. Nothing here imports triton.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]
Recorder = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Gpu:
    """Facts of a GPU that decide whether a configuration fits it.

    Args:
        arch: compute capability without the dot, e.g. 90.
        shared_bytes: the most shared memory that a block may have.
    """

    arch: int
    shared_bytes: int


H100 = Gpu(90, 227 * 1024)
"""The GPU that the defaults are sized for, where none is there (the interpreter)."""

_TUNED = Path(__file__).parent / "tuned"


@dataclass
class _Tools:
    """State of what follows below: of all threads, since autograd has its own."""

    recorder: Recorder | None = None
    gpu: Gpu | None = None
    configs: Mapping[str, Config] = field(default_factory=dict)
    watcher: Callable[[str, str, Config], None] | None = None


_tools = _Tools()


def config_for(kernel: str, bucket: str, default: Config, device: torch.device) -> Config:
    """The configuration of one kernel for one bucket of shapes on one device.

    Args:
        kernel: kernel name without the `stlm_` prefix, e.g. "byte_pool_fwd".
        bucket: the shape bucket, made by the op's `config.py` from what the speed depends on.
        default: what an untuned device takes, and for values that a tuned entry lacks.
        device: where the kernel will run.
    """
    if _tools.watcher is not None:
        _tools.watcher(kernel, bucket, dict(default))
    override = _tools.configs.get(kernel)
    if override is not None:
        return default | override
    if device.type != "cuda" or is_recording():
        return default
    entry = _tuned_table(torch.cuda.get_device_name(device)).get(f"{kernel}/{bucket}")
    return default if entry is None else default | entry["config"]


def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU that launches on `device` are for: its own, or the one they are recorded for.

    Where kernels are interpreted there is none; the defaults are then an H100's.
    """
    if _tools.gpu is not None:
        return _tools.gpu
    return H100 if device.type != "cuda" else _gpu_here(device)


@functools.cache
def _gpu_here(device: torch.device) -> Gpu:
    found: Any = torch.cuda.get_device_properties(device)  # its stub lacks a field
    return Gpu(10 * found.major + found.minor, found.shared_memory_per_block_optin)


def remembered(choose: Callable[..., Config]) -> Callable[..., Config]:
    """Choose a configuration once for the same arguments; each caller gets a copy to change.

    Arguments are plain values, since they are kept. Within `overriding` and `watching` nothing is.
    """

    @functools.lru_cache(maxsize=1024)
    def kept(recording: bool, gpu: Gpu | None, *args: Any) -> Config:
        return choose(*args)

    @functools.wraps(choose)
    def config(*args: Any) -> Config:
        if _tools.configs or _tools.watcher is not None:
            return choose(*args)
        return dict(kept(is_recording(), _tools.gpu, *args))

    return config


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
    if _tools.recorder is not None:
        _tools.recorder(kernel, programs, args, options)
    elif device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(programs,)](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **options)


def is_recording() -> bool:
    """Return whether `recording` is on: launches reach no device, so tensors may be anywhere."""
    return _tools.recorder is not None


@contextlib.contextmanager
def recording(recorder: Recorder, gpu: Gpu | None = None) -> Iterator[None]:
    """Hand launches to `recorder` instead of a device (how `inspect` compiles without a GPU).

    `gpu` is the one to launch for; None is the tensors' own, as without recording.
    """
    before = _tools.recorder, _tools.gpu
    _tools.recorder, _tools.gpu = recorder, gpu
    try:
        yield
    finally:
        _tools.recorder, _tools.gpu = before


@contextlib.contextmanager
def overriding(configs: dict[str, Config]) -> Iterator[None]:
    """Use these configurations, by kernel name, whatever is tuned (how `bench/tune.py` sweeps)."""
    before, _tools.configs = _tools.configs, configs
    try:
        yield
    finally:
        _tools.configs = before


@contextlib.contextmanager
def watching(watcher: Callable[[str, str, Config], None]) -> Iterator[None]:
    """Tell `watcher` of every (kernel, bucket, default) that a configuration is asked for with."""
    before, _tools.watcher = _tools.watcher, watcher
    try:
        yield
    finally:
        _tools.watcher = before


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


FULL = 1 << 22
"""Elements that occupy a large GPU: 4096 for each of 8 programs on each of about 132 SMs."""


def amount(elements: int) -> str:
    """Return the part of a bucket's name that tells the amount of work of a launch."""
    return "large" if elements >= FULL else "small"


def bucket(*parts: str | torch.dtype) -> str:
    """Return the name of a bucket of shapes, its parts joined; equal ones count once."""
    return "-".join(dict.fromkeys(str(part).removeprefix("torch.") for part in parts))


def width_bucket(width: int, *parts: str | torch.dtype) -> str:
    """`bucket` of the power of two that covers a width, and further parts."""
    return bucket(f"D{block_of(width, 1024)}", *parts)
