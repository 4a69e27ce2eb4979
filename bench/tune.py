"""`python -m bench.tune [op...] --minutes 4`: find launch configs on this GPU, write them as data.

Every config of a kernel's declared space is held to the same tolerance as a test before it is
timed; one whose result is wrong, or that does not compile or fit, is refused. What is found goes
into `stlm_kernels/tuned/<device>.json`, to be reviewed and committed; kernels and buckets that were
not swept keep their entries, so a second run goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from stlm_kernels import _launch
from stlm_kernels._launch import Config
from stlm_kernels._spec import Case, OpSpec
from stlm_kernels.registry import OPS

from . import report
from .timing import Gpu, timed_rounds
from .work import CaseData, Job, heads_of, our_entries, passes_of, task_of

SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "byte_pool_fwd": {
        "BLOCK_P": (8, 16, 32, 64),
        "BLOCK_D": (64, 128, 256),
        "PATCHES": (32, 64, 128, 256),
        "num_warps": (2, 4, 8),
    },
    "byte_pool_bwd": {
        "BLOCK_V": (64, 128, 256),
        "BLOCK_P": (32, 64, 128),
        "BLOCK_D": (64, 128, 256),
        "PROGRAMS": (132, 264, 528),
        "num_warps": (4, 8),
    },
    "linear_logprobs_chunk": {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)},
}
"""The values tried of each key of a kernel's config; a kernel without a space keeps its default."""

Measure = Callable[[OpSpec, Case, str, CaseData], float]


@dataclass(frozen=True)
class Target:
    """One kernel in one bucket of shapes, and the first case that reaches it."""

    spec: OpSpec
    case: Case
    direction: str
    kernel: str
    bucket: str
    default: Config


def lookups(spec: OpSpec, run: Callable[[], Any]) -> list[tuple[str, str, Config]]:
    """(kernel, bucket, default) of each config that `run` asks for."""
    launch = importlib.import_module(f"stlm_kernels.ops.{spec.name}.launch")
    found: list[tuple[str, str, Config]] = []

    def watch(kernel: str, bucket: str, default: Config, device: torch.device) -> Config:
        found.append((kernel, bucket, default))
        return _launch.config_for(kernel, bucket, default, device)

    with mock.patch.object(launch, "config_for", watch):
        run()
    return found


def targets(
    spec: OpSpec, direction: str, case: Case, run: Callable[[], Any], known: set[str]
) -> Iterator[Target]:
    """What this case reaches in this pass that has a space and was not met before."""
    for kernel, bucket, default in lookups(spec, run):
        key = f"{kernel}/{bucket}"
        if kernel in SPACES and key not in known:
            known.add(key)
            yield Target(spec, case, direction, kernel, bucket, default)


def configs_of(kernel: str, default: Config) -> Iterator[Config]:
    """The default first; the others in a fixed random order, so that a cut sweep is a fair one."""
    yield default
    space = SPACES[kernel]
    values = list(itertools.product(*space.values()))
    random.Random(0).shuffle(values)
    for combination in values:
        config = default | dict(zip(space, combination, strict=True))
        if config != default:
            yield config


def sweep(
    target: Target, data: CaseData, measure: Measure, deadline: float
) -> dict[str, Any] | None:
    """The fastest right config found before `deadline`; None if none was right."""
    best: dict[str, Any] | None = None
    tried = refused = 0
    default_us = None
    for config in configs_of(target.kernel, target.default):
        if tried and time.monotonic() > deadline:
            break
        tried += 1
        try:
            with _launch.overriding({target.kernel: config}):
                us = measure(target.spec, target.case, target.direction, data) * 1e6
        except Exception as error:  # whatever a compiler, a launch or a wrong result raises
            refused += 1
            print(f"  refused {config}: {str(error).splitlines()[0] if str(error) else error!r}")
            continue
        default_us = us if config == target.default else default_us
        if best is None or us < best["us"]:
            best = {"config": config, "us": round(us, 3)}
            print(f"  {us:9.1f} us  {config}", flush=True)
    if best is None:
        return None
    rounded = None if default_us is None else round(default_us, 3)
    return best | {"default_us": rounded, "tried": tried, "refused": refused}


def measured_on(gpu: Gpu) -> Measure:
    """Judge our kernels under the config in force, then time them."""

    def measure(spec: OpSpec, case: Case, direction: str, data: CaseData) -> float:
        entry = our_entries(spec, ["triton"])[0]
        fresh = replace(entry, name=f"triton {time.monotonic_ns()}")  # judged anew each time
        data.errors_of(fresh, entry.function)
        samples = data.samples(gpu.sample_count(data.sample_bytes()))
        task = task_of(Job(spec, case, direction, entry), samples, entry.function)
        timer = gpu.timer()
        plan = gpu.plan(task, timer)
        return statistics.median(timed_rounds(plan.target, plan.setup, timer, plan.rounds))

    return measure


def tune(
    specs: Sequence[OpSpec],
    tag: str,
    dtype: torch.dtype,
    device: torch.device,
    measure: Measure,
    minutes: float,
) -> dict[str, Any]:
    """Entries of the config file by "<kernel>/<bucket>", within a time budget shared evenly."""
    end = time.monotonic() + 60 * minutes
    found: list[Target] = []
    known: set[str] = set()
    for spec in specs:
        for case in spec.tagged(tag):
            for direction in (p for p in ("no-grad", "bwd") if p in passes_of(spec)):
                run = _runner(spec, case, direction, dtype, device)
                found += targets(spec, direction, case, run, known)
    entries = {}
    for k, target in enumerate(found):
        now = time.monotonic()
        share = (end - now) / (len(found) - k)
        print(f"{target.kernel}/{target.bucket} on {target.case.name}, {share:.0f} s", flush=True)
        data = CaseData(target.spec, target.case, dtype, device)
        entry = sweep(target, data, measure, now + share)
        if entry is not None:
            entries[f"{target.kernel}/{target.bucket}"] = entry
    return entries


def _runner(
    spec: OpSpec, case: Case, direction: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], Any]:
    """One run of our kernels in a pass, on the case's inputs."""

    def run() -> None:
        inputs = spec.make_inputs(case, dtype, device, 0)
        leaves = [inputs[name] for name in spec.grad_args if inputs.get(name) is not None]
        for leaf in leaves:
            leaf.requires_grad_(direction == "bwd")
        heads = heads_of(spec.op(**inputs, impl="triton"))
        if heads:
            upstream = [torch.randn_like(x) for x in heads]
            torch.autograd.grad(heads, leaves, upstream, allow_unused=True)

    return run


def write(path: Path, about: dict[str, Any], entries: dict[str, Any]) -> None:
    """Merge into what the file already holds; whole or not at all."""
    old = json.loads(path.read_text())["configs"] if path.exists() else {}
    kept = {key: about[key] for key in ("device", "torch", "triton", "commit", "date")}
    text = json.dumps(kept | {"configs": dict(sorted((old | entries).items()))}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(text + "\n")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to tune (default: all)")
    parser.add_argument("--minutes", type=float, default=4.0, help="time for the whole sweep")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="folder of the result (default: the library's)")
    parser.add_argument("--commit", help="what to record as the commit, where git is not there")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - OPS.keys())
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)} (there are {', '.join(OPS)})")
    if not torch.cuda.is_available():
        parser.exit(2, "bench.tune: needs a CUDA device; kernels are tuned where they run\n")
    gpu = Gpu()
    about = report.machine(gpu.device, options.commit)
    specs = [spec for name, spec in OPS.items() if spec.kernels and name in (options.ops or OPS)]
    dtype = getattr(torch, options.dtype)
    entries = tune(specs, "bench", dtype, gpu.device, measured_on(gpu), options.minutes)
    path = _launch.device_file(about["device"])
    path = path if options.out is None else options.out / path.name
    write(path, about, entries)
    for key, entry in entries.items():
        print(f"{key}: {entry['default_us']} -> {entry['us']} us with {entry['config']}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
