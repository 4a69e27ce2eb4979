"""Find launch configurations on this GPU, and write them as data.

From a kernel's default config the sweep goes downhill, one value at a time. Each config is compiled
ahead on all cores, where one that spills or does not fit is dropped, and held to the same tolerance
as a test before it is timed; one whose result is wrong is refused. What is found goes into
`stlm_kernels/tuned/<device>.json` at once, to be reviewed and committed. Another run goes on where
that file ends: with what was never swept, then with sweeps that had no time to reach their end.
"""

from __future__ import annotations

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

import torch

from stlm_kernels import _launch, terminal
from stlm_kernels._launch import Config
from stlm_kernels.inspect import inspect_op
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

from .harness import environment
from .harness.jobs import CaseData, Job, cases_of, our_entries, passes_of, roots_of, task_of
from .harness.results import write_json
from .harness.timing import Gpu, timed_rounds
from .resources import sources_sha256

LEAST, MOST = {"num_stages": 1}, {"num_warps": 16, "num_stages": 6}
"""Bounds of a config's values where they are not simply 1 and none."""

LEAST_SECONDS = 15.0
"""Least time of a sweep: with less it would not get beyond its first neighbours."""

Entry = dict[str, Any]
Measure = Callable[[OpSpec, Case, str, CaseData], float]
Usable = Callable[["Target", Sequence[Config]], list[Config]]


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


def lookups(
    run: Callable[[], Any], launched: _launch.Recorder = lambda *_: None
) -> list[tuple[str, str, Config]]:
    """Return (kernel, bucket, default) of each config that `run` asks for; `launched` is told of
    the launches, which reach no device."""
    found: list[tuple[str, str, Config]] = []
    # Compiling every kernel for this would take minutes of a GPU's time.
    with _launch.watching(lambda *asked: found.append(asked)), _launch.recording(launched):
        run()
    return found


def targets(
    spec: OpSpec, direction: str, case: Case, run: Callable[[], Any], known: set[str]
) -> Iterator[Target]:
    """Yield the kernels and buckets that this case reaches first."""
    for kernel, bucket, default in lookups(run):
        key = f"{kernel}/{bucket}"
        if key not in known:
            known.add(key)
            yield Target(spec, case, direction, kernel, bucket, default)


def neighbours(config: Config) -> Iterator[Config]:
    """Yield configs with one value changed: stages by one, others by a factor of two."""
    for key, value in config.items():
        steps = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if LEAST.get(key, 1) <= step <= MOST.get(key, step):
                yield config | {key: step}


def sweep(
    target: Target,
    data: CaseData,
    measure: Measure,
    usable: Usable,
    deadline: float,
    start: Config | None = None,
) -> Entry | None:
    """Return the fastest correct config met on the way down from the default before `deadline`.

    From the best config so far all neighbours are tried, until none is faster. None where not even
    the default was right. `start` is where an earlier sweep ended.
    """
    times: dict[tuple[int, ...], float | None] = {}

    def time_of(config: Config) -> float | None:
        key = tuple(config.values())
        if key not in times:
            times[key] = _measured(target, config, data, measure)
        return times[key]

    best, default_us = target.default, time_of(target.default)
    if default_us is None:
        return None
    best_us = default_us
    fresh = [start] if start is not None and start.keys() == best.keys() else []
    fresh += neighbours(best)
    moved, done = True, True
    while moved and done:
        moved = False
        for config in usable(target, [c for c in fresh if tuple(c.values()) not in times]):
            if time.monotonic() > deadline:
                done = False
                break
            us = time_of(config)
            if us is not None and us < best_us:
                best, best_us, moved = config, us, True
        fresh = list(neighbours(best))
    return {
        "config": best,
        "us": round(best_us, 3),
        "default_us": round(default_us, 3),
        "tried": len(times),
        "refused": sum(us is None for us in times.values()),
        "done": done,
    }


def _measured(target: Target, config: Config, data: CaseData, measure: Measure) -> float | None:
    """Return microseconds, or None for a config whose result is wrong or that does not run."""
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
    """Pool of processes that compile configs for a GPU, into the cache that the launch will read.

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


def _objection(
    op: str, case_name: str, kernel: str, config: Config, arch: int, dtype: torch.dtype
) -> str:
    """Return the reason why a config is not worth a launch; empty if it is."""
    torch.set_num_threads(1)
    spec = OPS[op]
    case = next(case for case in spec.cases if case.name == case_name)
    try:
        with _launch.overriding({kernel: config}):
            reports = inspect_op(spec, case, arch, dtype, disassemble=False)
    except Exception as error:  # whatever a compiler raises
        return _first_line(error)
    name = f"stlm_{kernel}"
    own = [x for x in reports if x.kernel == name]
    for found in own or [x for x in reports if x.kernel.startswith(name)]:  # two share a config
        if found.spill_instructions:
            return f"{found.spill_instructions} spills"
        if found.occupancy <= 0:
            return f"{found.shared_bytes} bytes of shared memory"
    return ""


def measured_on(gpu: Gpu) -> Measure:
    """Return a function that checks our kernels under the config in force, then times them."""

    def measure(spec: OpSpec, case: Case, direction: str, data: CaseData) -> float:
        entry = our_entries(spec, ["triton"])[0]
        fresh = replace(entry, name=f"triton {time.monotonic_ns()}")  # checked anew each time
        data.errors_of(fresh, entry.function)
        samples = data.samples(gpu.sample_count(data.sample_bytes()))
        task = task_of(Job(spec, case, direction, entry), samples, entry.function)
        timer = gpu.timer()
        plan = gpu.plan(task, timer)
        return statistics.median(timed_rounds(plan.target, plan.setup, timer, plan.rounds))

    return measure


def tune(
    found: Sequence[Target],
    dtype: torch.dtype,
    device: torch.device,
    measure: Measure,
    usable: Usable,
    end: float,
    old: dict[str, Entry],
    stamp: str,
) -> Iterator[tuple[str, Entry]]:
    """Yield entries of the config file, ("<kernel>/<bucket>", entry), as they are found.

    Args:
        found: what may be swept.
        dtype: of the float inputs.
        device: where the inputs go.
        measure: seconds of a config, in force, whose result is right.
        usable: which configs are worth a measurement.
        end: no sweep begins after it, by the monotonic clock; what is left is shared evenly.
        old: entries of earlier runs: those done under this stamp are kept.
        stamp: names what makes an old entry worthless when it changes.
    """
    left = [x for x in found if not _settled(old.get(x.key), stamp)]
    left.sort(key=lambda x: x.key in old)
    print(f"{len(left)} of {len(found)} kernels and buckets to sweep", flush=True)
    for k, target in enumerate(left):
        now = time.monotonic()
        if now >= end:
            print(f"no time is left for {len(left) - k} of them: run it again", flush=True)
            return
        share = max(LEAST_SECONDS, (end - now) / (len(left) - k))
        print(f"{target.key} on {target.case.name}, {share:.0f} s", flush=True)
        data = CaseData(target.spec, target.case, dtype, device)
        start = old.get(target.key, {}).get("config")
        entry = sweep(target, data, measure, usable, now + share, start)
        if entry is not None:
            yield target.key, entry | {"of": stamp}


def _settled(entry: Entry | None, stamp: str) -> bool:
    return entry is not None and bool(entry.get("done")) and entry.get("of") == stamp


def all_targets(
    specs: Sequence[OpSpec], tag: str, dtype: torch.dtype, device: torch.device
) -> list[Target]:
    """Return every kernel and bucket that the cases reach; nothing is launched to find out."""
    found: list[Target] = []
    known: set[str] = set()
    for spec in specs:
        for case in cases_of(spec, tag):
            for direction in (p for p in ("no-grad", "bwd") if p in passes_of(spec)):
                run = _runner(spec, case, direction, dtype, device)
                found += targets(spec, direction, case, run, known)
    return found


def _runner(
    spec: OpSpec, case: Case, direction: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], Any]:
    """Return a function that runs our kernels in a pass, on the case's inputs."""

    def run() -> None:
        inputs = spec.make_inputs(case, dtype, device, 0)
        leaves = [inputs[name] for name in spec.grad_args if inputs.get(name) is not None]
        for leaf in leaves:
            leaf.requires_grad_(direction == "bwd")
        roots = roots_of(spec.op(**inputs, impl="triton"))
        if roots:
            upstream = [torch.randn_like(x) for x in roots]
            torch.autograd.grad(roots, leaves, upstream, allow_unused=True)

    return run


def entries_of_file(path: Path) -> dict[str, Entry]:
    configs: dict[str, Entry] = json.loads(path.read_text())["configs"] if path.exists() else {}
    return configs


def write(path: Path, about: dict[str, Any], entries: dict[str, Entry]) -> None:
    """Merge entries into the file, whole or not at all."""
    old = entries_of_file(path)
    kept = {key: about[key] for key in ("device", "torch", "triton", "commit", "date")}
    write_json(path, kept | {"configs": dict(sorted((old | entries).items()))})


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("bench.tune", __doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to tune (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="time for the whole sweep (default: 4)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the float inputs (default: bfloat16)",
    )
    parser.add_argument("--out", type=Path, help="folder of the result (default: the library's)")
    parser.add_argument("--commit", help="what to record as the commit, where git is not there")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - OPS.keys())
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)} (there are {', '.join(OPS)})")
    if not torch.cuda.is_available():
        parser.exit(2, "bench.tune: needs a CUDA device; kernels are tuned where they run\n")
    gpu = Gpu()
    about = environment.describe(gpu.device, options.commit)
    specs = [spec for name, spec in OPS.items() if spec.kernels and name in (options.ops or OPS)]
    dtype = getattr(torch, options.dtype)
    major, minor = torch.cuda.get_device_capability(gpu.device)
    usable = Compilers(10 * major + minor, dtype).usable
    path = _launch.device_file(about["device"])
    path = path if options.out is None else options.out / path.name
    end = time.monotonic() + 60 * options.minutes
    found = all_targets(specs, "bench_full", dtype, gpu.device)
    stamp = f"triton {about['triton']}, kernels {sources_sha256()[:12]}, {options.dtype}"
    new = {}
    for key, entry in tune(
        found, dtype, gpu.device, measured_on(gpu), usable, end, entries_of_file(path), stamp
    ):
        new[key] = entry
        write(path, about, {key: entry})
    for key, entry in new.items():
        print(f"{key}: {entry['default_us']} -> {entry['us']} us with {entry['config']}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
