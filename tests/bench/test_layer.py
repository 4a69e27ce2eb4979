"""bench.layer counts a layer beside the composition that it replaces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import layer
from bench.harness.results import Result

SMALL = {"tokens": 256, "dim": 64, "hidden": 96, "width": 32, "window": 64}


def test_both_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is torch's here, and all ops take the torch path."""
    for name in ("qkv_rope", "qk_norm_rope", "attention", "swiglu"):
        op = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *x, op=op, **y: op(*x, **y | {"impl": "torch"}))
    monkeypatch.setattr(layer, "_norm", lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6))
    monkeypatch.setattr(layer, "DTYPE", torch.float32)
    made = layer.Layer(**SMALL)
    torch.manual_seed(0)
    with torch.no_grad():
        for x in (made.x, *made.weights.values(), made.angles):
            x.normal_()
    torch.testing.assert_close(made.ours(), made.baseline(), rtol=1e-4, atol=1e-3)


@pytest.mark.lanes("compiled")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer.json"
    sizes = [f"--{name}={size}" for name, size in {**SMALL, "tokens": 8192}.items()]
    layer.main([*sizes, "--sample", "1", "--commit", "abc", "--json", str(path)])
    result = Result.read(path)
    baseline, ours = result.rows
    assert (baseline["by"], ours["by"]) == ("baseline", "ours")
    for row in result.rows:
        kinds = {each["launch"] for each in row["each"]}
        assert ("stlm_swiglu_fwd" in kinds) == (row is ours)
        assert "stlm_attention_fwd" in kinds
        total = sum(each["dram_bytes"] for each in row["each"])
        assert row["dram_bytes"] == pytest.approx(total, abs=len(kinds) * 9)
    assert ours["launches"] <= 19
    assert ours["dram_bytes"] < baseline["dram_bytes"]
    assert (
        f"{ours['dram_bytes'] / baseline['dram_bytes']:.3f} of the baseline's"
        in capsys.readouterr().out
    )
