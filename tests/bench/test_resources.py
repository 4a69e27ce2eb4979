"""Resources of compiled kernels as data: all of it, with its stamp, and stale said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import report, resources
from bench.harness.results import Result
from stlm_kernels.inspect import Report
from stlm_kernels.registry import OPS

COMPILED = Report(
    "stlm_byte_pool_fwd", ("byte_pool",), "T9", 90, "num_warps=4", 96, 0, 3, 1024, "HGMMA", 4, 4,
    "ptx", "sass",
)  # fmt: skip


def test_the_command_and_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def inspect_op(spec: Any, case: Any, arch: int, dtype: Any) -> list[Report]:
        asked.append(spec.name)
        return [COMPILED]

    monkeypatch.setattr(resources, "inspect_op", inspect_op)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "not compiled yet" in resources.summary()
    resources.main(["--commit", "abc123"])
    assert set(asked) == {name for name, spec in OPS.items() if spec.kernels}
    (row,) = Result.read(tmp_path / "kernels-sm90.json").rows
    assert (row["registers"], row["spill_instructions"], row["shared_bytes"]) == (96, 3, 1024)
    assert not {"ptx", "sass"} & row.keys()
    shown = resources.summary()
    for part in ("sm_90", "abc123", "stlm_byte_pool_fwd", "HGMMA"):
        assert part in shown
    assert resources.CHANGED not in shown
    assert "stlm_byte_pool_fwd" in resources.summary({"byte_pool", "unpool"})
    assert "stlm_byte_pool_fwd" not in resources.summary({"unpool"})
    monkeypatch.setattr(resources, "sources_sha256", lambda: "other")
    assert resources.CHANGED in resources.summary()
    assert "stlm_byte_pool_fwd" in report.page(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "counts"),
    [
        ("ops/a/triton_impl.py", "@triton.jit\ndef stlm_a(): ...\n", True),
        ("ops/a/config.py", "WARPS = 4\n", True),
        ("_launch.py", "x = 1\n", True),
        ("ops/a/cases.py", "CASES = ()\n", False),
    ],
)
def test_what_makes_figures_stale(tmp_path: Path, name: str, text: str, counts: bool) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    before = resources.sources_sha256(tmp_path)
    path.write_text(text + "# changed\n")
    assert (resources.sources_sha256(tmp_path) != before) == counts


def test_a_current_file_holds_every_kernel() -> None:
    found = Result.read(resources.path_of(90))
    if found.settings["sources"] != resources.sources_sha256():
        pytest.skip(resources.CHANGED)
    expected = {f"stlm_{kernel}" for spec in OPS.values() for kernel in spec.kernels}
    assert {row["kernel"] for row in found.rows} >= expected
