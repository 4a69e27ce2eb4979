"""Find launch configurations on this GPU, and write them as data.

From a kernel's default config the sweep goes downhill, one value at a time. Each config is compiled
ahead on all cores, where one that spills or does not fit is dropped, and held to the same tolerance
as a test before it is timed; one whose result is wrong is refused, and one whose counted bound is
beyond the best time is not timed. What is found goes into `stlm_kernels/tuned/<device>.json` at
once, to be reviewed and committed. Another run goes on where that file ends: with what was never
swept, then with sweeps that had no time to reach their end.

With `--bounds` nothing is timed or written, and no GPU is needed: configs are ranked by their bound
alone, which knows nothing of waiting, of latency and of how many programs an SM holds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stlm_kernels import _launch, terminal
from stlm_kernels._launch import Config
from stlm_kernels.inspect import gpu_for
from stlm_kernels.ptx.bounds import Device
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

from .harness import environment
from .harness.candidates import Candidates, Target, countable, first_line, neighbours
from .harness.jobs import CaseData, Job, cases_of, our_entries, passes_of, roots_of, task_of
from .harness.results import write_json
from .harness.timing import Gpu, timed_rounds
from .resources import sources_sha256

LEAST_SECONDS = 15.0
"""Least time of a sweep: with less it would not get beyond its first neighbours."""

Entry = dict[str, Any]
Measure = Callable[[OpSpec, Case, str, CaseData], float]
Usable = Callable[[Target, Sequence[Config]], list[Config]]
LeastUs = Callable[[Target, Sequence[Config]], list[float]]


def lookups(
    run: Callable[[], Any],
    launched: _launch.Recorder = lambda *_: None,
    gpu: _launch.Gpu | None = None,
) -> list[tuple[str, str, Config]]:
    """Return (kernel, bucket, default) of each config that `run` asks for; `launched` is told of
    the launches, which reach no device."""
    found: list[tuple[str, str, Config]] = []
    # Compiling every kernel for this would take minutes of a GPU's time.
    with _launch.watching(lambda *asked: found.append(asked)), _launch.recording(launched, gpu):
        run()
    return found


def targets(
    spec: OpSpec,
    direction: str,
    case: Case,
    run: Callable[[], Any],
    known: set[str],
    gpu: _launch.Gpu | None = None,
) -> Iterator[Target]:
    """Yield the kernels and buckets that this case reaches first."""
    for kernel, bucket, default in lookups(run, gpu=gpu):
        key = f"{kernel}/{bucket}"
        if key not in known:
            known.add(key)
            yield Target(spec, case, direction, kernel, bucket, default)


def sweep(
    target: Target,
    data: CaseData,
    measure: Measure,
    usable: Usable,
    least_us: LeastUs,
    deadline: float,
    start: Config | None = None,
) -> Entry | None:
    """Return the fastest correct config met on the way down from the default before `deadline`.

    From the best config so far all neighbours are tried, those with the lowest bound first, until
    none is faster; one whose bound is beyond the best time cannot be, and is not timed. None where
    not even the default was right. `start` is where an earlier sweep ended.
    """
    pruned = 0
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
        untried = usable(target, [c for c in fresh if tuple(c.values()) not in times])
        for least, config in by_bound(target, untried, least_us):
            if time.monotonic() > deadline:
                done = False
                break
            if least >= best_us:
                pruned += 1
                print(f"  pruned: at least {least:.1f} us  {config}", flush=True)
                continue
            us = time_of(config)
            if us is not None and us < best_us:
                best, best_us, moved = config, us, True
        fresh = list(neighbours(best))
    return {
        "config": best,
        "us": round(best_us, 3),
        "default_us": round(default_us, 3),
        "tried": len(times),
        "pruned": pruned,
        "refused": sum(us is None for us in times.values()),
        "done": done,
    }


def by_bound(
    target: Target, configs: Sequence[Config], least_us: LeastUs
) -> list[tuple[float, Config]]:
    """Return (bound in microseconds, config), the lowest bound first."""
    bounds = least_us(target, configs)
    return sorted(zip(bounds, configs, strict=True), key=lambda pair: pair[0])


def ranking(
    target: Target, usable: Usable, least_us: LeastUs, deadline: float
) -> list[tuple[float, Config]]:
    """Return what `by_bound` does for the default and all that was met on the way down from it."""
    ranked = by_bound(target, [target.default], least_us)
    best = None
    while ranked[0][1] != best and time.monotonic() < deadline:
        best = ranked[0][1]
        known = [config for _, config in ranked]
        fresh = [config for config in neighbours(best) if config not in known]
        ranked += by_bound(target, usable(target, fresh), least_us)
        ranked.sort(key=lambda pair: pair[0])
    return ranked


def _measured(target: Target, config: Config, data: CaseData, measure: Measure) -> float | None:
    """Return microseconds, or None for a config whose result is wrong or that does not run."""
    try:
        with _launch.overriding({target.kernel: config}):
            us = measure(target.spec, target.case, target.direction, data) * 1e6
    except Exception as error:  # whatever a compiler, a launch or a wrong result raises
        print(f"  refused {config}: {first_line(error)}", flush=True)
        return None
    print(f"  {us:9.1f} us  {config}", flush=True)
    return us


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
    least_us: LeastUs,
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
        usable: which configs compile, fit and do not spill.
        least_us: microseconds of the pass at least, under each config.
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
        entry = sweep(target, data, measure, usable, least_us, now + share, start)
        if entry is not None:
            yield target.key, entry | {"of": stamp}


def _settled(entry: Entry | None, stamp: str) -> bool:
    return entry is not None and bool(entry.get("done")) and entry.get("of") == stamp


def all_targets(
    specs: Sequence[OpSpec],
    tag: str,
    dtype: torch.dtype,
    device: torch.device,
    gpu: _launch.Gpu | None = None,
) -> list[Target]:
    """Return every kernel and bucket that the cases reach; nothing is launched to find out.

    With a GPU that is not here, `gpu`, those of small cases alone, which can be counted.
    """
    found: list[Target] = []
    known: set[str] = set()
    for spec in specs:
        for case in cases_of(spec, tag):
            if gpu is not None and not countable(spec, case, dtype):
                continue
            for direction in (p for p in ("no-grad", "bwd") if p in passes_of(spec)):
                run = _runner(spec, case, direction, dtype, device)
                found += targets(spec, direction, case, run, known, gpu)
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


def print_rankings(
    specs: Sequence[OpSpec], dtype: torch.dtype, arch: int, end: float, tag: str = "bench_full"
) -> None:
    """Print (bound in microseconds, share of the default's, config) for each kernel and bucket."""
    candidates = Candidates(arch, dtype)
    for target in all_targets(specs, tag, dtype, torch.device("cpu"), gpu_for(arch)):
        if time.monotonic() >= end:
            print("no time is left: name fewer ops, or give it more --minutes")
            return
        print(f"{target.key} on {target.case.name}: bounds of the pass, not times", flush=True)
        ranked = ranking(target, candidates.usable, candidates.least_us, end)
        default = next(us for us, config in ranked if config == target.default)
        for us, config in ranked:
            print(f"  {us:9.1f} us  {us / default:5.2f}x the default's  {config}", flush=True)


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
    parser.add_argument(
        "--bounds", action="store_true", help="rank by counted bounds, without a GPU"
    )
    parser.add_argument("--device", default="h200", help="whose bounds (default: h200)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - OPS.keys())
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)} (there are {', '.join(OPS)})")
    specs = [spec for name, spec in OPS.items() if spec.kernels and name in (options.ops or OPS)]
    dtype = getattr(torch, options.dtype)
    end = time.monotonic() + 60 * options.minutes
    if options.bounds:
        try:
            print_rankings(specs, dtype, Device.load(options.device).arch, end)
        except ValueError as error:
            parser.error(str(error))
        return 0
    if not torch.cuda.is_available():
        parser.exit(2, "bench.tune: needs a CUDA device to time kernels; --bounds needs none\n")
    gpu = Gpu()
    about = environment.describe(gpu.device, options.commit)
    major, minor = torch.cuda.get_device_capability(gpu.device)
    candidates = Candidates(10 * major + minor, dtype)
    path = _launch.device_file(about["device"])
    path = path if options.out is None else options.out / path.name
    found = all_targets(specs, "bench_full", dtype, gpu.device)
    stamp = f"triton {about['triton']}, kernels {sources_sha256()[:12]}, {options.dtype}"
    new = {}
    for key, entry in tune(
        found, dtype, gpu.device, measured_on(gpu), candidates.usable, candidates.least_us, end,
        entries_of_file(path), stamp,
    ):  # fmt: skip
        new[key] = entry
        write(path, about, {key: entry})
    for key, entry in new.items():
        print(f"{key}: {entry['default_us']} -> {entry['us']} us with {entry['config']}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
