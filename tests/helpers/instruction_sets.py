"""The value tests under other instruction sets: no result may hang on how a CPU rounds.

    python tests/helpers/instruction_sets.py             every set, both CPU lanes, 20 seeds
    python tests/helpers/instruction_sets.py --critical  the critical tests under one set
    python tests/helpers/instruction_sets.py --only Zen  the sets with this in their name

ATEN_CPU_CAPABILITY decides for torch's own loops, MKL_* for its matrix products, OPENBLAS_CORETYPE
for numpy's, in which triton's interpreter computes. A set that this CPU lacks is skipped, and said
so. A run fails when a test does, or comes near its limit without a reason (`helpers/margins.py`).
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SETS = {
    "ATEN_CPU_CAPABILITY=default": "",
    "ATEN_CPU_CAPABILITY=avx2": "avx2",
    "MKL_ENABLE_INSTRUCTIONS=AVX2": "avx2",
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2": "sse4_2",
    "MKL_CBWR=COMPATIBLE": "",  # plain SSE2 on any CPU: the sets above are for Intel's alone
    "OPENBLAS_CORETYPE=Haswell": "avx2",
    "OPENBLAS_CORETYPE=Zen": "avx2",
    "OPENBLAS_CORETYPE=SkylakeX": "avx512f",
}
"""Flag of the CPU that each needs, as the kernel names it."""

CRITICAL = (
    "ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE "
    "OPENBLAS_CORETYPE=Haswell"
)

MODELS = (
    "naive", "transforms", "models", "cached", "flat", "options", "modules", "inputs",
    "objectives", "router", "tied_embedding", "generate", "training", "large_vocabulary",
)  # fmt: skip
OPS = tuple(sorted(x.parent.name for x in (ROOT / "stlm_kernels/ops").glob("*/op.py")))


def files(*names: str) -> list[str]:
    """Return the test files of these names, whichever folder of `tests/` holds them."""
    wanted = {f"test_{name}.py" for name in names}
    found = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if path.name in wanted)
    assert len(found) == len(wanted), f"no file for some of {sorted(wanted)}"
    return [str(path.relative_to(ROOT)) for path in found]


JUDGED = ("-k", "values or cancel or equals_the_reference or equal_the_reference or digits")
SEEDS = ("--seeds", "20")
EVERY_VALUE = {
    "cpu": [*files("ops", *MODELS, *OPS), *SEEDS],
    # Kernels against the reference, where triton's interpreter takes minutes over a whole lane.
    "interpret": [*files("ops", "linear_logprobs", "linear_cross_entropy"), *SEEDS, *JUDGED],
}
FEW_VALUES = {
    "cpu": [
        *files("ops", "naive", "transforms"),
        "-k",
        "float32 and (values or test_what_cancels) or naive_model or by_themselves",
    ],
    "interpret": [*files("ops"), "-k", "test_what_cancels"],
}


def cpu_flags() -> set[str]:
    """Return the CPU's flags; none where the system does not list them."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()[2:]}


def is_intel() -> bool:
    listed = Path("/proc/cpuinfo")
    return listed.exists() and "GenuineIntel" in listed.read_text()


def run(settings: str, lane: str, tests: list[str]) -> int:
    """pytest's exit status under these settings."""
    own = dict(pair.split("=") for pair in settings.split())
    clean = {k: v for k, v in os.environ.items() if k not in {s.split("=")[0] for s in SETS}}
    command = [sys.executable, "-m", "pytest", "-q", "--lane", lane, "--margins", *tests]
    print(f"== {settings}: lane {lane}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"} | own).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--critical", action="store_true", help="the critical tests under one set")
    parser.add_argument("--only", default="", help="the sets with this in their name")
    chosen = parser.parse_args()
    if chosen.critical:
        return max(run(CRITICAL, *each) for each in FEW_VALUES.items())
    flags, failed = cpu_flags(), []
    print(f"CPU: {platform.processor() or platform.machine()}, Intel: {is_intel()}")
    for settings, need in SETS.items():
        if chosen.only not in settings:
            continue
        if need and need not in flags:
            print(f"== {settings}: skipped, this CPU has no {need}")
            continue
        if settings.startswith("MKL_ENABLE") and not is_intel():
            print(f"== {settings}: MKL may not heed it here; MKL_CBWR=COMPATIBLE is heeded")
        failed += [f"{settings} {lane}" for lane, tests in EVERY_VALUE.items()
                   if run(settings, lane, tests)]  # fmt: skip
    print("every set passed" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
