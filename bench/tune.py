"""`python -m bench.tune [op...] --minutes 4`: find launch configs on this GPU, write them as data.

From a kernel's default config the sweep goes downhill, one value at a time. Each config is compiled
ahead on all cores, where one that spills or does not fit is dropped, and held to the same tolerance
as a test before it is timed; one whose result is wrong is refused. What is found goes into
`stlm_kernels/tuned/<device>.json`, to be reviewed and committed; kernels and buckets that were not
swept keep their entries, so a second run goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from stlm_kernels import _launch
from stlm_kernels._launch import Config
from stlm_kernels._spec import Case, OpSpec
from stlm_kernels.inspect import inspect_op
from stlm_kernels.registry import OPS

from . import report
from .timing import Gpu, timed_rounds
from .work import CaseData, Job, cases_of, heads_of, our_entries, passes_of, task_of

LEAST, MOST = {"num_stages": 1}, {"num_warps": 16, "num_stages": 6}
"""Bounds of a config's values where they are not simply 1 and none."""

Measure = Callable[[OpSpec, Case, str, CaseData], float]
Usable = Callable[["Target", Sequence[Config]], list[Config]]


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
    """What this case reaches in this pass that was not met before."""
    for kernel, bucket, default in lookups(spec, run):
        key = f"{kernel}/{bucket}"
        if key not in known:
            known.add(key)
            yield Target(spec, case, direction, kernel, bucket, default)


def neighbours(config: Config) -> Iterator[Config]:
    """One value changed at a time: the number of stages by one, all others by a factor of two."""
    for key, value in config.items():
        steps = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if LEAST.get(key, 1) <= step <= MOST.get(key, step):
                yield config | {key: step}


def sweep(
    target: Target, data: CaseData, measure: Measure, usable: Usable, deadline: float
) -> dict[str, Any] | None:
    """The fastest right config met on the way down from the default before `deadline`.

    From the best config so far all neighbours are tried, until none is faster. None where not even
    the default was right.
    """
    times: dict[tuple[int, ...], float | None] = {}

    def time_of(config: Config) -> float | None:
        key = tuple(config.values())
        if key not in times:
            times[key] = _measured(target, config, data, measure)
        return times[key]

    best, best_us = target.default, time_of(target.default)
    if best_us is None:
        return None
    moved = True
    while moved:
        moved = False
        fresh = [c for c in neighbours(best) if tuple(c.values()) not in times]
        for config in usable(target, fresh):
            if time.monotonic() > deadline:
                break
            us = time_of(config)
            if us is not None and us < best_us:
                best, best_us, moved = config, us, True
    return {
        "config": best,
        "us": round(best_us, 3),
        "default_us": round(times[tuple(target.default.values())] or 0.0, 3),
        "tried": len(times),
        "refused": sum(us is None for us in times.values()),
    }


def _measured(target: Target, config: Config, data: CaseData, measure: Measure) -> float | None:
    """Microseconds, or None for a config whose result is wrong or that does not run."""
    try:
        with _launch.overriding({target.kernel: config}):
            us = measure(target.spec, target.case, target.direction, data) * 1e6
    except Exception as error:  # whatever a compiler, a launch or a wrong result raises
        print(f"  refused {config}: {_first_line(error)}", flush=True)
        return None
    print(f"  {us:9.1f} us  {config}", flush=True)
    return us


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))


class Compilers:
    """Processes that compile configs for a GPU, into the cache that the launch will read.

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
        """Those that compile, fit, and do not spill."""
        place = (target.spec.name, target.case.name, target.kernel)
        jobs = [self.pool.submit(_objection, *place, c, self.arch, self.dtype) for c in configs]
        objections = [job.result() for job in jobs]
        for config, objection in zip(configs, objections, strict=True):
            if objection:
                print(f"  dropped {config}: {objection}", flush=True)
        return [c for c, objection in zip(configs, objections, strict=True) if not objection]


def _objection(
    op: str, case_name: str, kernel: str, config: Config, arch: int, dtype: torch.dtype
) -> str:
    """Why a config is not worth a launch; empty if it is."""
    torch.set_num_threads(1)
    spec = OPS[op]
    case = next(case for case in spec.cases if case.name == case_name)
    try:
        with _launch.overriding({kernel: config}):
            reports = inspect_op(spec, case, arch, dtype)
    except Exception as error:  # whatever a compiler raises
        return _first_line(error)
    for found in reports:
        if found.kernel == f"stlm_{kernel}":
            if found.spill_instructions:
                return f"{found.spill_instructions} spills"
            if found.occupancy <= 0:
                return f"{found.shared_bytes} bytes of shared memory"
    return ""


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
    usable: Usable,
    minutes: float,
) -> dict[str, Any]:
    """Entries of the config file by "<kernel>/<bucket>", within a time budget shared evenly."""
    end = time.monotonic() + 60 * minutes
    found: list[Target] = []
    known: set[str] = set()
    for spec in specs:
        for case in cases_of(spec, tag):
            for direction in (p for p in ("no-grad", "bwd") if p in passes_of(spec)):
                run = _runner(spec, case, direction, dtype, device)
                found += targets(spec, direction, case, run, known)
    entries = {}
    for k, target in enumerate(found):
        now = time.monotonic()
        share = (end - now) / (len(found) - k)
        print(f"{target.kernel}/{target.bucket} on {target.case.name}, {share:.0f} s", flush=True)
        data = CaseData(target.spec, target.case, dtype, device)
        entry = sweep(target, data, measure, usable, now + share)
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
    major, minor = torch.cuda.get_device_capability(gpu.device)
    usable = Compilers(10 * major + minor, dtype).usable
    entries = tune(
        specs, "bench_full", dtype, gpu.device, measured_on(gpu), usable, options.minutes
    )
    path = _launch.device_file(about["device"])
    path = path if options.out is None else options.out / path.name
    write(path, about, entries)
    for key, entry in entries.items():
        print(f"{key}: {entry['default_us']} -> {entry['us']} us with {entry['config']}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
