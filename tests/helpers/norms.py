"""Whole models are judged by norms, not by elements: rounding grows on the way through them.

Two runs that compute the same by other shapes agree in half the digits of their dtype, row by row;
gradients are as right as those of another composition, both against the fp64 model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stlm_kernels.testing import RMS_FLOOR, hold


def half_the_digits(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.5


def assert_same_rows(got: Tensor, want: Tensor, name: str = "states") -> None:
    """Each row differs by half the digits of the rows' typical norm, at most.

    What leaks, is dropped or belongs to another row moves a row by its own size; one row is
    enough, however many agree.
    """
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} is not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: {got.dtype} is not {want.dtype}"
    assert bool(got.isfinite().all() & want.isfinite().all()), f"{name}: not finite"
    if not got.numel():
        return
    width = got.shape[-1] if got.dim() else 1
    a, b = (x.detach().cpu().double().reshape(-1, width) for x in (got, want))
    typical = float(b.square().sum(1).mean().sqrt())
    error = float((a - b).norm(dim=1).max())
    hold(f"{name}: norm of a row's error", error, half_the_digits(got.dtype) * typical)


def assert_same_gradients(got: Mapping[Any, Tensor], want: Mapping[Any, Tensor]) -> None:
    """Gradients of every parameter differ by half the digits of their norm, at most."""
    assert got.keys() == want.keys(), f"only in one: {sorted(got.keys() ^ want.keys())}"
    for name, x in want.items():
        error = float((got[name].detach().double() - x.detach().double()).norm())
        hold(f"gradient of {name}", error, half_the_digits(x.dtype) * float(x.detach().norm()))


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Norm of the error over that of the exact result; what is exactly zero must be so."""
    error, size = (float(x.detach().norm()) for x in (got.double() - exact, exact))
    return error / size if size else (0.0 if error == 0 else float("inf"))


def pooled_error(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Root mean square of the relative errors: a parameter counts as much as any other."""
    assert got.keys() == exact.keys(), f"only in one: {sorted(got.keys() ^ exact.keys())}"
    errors = [relative_error(got[name], exact[name]) for name in exact]
    return float(torch.tensor(errors, dtype=torch.float64).square().mean().sqrt())


def assert_as_right(
    ours: Mapping[str, Tensor], baseline: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Neither of two runs of one dtype is more than twice as wrong as the other, against fp64.

    A floor is added, for a run that is right by luck.
    """
    dtype = next(iter(ours.values())).dtype
    errors = {"ours": pooled_error(ours, exact), "baseline": pooled_error(baseline, exact)}
    floor = RMS_FLOOR.get(dtype, torch.finfo(dtype).eps / 4)
    for one, other in (("ours", "baseline"), ("baseline", "ours")):
        hold(f"relative error of {one}", errors[one], 2 * errors[other] + floor)


def assert_greedy(ids: Sequence[int], logits: Tensor) -> None:
    """Each id is the likeliest by logits (len(ids), V), or as likely but for rounding.

    Two ids that tie within rounding may come out either way, so what is written is judged by the
    logits of what was written before it, not by what another run would have written.
    """
    chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    missed = float((logits.amax(1) - chosen).max()) if len(ids) else 0.0
    hold("greedy ids", missed, half_the_digits(logits.dtype) * float(logits.norm(dim=1).max()))
