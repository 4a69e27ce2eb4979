"""Modules that importing the packages loads, each time in a fresh process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stlm_kernels._dispatch import machine_reasons

ROOT = Path(__file__).parents[2]
LOADED = """
import json, sys, torch
before = set(sys.modules)
import {package}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HEAVY = ("triton", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor")


def run(code: str) -> str:
    """Run code in a fresh interpreter; its output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def loaded_by(package: str) -> list[str]:
    """Modules that a package loads beyond those of torch."""
    modules = json.loads(run(LOADED.format(package=package)))
    assert package in modules
    return modules


@pytest.mark.parametrize(
    ("package", "others"),
    [("stlm_kernels", set()), ("stlm_models", {"stlm_kernels", "numpy"})],
)
def test_importing_a_package_loads_little_beyond_torch(package: str, others: set[str]) -> None:
    modules = loaded_by(package)
    assert not [name for name in modules if name.startswith(HEAVY)]
    roots = {name.split(".")[0] for name in modules} - {"torch"}
    assert roots - set(sys.stdlib_module_names) <= {package, *others}


def test_importing_the_package_decorates_no_kernel() -> None:
    """Triton reads its settings when it decorates, so that must wait until a kernel is wanted."""
    assert "stlm_kernels._triton.tiles" not in loaded_by("stlm_kernels")


WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None  # importing it now fails as if it were not installed
"""


# What Python has on Linux and not on Windows, as far as torch itself does without it.
OTHER_SYSTEM = (
    WITHOUT
    + """
import os, signal, torch
for name in ("fcntl", "resource", "termios", "tty", "pty", "syslog", "grp", "pwd"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "sched_getaffinity", "getuid", "sysconf", "uname", "getloadavg"):
    vars(os).pop(name, None)
for name in [name for name in vars(signal) if name.startswith("SIG")]:
    if name not in ("SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN"):
        delattr(signal, name)
sys.platform = "win32"
import importlib, pkgutil, stlm_kernels, stlm_models
# They need the package that is missing.
kernels = ("triton_impl", "chunked_impl", "dlogits_impl", "backward_impl", "short_impl",
           "gain_impl", "product_impl", "blocks")  # fmt: skip
skipped = (*kernels, "_triton", "huggingface")
for package in (stlm_kernels, stlm_models):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not any(part in skipped for part in found.name.split(".")):
            importlib.import_module(found.name)
print(stlm_kernels.explain("unpool", torch.ones(1, 2), torch.zeros(1, dtype=torch.int32)))
"""
)


def test_import_needs_nothing_of_linux_and_nothing_optional() -> None:
    missing = ["triton", "safetensors", "tqdm", "matplotlib", "transformers"]
    reasons = run(OTHER_SYSTEM.format(missing=missing))
    assert "triton is not installed, and is released for Linux only" in reasons


OPS_WITHOUT_TRITON = (
    WITHOUT
    + """
import torch, stlm_kernels
from stlm_kernels.registry import OPS
for name, spec in OPS.items():
    inputs = spec.make_inputs(spec.tagged("smoke")[0], torch.float32, torch.device("cpu"), 0)
    for argument in spec.grad_args:
        if inputs.get(argument) is not None:
            inputs[argument].requires_grad_()
    out = spec.op(**inputs)
    out = [x for x in ([out] if isinstance(out, torch.Tensor) else out) if x.requires_grad]
    for x in out:
        x.sum().backward(retain_graph=True)
    reason = "triton is not installed (pip install triton)"
    assert reason in stlm_kernels.explain(name, **spec.arguments(inputs)), name
    try:
        spec.op(**inputs, impl="triton")
    except NotImplementedError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(f"{{name}}: no kernel can have run")
from stlm_models import STLM, ModelConfig
model = STLM(ModelConfig(byte_dim=16, core_dim=16, core_ff=16, core_layers=1, decoder_ff=16))
loss_sum, _ = model(torch.tensor([[256, 1, 2, 3]]), torch.tensor([[1, 2, 3, 4]]))
loss_sum.backward()
assert len(model.generate(b"ab", max_new_bytes=2, seed=0)) == 2
print(f"{{len(OPS)}} ops")
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the reason is another one")
def test_every_op_runs_without_triton_and_says_why_no_kernel_does() -> None:
    from stlm_kernels.registry import OPS

    assert run(OPS_WITHOUT_TRITON.format(missing=["triton"])) == f"{len(OPS)} ops\n"


FORMULAS = """
{imports}
import inspect
from stlm_kernels.registry import OPS
from torch.utils import flop_counter
counted = flop_counter.FlopCounterMode(display=False).flop_registry
for spec in OPS.values():
    for way in ("fwd", "bwd"):
        packet = getattr(torch.ops.stlm, f"{{spec.name}}_{{way}}", None)
        if packet is not None:
            print(packet, packet in counted)
# The source of torch's counter is still found where it is asked for.
assert "class FlopCounterMode" in inspect.getsource(flop_counter)
assert flop_counter.__spec__.origin == flop_counter.__file__
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, stlm_kernels",
        "import torch, torch.utils.flop_counter, stlm_kernels",
        "import sys, torch, stlm_kernels; sys.modules['triton'] = None",
    ],
)
def test_flop_formulas_are_there_whatever_imports_the_counter(imports: str) -> None:
    lines = run(FORMULAS.format(imports=imports)).splitlines()
    assert len(lines) > 20
    assert not [line for line in lines if not line.endswith(" True")]


def test_the_mark_for_the_compiler_is_that_of_torch() -> None:
    @torch.compiler.assume_constant_result
    def marked() -> None: ...

    assert vars(machine_reasons) == vars(marked)
