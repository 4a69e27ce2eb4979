"""The public linear_sample: contract, checks, dispatch and the registered op."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..._linear.options import SampleOptions, check_projection
from ..._sharding import require_plain
from . import torch_impl
from .config import declined_reasons, unsupported_reasons

LEAST = 1e-30
"""Positive options below this mean the same as this, which float32 can hold."""


@named_errors
def linear_sample(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor | None = None,  # or () int64
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Draw the next id of each row from its logits, which are never written at V <= 512.

    z = logit_scale * (input @ linear_weight.T + linear_bias), then softcap * tanh(z / softcap),
    without columns from valid_vocab on; then z / temperature, top_k, top_p, in this order. The id
    is the argmax of z - log(E), with E exponential noise, a hash of (seed, row, id).

    Args:
        input: (..., D) float32, bfloat16 or float16; float64 on the torch path.
        linear_weight: (V, D) in input's dtype, or float32 beside 16 bits (cast when loaded).
        linear_bias: (V,) in input's dtype or float32 beside 16 bits, or None.
        temperature: a finite number >= 0; 0 takes the largest logit, ties to the lowest id.
        top_k: an int >= 1, keep the k largest, ties to the lowest id. None: all.
        top_p: in (0, 1], of those keep the fewest largest whose probabilities reach it. None: all.
        seed: an int of int64; or a 0-d int64 tensor on input's device, read anew by a captured
            graph. None: drawn from torch's generator. Each call needs another one.
        softcap: a finite number > 0, or None.
        logit_scale: a finite number.
        valid_vocab: columns from here on do not exist (a padded table). None: V.
        impl: "auto", "triton" or "torch".

    Returns: (...) int64 ids in [0, valid_vocab); not differentiable.
    Raises: ValueError for a wrong type, dtype, shape, device or option; NotImplementedError where
        impl="triton" cannot run, with all reasons.

    >>> table = torch.eye(256)
    >>> linear_sample(table[[104, 105]], table, temperature=0.0).tolist()
    [104, 105]

    Numerics: docs/numerics.md. Source: the Gumbel-max trick; SplitMix64 (Steele et al., 2014).
    """
    options = _options(
        input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab, temperature, top_k,
        top_p,
    )  # fmt: skip
    seed = _seed_tensor(seed, input.device)
    bias = None if linear_bias is None else linear_bias.detach()
    rows, weight = input.detach().reshape(-1, input.shape[-1]), linear_weight.detach()
    if use_triton(
        "linear_sample",
        impl,
        input.device,
        unsupported_reasons,
        declined_reasons,
        input=input,
        linear_weight=linear_weight,
        valid_vocab=options.valid_vocab,
    ):
        ids = _FWD(rows, weight, bias, seed, runtime.compute_dtype(input), *options)
    else:
        ids = torch_impl.sample(rows, weight, bias, seed, options)
    return ids.view(input.shape[:-1])


@_checks.once_per_signature
def _options(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> SampleOptions:
    valid = check_projection(
        input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab
    )  # fmt: skip
    require_plain(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return SampleOptions(softcap or 0.0, float(logit_scale), valid, 0.0, 0, 1.0)
    k = 0 if top_k is None or top_k >= valid else top_k
    p = 1.0 if top_p is None else max(float(top_p), LEAST)
    heat = max(float(temperature), LEAST)
    return SampleOptions(softcap or 0.0, float(logit_scale), valid, heat, k, p)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    ok = _checks.is_finite(temperature) and temperature >= 0
    _checks.require_number(ok, "temperature", "a finite number >= 0", temperature)
    if top_k is not None:
        _checks.require_int_at_least("top_k", top_k, 1)
    if top_p is not None:
        ok = _checks.is_number(top_p) and 0 < top_p <= 1
        _checks.require_number(ok, "top_p", "None or a number in (0, 1]", top_p)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed where the noise is made; nothing waits for the device."""
    if isinstance(seed, Tensor):
        _checks.require_tensor("seed", seed, (), (torch.int64,), device)
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    _checks.require_int("seed", seed)
    _checks.require(-(2**63) <= seed < 2**63, "seed", "an int that int64 holds", seed)
    return torch.full((), seed, dtype=torch.int64, device=device)


_FWD = _library.register(
    "linear_sample_fwd(Tensor rows, Tensor weight, Tensor? bias, Tensor seed, "
    "ScalarType dot_dtype, float softcap, float logit_scale, SymInt valid_vocab, "
    "float temperature, SymInt top_k, float top_p) -> Tensor",
    launcher="linear_sample:launch_fwd",
    meta=lambda rows: rows.new_empty(rows.shape[0], dtype=torch.int64),
    flops=lambda rows, weight: 2 * rows[0] * rows[1] * weight[0],
)
