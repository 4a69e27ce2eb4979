"""Facts of a run: device, versions, commit, date, and the load of the machine."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from stlm_kernels._dispatch import has_triton
from stlm_kernels._launch import device_file

from .timing import Ceilings


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return the facts that times depend on: `software`, and the state of the machine."""
    on_gpu = device.type == "cuda"
    about = software(device, commit)
    return about | {
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu_state": (_gpu_state() or "unknown") if on_gpu else "",
        "tuned": on_gpu and device_file(about["device"]).exists(),
    }


def software(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return device, versions, commit and date: all that counted figures depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton_version() -> str:
    if not has_triton():
        return "none"
    import triton

    return triton.__version__


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _commit() -> str:
    head = _command("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return f"{head}+changes" if _command("git", "status", "--porcelain") else head


def _gpu_state() -> str:
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    return _command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def header(about: dict[str, Any], ceilings: Ceilings | None) -> str:
    """Format the facts of a run as two or three lines."""
    configs = "tuned launch configs" if about["tuned"] else "default launch configs"
    lines = [
        f"{about['device']}, {about['threads']} threads; torch {about['torch']}, "
        f"triton {about['triton']}, Python {about['python']}",
        f"commit {about['commit']}, {about['date']}, {configs}",
    ]
    lines += busy_warning(about)
    if about["gpu_state"]:
        states = [about["gpu_state"], about.get("after", {}).get("gpu_state", "")]
        lines.append(f"driver, clocks, power, temperature: {', then '.join(filter(None, states))}")
    if ceilings is not None:
        lines.append(
            f"measured in this run: copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, "
            f"matmul {ceilings.matmul_flops_per_s / 1e12:.3f} TFLOP/s"
        )
        if not about["gpu_state"]:
            lines.append(
                "a roofline share above 100%: it stayed in caches, or needed less arithmetic than"
                " the kernels' floor counts"
            )
    return "\n".join(lines)


def busy_warning(about: dict[str, Any]) -> list[str]:
    """Return a warning where the machine was busy at the start: later a run makes a load itself."""
    if about.get("load", 0.0) <= 0.5:
        return []
    return [f"THE MACHINE WAS BUSY (load {about['load']:.1f} at the start): do not quote"]
