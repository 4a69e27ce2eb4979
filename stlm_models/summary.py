"""`python -m stlm_models.summary`: parameters, work and memory of the presets, on real bytes.

Work and memory of activations are counted, not estimated: one training step of each model runs here
on a chunk of the standard library's source.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stlm_kernels.terminal import argument_parser, command

from .config import BOS_ID, ModelConfig
from .data.corpus import load_corpus
from .model import STLM
from .presets import BYTES_PER_WORD, PRESETS, preset
from .training.optim import Optimizers

SAMPLE_BYTES = 1024
MIB = 2**20


@dataclass(frozen=True)
class Summary:
    """Size and needs of a model, for one document of `n_bytes` in a training step.

    Args:
        parameters: how many, by part; a tied table counts once.
        bytes_per_patch: of the sample; of a model of words, bytes that a word stands for; 1 in a
            flat model of bytes.
        forward_flops: of evaluation, a multiply and an add being two.
        step_flops: of forward and backward.
        activation_bytes: what the forward pass keeps for the backward pass, besides parameters.
        state_bytes: parameters, their gradients, and the optimiser's state.
    """

    parameters: dict[str, int]
    n_bytes: int
    bytes_per_patch: float
    forward_flops: int
    step_flops: int
    activation_bytes: int
    state_bytes: int


def summarise(config: ModelConfig, text: bytes) -> Summary:
    """Build the model and train it for one step on `text`.

    Raises:
        ValueError: for an empty text.
    """
    if not text:
        raise ValueError("text: expected at least one byte, got none")
    model = STLM(config)
    # Work and memory do not depend on which words they are: as many ids as would fill the text.
    words = config.tokens == "words"
    read = text[: max(1, round(len(text) / BYTES_PER_WORD))] if words else text
    ids = torch.tensor([BOS_ID, *read[:-1]], dtype=torch.int16)
    targets = torch.tensor(list(read))
    n_patches = len(read) if model.is_flat else int(model.patcher(ids).n_patches)
    kept = _Kept(model)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.eval()(ids, targets)
    model.train()
    with FlopCounterMode(display=False) as step:
        with kept.counting():
            loss_sum, n_valid = model(ids, targets)
        (loss_sum / n_valid).backward()
    optimizers = Optimizers(model, muon_lr=1e-9, adamw_lr=1e-9)
    optimizers.step(1.0)
    state = [*model.parameters(), *model.parameters(), *optimizers.state_tensors().values()]
    return Summary(
        parameters={
            name: count
            for name, part in model.named_children()
            if (count := sum(p.numel() for p in part.parameters()))
        },
        n_bytes=len(text),
        bytes_per_patch=len(text) / n_patches,
        forward_flops=forward.get_total_flops(),
        step_flops=step.get_total_flops(),
        activation_bytes=kept.n_bytes,
        state_bytes=sum(x.numel() * x.element_size() for x in state),
    )


class _Kept:
    """Counts each storage once that autograd keeps, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.n_bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._alive: list[Tensor] = []  # an address must not be used twice while it is counted

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda x: x)

    def _note(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(x.detach())
            self.n_bytes += storage.nbytes()
        return x


def lines(name: str, found: Summary) -> list[str]:
    """One preset as text."""
    total, n = sum(found.parameters.values()), found.n_bytes
    parts = ", ".join(f"{part} {count / total:.1%}" for part, count in found.parameters.items())
    return [
        f"{name}: {total:,} parameters ({parts})",
        f"  {found.bytes_per_patch:.2f} bytes per patch or id; FLOPs per byte: forward"
        f" {found.forward_flops / n / 1e6:.2f} M, training {found.step_flops / n / 1e6:.2f} M",
        f"  training memory: weights, gradients, optimiser {found.state_bytes / MIB:,.0f} MiB,"
        f" activations {found.activation_bytes / n / 1024:.1f} KiB per byte of a batch (fp32)",
    ]


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser("stlm_models.summary", __doc__)
    parser.add_argument("presets", nargs="*", metavar="preset", help="default: all of them")
    names = parser.parse_args(arguments).presets or list(PRESETS)
    try:
        configs = {name: preset(name) for name in names}
    except ValueError as error:
        parser.error(str(error))
    text = b"".join(load_corpus(None).held_out)[:SAMPLE_BYTES]
    print(f"torch path on a CPU, on {len(text):,} bytes of the standard library's source")
    for name, config in configs.items():
        print("\n".join(lines(name, summarise(config, text))))


if __name__ == "__main__":
    sys.exit(main())
