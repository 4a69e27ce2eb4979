"""The optimisers of a training run, and how their learning rates rise and fall."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers.joined import join_parts, row_splits
from .muon import Muon

WARM_UP = 0.02
DECAY = 0.5
SCHEDULES = ("wsd", "cosine")


class Optimizers:
    """Muon for the matrices between states, AdamW for tables, gains and null states.

    Each parameter is moved once, however many modules share it. Muon's are the weights of Linear
    layers alone: one that is also a table, or another module's parameter in any way, is AdamW's.

    Args:
        model: whose parameters they move; those that are frozen now stay as they are.
        muon_lr, adamw_lr: peak learning rates.
        muon_dtype: in which Muon multiplies, see `stlm_models.training.muon`.

    Raises:
        ValueError: for a model without a parameter that requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        muon_lr: float,
        adamw_lr: float,
        muon_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.names: dict[Tensor, str] = {
            parameter: name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if not self.names:
            raise ValueError("model: expected a parameter that requires a gradient, got none")
        others = _parameters_beside_linear_weights(model)
        matrices = [p for p in self.names if p not in others]
        rest = [p for p in self.names if p in others]
        self.model = model
        splits = {p: rows for p, rows in row_splits(model).items() if p in self.names}
        self.peaks = {"muon": muon_lr, "adamw": adamw_lr}
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(
                [{"params": matrices}],
                lr=muon_lr,
                weight_decay=0.1,
                dtype=muon_dtype,
                row_splits=splits,
            ),
            "adamw": torch.optim.AdamW(
                [{"params": rest}], lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
        }

    def step(self, lr_scale: float) -> None:
        """Move the parameters by their gradients, which are dropped after that."""
        for name, optimizer in self.parts.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * lr_scale
            optimizer.step()
            optimizer.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the parameters, by name."""
        return {
            f"{part}.{self.names[parameter]}.{key}": value
            for part, optimizer in self.parts.items()
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave, or gave while each matrix was a parameter of its own.

        Raises:
            ValueError: for a tensor that belongs to no parameter, or not to one of its shape.
        """
        parameters = {
            f"{part}.{self.names[parameter]}": (optimizer, parameter)
            for part, optimizer in self.parts.items()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for part in self.parts:
            for key in {name.rpartition(".")[2] for name in tensors}:
                tensors = join_parts(self.model, tensors, prefix=f"{part}.", suffix=f".{key}")
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition(".")
            if owner not in parameters:
                raise ValueError(f"checkpoint: {name} belongs to no parameter of this model")
            optimizer, parameter = parameters[owner]
            if tensor.shape not in ((), parameter.shape):
                expected, got = tuple(parameter.shape), tuple(tensor.shape)
                raise ValueError(f"checkpoint: {name}: expected shape {expected}, got {got}")
            # Counts of steps too: a fused AdamW reads them on the device.
            optimizer.state[parameter][key] = tensor.to(parameter.device)


def _parameters_beside_linear_weights(model: nn.Module) -> set[Tensor]:
    """The parameters that are anything but the (M, N) weight of Linear layers, somewhere."""
    return {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if not (isinstance(module, nn.Linear) and name == "weight" and parameter.ndim == 2)
    }


def lr_scale(progress: float, schedule: str = "wsd") -> float:
    """The share of its peak that a learning rate has when this part of the budget is used.

    Both rise over the first 2%. "wsd" (warm-up, stable, decay) then stays, and falls in a line to
    zero over the last half; "cosine" falls to zero along half a wave.

    Raises:
        ValueError: for another schedule.
    """
    left = max(0.0, 1 - progress)
    if schedule == "wsd":
        falling = left / DECAY
    elif schedule == "cosine":
        falling = (1 - math.cos(math.pi * left / (1 - WARM_UP))) / 2 if left < 1 - WARM_UP else 1.0
    else:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    return min(1.0, (progress + 1e-3) / WARM_UP, falling)
