"""bench.bounds counts what it says, and compares with the table of another commit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import bounds, report
from bench.harness import counting
from bench.harness.counting import MOST_GROWTH, case_named, entries, measure
from bench.harness.results import Result
from bench.harness.targets import QUICK, TARGETS, Target
from stlm_kernels import env
from stlm_kernels.ptx.bounds import Device
from stlm_kernels.ptx.reports import SAMPLE, execute_case
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case

pytestmark = pytest.mark.lanes("compiled")
OTHER = '{"command": "python -m x", "machine": {}, "rows": [], "summary": []}'
SMALL = "T300-P50-D48-mean-ragged"


def test_rows_name_cases() -> None:
    for row in TARGETS:
        case_named(OPS[row.op], row.case)
    with pytest.raises(ValueError, match="unpool: expected a case's name, got 'T1'"):
        case_named(OPS["unpool"], "T1")


def grown(rows: Iterable[Target], committed: Mapping[counting.Key, Any]) -> list[str]:
    """List the rows whose bound is more than 3% over that of the committed table."""
    found = []
    for row in rows:
        ours = entries(row.op, case_named(OPS[row.op], row.case))[0]
        now = measure(row, ours, Device.load("h200"), 90, SAMPLE)
        before = committed[counting.key_of(now)]
        if now["bound"] > MOST_GROWTH * before["bound"]:
            found.append(counting.line(now, committed))
    return found


@pytest.mark.parametrize("op", sorted({row.op for row in TARGETS}))
def test_no_bound_grows_over_the_committed_table(op: str, full: bool) -> None:
    """A kernel that costs more is either mended, or its rows are counted anew and looked at:
    `python -m bench.bounds OP --by stlm --update bench/results/bounds-h200.json`, and
    `bench.report`."""
    counted_with = Result.read(counting.COMMITTED).machine["triton"]
    if env.version_of("triton") != counted_with:
        pytest.skip(f"the table was counted with triton {counted_with}")
    rows = [row for row in TARGETS if row.op == op and (full or row.case in QUICK)]
    assert grown(rows, counting.read(counting.COMMITTED)) == []


def test_a_grown_bound_is_seen() -> None:
    row = Target("segment_pool", SMALL, "bwd")
    ours = entries(row.op, case_named(OPS[row.op], row.case))[0]
    now = measure(row, ours, Device.load("h200"), 90, SAMPLE)
    for share, seen in ((1.0, False), (0.98, False), (0.96, True)):
        before = {counting.key_of(now): now | {"bound": share * now["bound"]}}
        assert bool(grown([row], before)) == seen


def test_the_committed_table_has_every_target() -> None:
    committed = {key[:3] for key in counting.read(counting.COMMITTED)}
    assert {(row.op, row.case, row.direction) for row in TARGETS} == committed
    assert {row.case for row in TARGETS} > QUICK


def test_a_row() -> None:
    ours = entries("segment_pool", case_named(OPS["segment_pool"], SMALL))[0]
    row = Target("segment_pool", SMALL, "bwd", 3.0)
    found = measure(row, ours, Device.load("h200"), 90, sample=2)
    assert found["kernels"] == 1
    assert found["by"] == "stlm"
    assert found["sampled_1_in"] > 1
    assert "stlm_segment_pool_bwd" in found["bound_of"]
    assert found["bound"] >= max(found["us"].values()) - 1e-3
    assert found["instructions"] > 0
    assert found["sectors"] >= 1


def test_torch_counts_between_launches() -> None:
    """The products of a large vocabulary are torch's: operators of their own on a GPU."""
    cases = OPS["linear_cross_entropy"].tagged("edge")
    case = next(x for x in cases if x["V"] == 1000 and x["reduction"] == "mean")
    row = Target("linear_cross_entropy", case.name, "both")
    found = measure(row, entries(row.op, case)[0], Device.load("h200"), 90, sample=2)
    assert found["torch_ops"] > 5
    assert {"aten::mm", "stlm_linear_logprobs_chunk"} <= set(found["bound_of"])
    assert found["bound"] == pytest.approx(sum(found["bound_of"].values()), abs=0.1)


def test_a_loss_and_its_gradients_take_few_launches() -> None:
    """One forward and its mean; then one kernel with its sum, or one with a product and a sum."""
    spec = OPS["linear_cross_entropy"]
    for width, kernels, torch_ops in ((128, 4, 0), (512, 5, 1)):
        case = Case({"N": 4096, "D": width, "V": 256, "reduction": "mean"})
        session = execute_case(spec, case, arch=90, dtype=counting.DTYPE, sample=2)
        assert (len(session.executions), len(session.torch_ops)) == (kernels, torch_ops)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bounds, "TARGETS", (Target("segment_pool", SMALL, "fwd", 3.0),))
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert bounds.main(["--by", "stlm", "--json", str(first), "--commit", "abc"]) == 0
    found = Result.read(first)
    assert found.settings["bounds_on"] == "NVIDIA H200 SXM"
    assert found.machine["commit"] == "abc"
    page = report.page(tmp_path)
    assert "lower bounds on NVIDIA H200 SXM, bf16, sm_90: counted, not timed" in page
    assert f"segment_pool {SMALL} fwd" in page
    capsys.readouterr()
    bounds.main(["--by", "stlm", "--json", str(second), "--commit", "abc", "--against", str(first)])
    shown = capsys.readouterr().out
    assert "1.00x before" in shown
    assert "1 block in" in shown, "the factor of sampling"
    rows = Result.read(first).rows
    gone, library = {"case": "T9"}, {"by": "a library that is not installed"}
    first.write_text(json.dumps(json.loads(first.read_text()) | {
        "rows": [rows[0], rows[0] | gone, rows[0] | library]
    }))  # fmt: skip
    update = ["segment_pool", "--update", str(first), "--by"]
    bounds.main([*update, "compiled", "--commit", "def"])
    bounds.main([*update, "stlm", "--commit", "ghi"])
    assert [row["commit"] for row in rows] == ["abc"]
    assert [(row["by"], row["commit"]) for row in Result.read(first).rows] == [
        ("stlm", "ghi"), (library["by"], "abc"),
        ("compiled index_add", "def"), ("compiled scatter_reduce", "def"),
    ]  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bounds.main(["--device", "h2000"])
    for text, message in (("{}", "expected a result of a command"), (OTHER, "got python -m x")):
        first.write_text(text)
        with pytest.raises(SystemExit):
            bounds.main(["--against", str(first), "--json", str(second)])
        assert message in capsys.readouterr().err
