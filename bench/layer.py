"""Count a byte-rate layer forward and backward beside its baseline; no GPU is needed.

The layer is what a block of `stlm_models` calls: qkv_rope, attention, addmm, swiglu. The baseline
is what it called before there were qkv_rope and swiglu: F.rms_norm, a F.linear for each matrix,
qk_norm_rope, the same attention, F.silu and sums. Kernels are compiled and run on the CPU, some
blocks of each launch; operators of torch count the bytes of their tensors, each once. A norm of
torch is one launch each way, as it is on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels import attention, qk_norm_rope, qkv_rope, swiglu, terminal
from stlm_kernels.ptx.bounds import Device, bounds_of, bounds_of_torch_op
from stlm_kernels.ptx.faults import KINDS
from stlm_kernels.ptx.reports import SAMPLE
from stlm_kernels.ptx.session import Session, executing
from stlm_kernels.spec_inputs import untouched_zeros

from .harness import environment
from .harness.commandline import positive
from .harness.launches import MORE
from .harness.results import Record, Result, add_result_options, command_line, result_path

DTYPE = torch.bfloat16
AIMS = {"launches": 12, "dram_bytes": 0.35, "issue_over_matrix": 1.3}
"""Of our layer: launches, DRAM bytes over the baseline's, bound of issue over that of matrices."""


class Layer:
    """Operands of a layer of D columns, F of its hidden layer, and heads of K columns."""

    def __init__(self, tokens: int, dim: int, hidden: int, width: int, window: int) -> None:
        self.heads, self.window = dim // width, window
        self.x = untouched_zeros(tokens, dim, dtype=DTYPE).requires_grad_()
        shapes: dict[str, tuple[int, ...]] = {
            "qkv": (3 * dim, dim),
            "out": (dim, dim),
            "up": (2 * hidden, dim),
        }
        shapes |= {"down": (dim, hidden), "q": (width,), "k": (width,)}
        self.weights = {
            name: torch.zeros(shape, dtype=DTYPE, requires_grad=True)
            for name, shape in shapes.items()
        }
        self.angles = torch.zeros(tokens, width // 2)
        self.documents = torch.tensor([0, tokens], dtype=torch.int32)

    def ours(self) -> Tensor:
        w = self.weights
        q, k, v, same = qkv_rope(
            self.x, None, w["qkv"], self.angles, self.angles, heads=self.heads,
            kv_heads=self.heads, q_weight=w["q"], k_weight=w["k"], residual=True,
            impl="triton",
        )  # fmt: skip
        x = torch.addmm(same, self._mixed(q, k, v), w["out"].t())
        return swiglu(x, None, w["up"], w["down"], impl="triton")

    def baseline(self) -> Tensor:
        w = self.weights
        normed = _norm(self.x)
        q, k, v = (
            F.linear(normed, each).unflatten(-1, (self.heads, -1)) for each in w["qkv"].chunk(3)
        )
        q, k = qk_norm_rope(
            q, k, self.angles, self.angles, q_weight=w["q"], k_weight=w["k"], impl="triton"
        )
        x = self.x + F.linear(self._mixed(q, k, v), w["out"])
        normed = _norm(x)
        gate, up = (F.linear(normed, each) for each in w["up"].chunk(2))
        return x + F.linear(F.silu(gate) * up, w["down"])

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"window": self.window, "cu_seqlens": self.documents}
        return attention(q, k, v, **options, impl="triton").flatten(1)


class _Norm(torch.autograd.Function):
    """An operator each way that touches what a norm in one launch touches; values mean nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.new_empty(len(x), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0] + grads[0]


def _norm(x: Tensor) -> Tensor:
    out: Tensor = _Norm.apply(x)
    return out


def executed(layer: Layer, function: Callable[[], Tensor], arch: int, sample: int) -> Session:
    """Run a layer forward and backward with its launches counted."""
    leaves = [layer.x, *layer.weights.values()]
    with executing(arch=arch, collect=KINDS, costs=True, sample=sample) as session:
        out = function()
        upstream = untouched_zeros(*out.shape, dtype=DTYPE)
        torch.autograd.grad(out, leaves, upstream)
    return session


def counted(name: str, session: Session, device: Device) -> Record:
    """Return launches, bytes and bounds of a run."""
    kernels = [bounds_of(done, device) for done in session.executions]
    operators = [bounds_of_torch_op(op, device) for op in session.torch_ops if op.nbytes]
    found = [*kernels, *operators]
    limits = ("issue", "matrix", "dram", "l2")
    return {
        "by": name,
        "launches": len(kernels)
        + sum(MORE.get(x.kernel.removeprefix("aten::"), 1) for x in operators),
        "dram_bytes": round(sum(x.counts["dram_bytes"] for x in found)),
        "bound": round(sum(x.largest for x in found), 3),
        "us": {limit: round(sum(x.us.get(limit, 0.0) for x in found), 3) for limit in limits},
        # An operator of torch has no instructions to count: of our kernels alone.
        "issue_over_matrix": round(
            sum(x.us.get("issue", 0.0) for x in kernels)
            / max(sum(x.us.get("matrix", 0.0) for x in kernels), 1e-9),
            3,
        ),
        "each": [
            {
                "launch": x.kernel,
                "dram_bytes": round(x.counts["dram_bytes"]),
                "bound": round(x.largest, 3),
            }
            for x in found
        ],
    }


def line(row: Record) -> str:
    limits = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    return (
        f"{row['by']:<8} {row['launches']:3d} launches  DRAM {row['dram_bytes'] / 1e6:7,.1f} MB"
        f"  at least {row['bound']:7.1f} us in sum ({limits});"
        f" kernels' issue {row['issue_over_matrix']:.2f} of their matrix"
    )


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.layer", __doc__)
    sizes = {"tokens": 65536, "dim": 256, "hidden": 768, "width": 64, "window": 256}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=size, help=f"(default: {size})")
    parser.add_argument("--device", default="h200", help="whose rates make the bounds")
    parser.add_argument("--sample", type=positive, default=SAMPLE, help="blocks of each launch")
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "layer", parser)
    device = Device.load(options.device)
    about = environment.software(torch.device("cpu"), options.commit)
    settings = {name: getattr(options, name) for name in sizes}
    rows = []
    for name in ("baseline", "ours"):
        layer = Layer(**settings)
        session = executed(layer, getattr(layer, name), device.arch, options.sample)
        rows.append(counted(name, session, device))
    share = rows[1]["dram_bytes"] / rows[0]["dram_bytes"]
    summary = [
        f"{device.name}, bf16: counted, not timed",
        *map(line, rows),
        f"DRAM bytes {share:.3f} of the baseline's",
    ]
    print(*summary, sep="\n")
    settings |= {"bounds_on": device.name, "aims": AIMS, "sampled_blocks": options.sample}
    Result(command_line("bench.layer", arguments), about, rows, summary, settings).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
