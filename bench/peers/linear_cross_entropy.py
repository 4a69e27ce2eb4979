"""Peers of linear_cross_entropy, linear_logprobs and linear_kl_div."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, compiled
from .installed import function_of, on_gpu, why_missing


def _logits(inputs: Inputs) -> Tensor:
    z = F.linear(inputs["input"], inputs["linear_weight"], inputs.get("linear_bias"))
    return (z * inputs["logit_scale"] if inputs["logit_scale"] != 1 else z).float()


def _plain_head(case: Case) -> str | None:
    """Refuse a cap and a padded table: a peer would need code for each."""
    special = {"cap", "valid"} & set(case.sizes)
    return f"it has no {' and no '.join(sorted(special))}" if special else None


def _linear_cross_entropy(**inputs: Any) -> Any:
    z, weight = _logits(inputs), inputs.get("weight")
    loss = F.cross_entropy(
        z,
        inputs["target"].long(),
        weight=None if weight is None else weight.float(),
        reduction=inputs["reduction"],
        label_smoothing=inputs["label_smoothing"],
    )
    return (loss, z.logsumexp(-1)) if inputs["return_lse"] else loss


def _torch_linear_cross_entropy(chunked: bool, **inputs: Any) -> Tensor:
    """Call torch's op; without options it takes its reference, which keeps all logits."""
    fused = F.linear_cross_entropy  # type: ignore[attr-defined]
    return fused(
        inputs["input"],
        inputs["linear_weight"],
        inputs["target"].long(),
        linear_bias=inputs.get("linear_bias"),
        reduction=inputs["reduction"],
        options=torch.nn.LinearCrossEntropyOptions() if chunked else None,  # type: ignore[attr-defined]
    )


def _has_torch_linear_cross_entropy(case: Case) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "this torch has no F.linear_cross_entropy with options"
    if {"lse", "smoothing"} & set(case.sizes):
        return "it gives no lse, and smooths only on its unfused path"
    return _plain_head(case)


def _linear_log_softmax(**inputs: Any) -> tuple[Tensor, Tensor]:
    z = _logits(inputs)
    target = inputs["target"].long()[..., None]
    return z.log_softmax(-1).gather(-1, target)[..., 0], z.logsumexp(-1)


def _linear_kl_div(**inputs: Any) -> Tensor:
    temperature, teacher = inputs["temperature"], inputs["teacher_logits"].float()
    logq = (_logits(inputs) / temperature).log_softmax(-1)
    logp = (teacher / temperature).log_softmax(-1)
    loss = F.kl_div(logq, logp, reduction="batchmean", log_target=True)
    return loss * temperature**2


# Losses of other libraries

NOT_USED = ("bias", "cap", "valid", "smoothing", "z", "scale", "weights", "lse")


def _reason(module: str, name: str) -> Callable[[Case], str | None]:
    def unsupported(case: Case) -> str | None:
        special = set(NOT_USED) & set(case.sizes)
        if special:
            return f"it is not used with {' and '.join(sorted(special))}"
        return why_missing(module, name) or on_gpu(case)

    return unsupported


_LIGER = (
    "liger_kernel.ops.fused_linear_cross_entropy",
    "LigerFusedLinearCrossEntropyFunction",
)
_CCE = ("cut_cross_entropy", "linear_cross_entropy")


def _liger(**inputs: Any) -> Tensor:
    """Call Liger's autograd function: the module around it needs another library."""
    loss: Tensor = function_of(*_LIGER).apply(
        inputs["input"],
        inputs["linear_weight"],
        inputs["target"],
        None,  # bias
        None,  # weights of classes
        -100,
        0.0,  # z-loss
        0.0,  # label smoothing
        inputs["reduction"],
    )[0]
    return loss


def _cce(**inputs: Any) -> Tensor:
    """Call CCE without its filter of small gradients; every release has these arguments."""
    operands = inputs["input"], inputs["linear_weight"], inputs["target"]
    loss: Tensor = function_of(*_CCE)(
        *operands, reduction=inputs["reduction"], filter_eps=None, impl="cce"
    )
    return loss


_LOSSES = (
    Entry("Liger", _liger, unsupported=_reason(*_LIGER)),
    Entry(
        "CCE, exact",
        _cce,
        unsupported=_reason(*_CCE),
        loose_gradients="it adds up the table's gradient in 16 bits",
    ),
)

_LINEAR_KL = Entry("F.linear + F.kl_div", _linear_kl_div, unsupported=_plain_head)
_LINEAR_CE = Entry("F.linear + F.cross_entropy", _linear_cross_entropy, unsupported=_plain_head)
_LINEAR_LOGP = Entry("F.linear + log_softmax", _linear_log_softmax, unsupported=_plain_head)

PEERS: dict[str, tuple[Entry, ...]] = {
    "linear_logprobs": (_LINEAR_LOGP, compiled(_LINEAR_LOGP)),
    "linear_cross_entropy": (
        _LINEAR_CE,
        *(
            Entry(
                f"F.linear_cross_entropy, {name}",
                partial(_torch_linear_cross_entropy, chunked),
                unsupported=_has_torch_linear_cross_entropy,
            )
            for name, chunked in (("unfused", False), ("chunked", True))
        ),
        *_LOSSES,
        compiled(_LINEAR_CE),
    ),
    "linear_kl_div": (_LINEAR_KL, compiled(_LINEAR_KL)),
}
