"""Peers from other libraries, in stand-ins with their signatures: what they are handed is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.jobs import CaseData
from bench.peers import PEERS, attention_varlen, installed
from bench.peers import linear_cross_entropy as losses
from bench.peers import swiglu as gates
from stlm_kernels.registry import OPS
from stlm_kernels.spec import case

CPU = torch.device("cpu")


def _liger(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ce_weight: Any = None,
    ignore_index: int = 0, lse_square_scale: float = 1.0, label_smoothing: float = 1.0,
    reduction: str = "", softcap: Any = None,
) -> tuple[Tensor, None]:  # fmt: skip
    assert bias is ce_weight is softcap is None
    assert (lse_square_scale, ignore_index) == (0, -100)
    z = F.linear(_input, weight)
    loss = F.cross_entropy(
        z, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss, None


def _cce(
    e: Tensor, c: Tensor, targets: Tensor, ignore_index: int = -100, softcap: Any = None,
    reduction: str = "", shift: bool = False, filter_eps: Any = "high", impl: str = "",
) -> Tensor:  # fmt: skip
    """Stand-in with the signature of release 25.1.1."""
    assert (filter_eps, impl) == (None, "cce")
    return F.cross_entropy(F.linear(e, c), targets, ignore_index=ignore_index, reduction=reduction)


@pytest.mark.parametrize("name", ["Liger", "CCE, exact"])
def test_losses_of_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        losses._LIGER: SimpleNamespace(apply=_liger),
        losses._CCE: _cce,
    }
    monkeypatch.setattr(installed, "_found", lambda module, name: (given[module, name], None))
    spec = OPS["linear_cross_entropy"]
    entry = next(x for x in PEERS[spec.name] if x.name == name)
    data = CaseData(spec, spec.tagged("smoke")[0], torch.float32, CPU)
    assert data.errors_of(entry, entry.function)["out"] < 1e-5
    with_cap = case(N=40, D=32, V=260, reduction="none", cap=5.0)
    assert "not used with cap" in str(entry.unsupported(with_cap))


def _norm(
    x: Tensor, weight: Any, eps: float, offset: float, casting_mode: str, in_place: bool
) -> Tensor:
    assert (offset, casting_mode, in_place) == (0, "llama", False)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.mark.parametrize("index", [0, 1])
def test_norm_and_gate_of_liger(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        gates._NORM: SimpleNamespace(apply=_norm),
        gates._GATE: SimpleNamespace(apply=lambda gate, up: F.silu(gate) * up),
    }
    monkeypatch.setattr(installed, "_found", lambda module, name: (given[module, name], None))
    spec = OPS["swiglu"]
    entry = next(x for x in PEERS[spec.name] if x.name == "Liger")
    data = CaseData(spec, spec.tagged("smoke")[index], torch.float32, CPU)
    assert data.errors_of(entry, entry.function)["out"] < 1e-5


@pytest.mark.parametrize("causal", [0, 1])
def test_patches_as_documents(causal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, longest: int, longest_k: int,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        seen.update(options, longest=longest)
        causal = options["window_size"] == (-1, 0)
        spec = OPS["patch_attention"]
        return spec.yardstick(q, k, v, cu, causal=causal, scale=options["scale"])

    monkeypatch.setattr(attention_varlen, "function_of", lambda module, name: varlen)
    monkeypatch.setattr(attention_varlen, "_takes", lambda module, name, argument: True)
    spec = OPS["patch_attention"]
    sizes = {"T": 30, "P": 4, "H": 2, "KV": 1, "K": 16, "boundaries": "ragged", "causal": causal}
    data = CaseData(spec, case(**sizes), torch.float32, CPU)
    entry = attention_varlen.PATCH_VARLEN
    assert data.errors_of(entry, entry.function)["out"] < 1e-5
    assert seen["enable_gqa"]
    assert seen["longest"] == int(data.first.inputs["cu_patchlens"].diff().max())


def test_what_is_not_installed_is_no_peer() -> None:
    assert installed.function_of("no_such_library.ops", "anything") is None
    assert installed.function_of("json", "no_such_function") is None
    assert installed.function_of("json", "dumps") is not None
