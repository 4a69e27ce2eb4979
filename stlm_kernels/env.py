"""`python -m stlm_kernels.env`: versions, device, and which path each op takes here, and why.

What a bug report needs. Nothing is sent anywhere.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

from ._dispatch import explain, kernels_interpreted
from ._launch import device_file
from ._version import __version__
from .registry import OPS
from .terminal import argument_parser, command

PACKAGES = ("torch", "triton", "einops", "numpy", "safetensors", "pytest-benchmark")


def version_of(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)  # with the build's suffix, which a wheel's metadata may lack
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_device() -> list[str]:
    """Lines on the device that tensors would be put on."""
    if not torch.cuda.is_available():
        return ["device: cpu, no CUDA device"]
    properties = torch.cuda.get_device_properties(0)
    tuned = device_file(properties.name)
    return [
        f"device: {properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} SMs, {properties.total_memory >> 20} MiB",
        f"CUDA: {torch.version.cuda}",
        f"tuned configurations: {tuned.name if tuned.exists() else 'none, plain defaults'}",
    ]


def describe_ops() -> list[str]:
    """Return for each op the path that impl="auto" takes on a small bf16 case, and why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for name, spec in OPS.items():
        inputs = spec.make_inputs(spec.tagged("smoke")[0], torch.bfloat16, device, 0)
        reasons = explain(name, **spec.arguments(inputs))
        lines.append(f"  {name}: {'torch: ' + '; '.join(reasons) if reasons else 'triton'}")
    return lines


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print what this machine has and what the ops make of it."""
    argument_parser("stlm_kernels.env", __doc__).parse_args(arguments)
    print(f"stlm: {__version__}")
    print(f"python: {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package}: {version_of(package)}")
    print("\n".join(describe_device()))
    print(f"kernels interpreted: {'yes' if kernels_interpreted() else 'no'}")
    print("ops (impl='auto'):")
    print("\n".join(describe_ops()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
