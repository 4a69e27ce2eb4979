"""Tuning: downhill from the default, never by a wrong or a spilling config, and kept as data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.harness import environment
from bench.harness.candidates import Candidates, Target, neighbours
from bench.harness.jobs import CaseData
from stlm_kernels import _launch
from stlm_kernels._launch import Config
from stlm_kernels.ops.byte_pool import config as byte_pool_config
from stlm_kernels.registry import OPS

SPEC = OPS["byte_pool"]
CASE = SPEC.tagged("smoke")[0]
CPU = torch.device("cpu")
DEFAULT = {"BLOCK_P": 16, "num_warps": 4}
TARGET = Target(SPEC, CASE, "no-grad", "byte_pool_fwd", "D64-float32", DEFAULT)
COMMON = ("sum_splits", "segment_sum", "segment_sum_long", "long_segments", "row_bounds")
Timing = Callable[[Config], float]


def all_usable(target: Target, configs: Sequence[Config]) -> list[Config]:
    return list(configs)


def no_bounds(target: Target, configs: Sequence[Config]) -> list[float]:
    return [0.0] * len(configs)


def swept(
    timing: Timing,
    usable: tune.Usable = all_usable,
    seconds: float = 60,
    least_us: tune.LeastUs = no_bounds,
) -> dict[str, Any] | None:
    """A sweep where the time of a config is given, not measured."""

    def measure(*_: Any) -> float:
        return timing(_launch.config_for("byte_pool_fwd", "D64-float32", DEFAULT, CPU))

    data = CaseData(SPEC, CASE, torch.float32, CPU)
    return tune.sweep(TARGET, data, measure, usable, least_us, time.monotonic() + seconds)


def distance_from_64_and_2(config: Config) -> float:
    steps = abs(config["BLOCK_P"].bit_length() - 7) + abs(config["num_warps"].bit_length() - 2)
    return 1e-6 * (3 + steps)


def test_a_sweep_goes_downhill_to_the_best() -> None:
    found = swept(distance_from_64_and_2)
    assert found is not None
    assert found["config"] == {"BLOCK_P": 64, "num_warps": 2}
    assert (found["us"], found["default_us"]) == (3.0, 6.0)
    assert found["tried"] < 20
    assert found["refused"] == 0


def test_a_wrong_config_is_never_chosen() -> None:
    def timing(config: Config) -> float:
        if config["BLOCK_P"] == 32:
            raise AssertionError("out: RMS error")  # the fastest, and wrong
        return {16: 5e-6, 8: 4e-6}.get(config["BLOCK_P"], 9e-6)

    found = swept(timing)
    assert found is not None
    assert found["config"]["BLOCK_P"] == 8
    assert found["refused"] >= 1


def test_no_time_leaves_the_default_and_a_wrong_default_nothing() -> None:
    found = swept(distance_from_64_and_2, seconds=-1)
    assert found is not None
    assert (found["config"], found["done"]) == (DEFAULT, False)

    def wrong(config: Config) -> float:
        raise AssertionError("out: RMS error")

    assert swept(wrong) is None


def test_a_sweep_goes_on_where_an_earlier_one_ended() -> None:
    def measure(*_: Any) -> float:
        config = _launch.config_for("byte_pool_fwd", "D64-float32", DEFAULT, CPU)
        seen.append(config)
        return distance_from_64_and_2(config)

    data = CaseData(SPEC, CASE, torch.float32, CPU)
    last = {"BLOCK_P": 64, "num_warps": 2}
    for start in (last, {"OTHER": 1}):
        seen: list[Config] = []
        end = time.monotonic() + 60
        found = tune.sweep(TARGET, data, measure, all_usable, no_bounds, end, start)
        assert found is not None
        assert (found["config"], found["default_us"], found["done"]) == (last, 6.0, True)
        assert seen[0] == DEFAULT
        assert (seen[1] == start) == (start is last)


def test_runs_share_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels never swept come first, then those that had no time; finished ones are left."""
    found = tune.all_targets([SPEC], "smoke", torch.float32, CPU)
    keys = [target.key for target in found]
    assert len(keys) == len(set(keys)) >= 2
    names = {target.kernel for target in found}
    assert names == {"byte_pool_fwd", "byte_pool_bwd", "sum_splits"}
    first, second = found[:2]
    swept_last: list[str] = []

    def run(old: dict[str, Any], seconds: float = 60, stamp: str = "now") -> dict[str, Any]:
        swept_last.clear()

        def measure(spec: Any, case: Any, direction: str, data: Any) -> float:
            swept_last.append(direction)
            return 1e-6

        end = time.monotonic() + seconds
        tuned = tune.tune(
            [first, second], torch.float32, CPU, measure, all_usable, no_bounds, end, old, stamp
        )
        return dict(tuned)

    done = run({})
    assert list(done) == [first.key, second.key]
    assert all(entry["done"] and entry["of"] == "now" for entry in done.values())
    assert run(done) == {}
    assert swept_last == []
    assert list(run(done, stamp="other kernels")) == [first.key, second.key]
    assert list(run({first.key: done[first.key] | {"done": False}})) == [second.key, first.key]
    assert run({}, seconds=-1) == {}
    assert "no time is left for 2 of them" in capsys.readouterr().out


WITH_KERNELS = [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.kernels]
SHARED = {
    "byte_pool_bwd_gain_table": "byte_pool_bwd_gain",
    "byte_pool_bwd_gain_slots": "byte_pool_bwd_gain",
    "byte_pool_fwd_long": "byte_pool_fwd",
    "byte_pool_fwd_product_long": "byte_pool_fwd_product",
    "segment_pool_pick_parts": "segment_pool_pick_long",
    "find_patches_blocks": "find_patches_write",
}
"""Kernels of one configuration."""


@pytest.mark.parametrize("spec", WITH_KERNELS)
def test_every_op_has_something_to_tune(spec: Any) -> None:
    """Its kernels' configs or those of the op whose kernels it shares; nothing is launched."""
    found = tune.all_targets([spec], "smoke", torch.bfloat16, CPU)
    assert found
    own = {*spec.kernels, *SHARED.values(), *COMMON}
    assert {target.kernel for target in found} <= own


@pytest.mark.parametrize("spec", WITH_KERNELS)
def test_every_launch_can_be_tuned(spec: Any) -> None:
    """A launch looks its sizes up by the kernel's name, so none hides in a launcher."""
    for case in spec.tagged("smoke", "edge"):
        launched: dict[str, dict[str, Any]] = {}

        def note(kernel: Any, programs: int, args: Any, options: Any, seen: Any = launched) -> None:
            seen[kernel.__name__.removeprefix("stlm_")] = options

        run = tune._runner(spec, case, "bwd" if spec.grad_args else "no-grad", torch.float16, CPU)
        asked = {kernel for kernel, _, _ in tune.lookups(run, note)}
        for kernel, options in launched.items():
            assert SHARED.get(kernel, kernel) in asked, f"{kernel}: nothing was looked up"
            assert "num_warps" in options, f"{kernel}: triton's own default"


def test_what_is_not_usable_is_not_timed() -> None:
    def few(target: Target, configs: Sequence[Config]) -> list[Config]:
        return [config for config in configs if config["num_warps"] == 4]

    seen: list[Config] = []

    def timing(config: Config) -> float:
        seen.append(config)
        return distance_from_64_and_2(config)

    found = swept(timing, few)
    assert found is not None
    assert found["config"] == {"BLOCK_P": 64, "num_warps": 4}
    assert {config["num_warps"] for config in seen} == {4}


def test_a_bound_beyond_the_best_time_is_not_timed() -> None:
    """Low bounds come first, and a config that cannot be faster costs nothing."""
    seen: list[Config] = []

    def timing(config: Config) -> float:
        seen.append(config)
        return distance_from_64_and_2(config)

    def least_us(target: Target, configs: Sequence[Config]) -> list[float]:
        return [100.0 if x["num_warps"] == 8 else float(x["BLOCK_P"] != 32) for x in configs]

    found = swept(timing, least_us=least_us)
    assert found is not None
    assert found["config"] == {"BLOCK_P": 64, "num_warps": 2}
    assert found["pruned"] >= 1
    assert all(config["num_warps"] != 8 for config in seen)
    assert seen[1]["BLOCK_P"] == 32


def test_configs_are_ranked_by_bound_alone() -> None:
    def least_us(target: Target, configs: Sequence[Config]) -> list[float]:
        return [1e6 * distance_from_64_and_2(config) for config in configs]

    ranked = tune.ranking(TARGET, all_usable, least_us, time.monotonic() + 60)
    assert ranked[0] == (pytest.approx(3.0), {"BLOCK_P": 64, "num_warps": 2})
    assert [us for us, _ in ranked] == sorted(us for us, _ in ranked)
    assert (pytest.approx(6.0), DEFAULT) in ranked
    configs = [tuple(config.values()) for _, config in ranked]
    assert len(configs) == len(set(configs))
    (only,) = tune.ranking(TARGET, all_usable, least_us, time.monotonic() - 1)
    assert only[1] == DEFAULT


@pytest.mark.lanes("compiled")
def test_bounds_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Smaller blocks repeat what each program does once."""
    spec = OPS["unpool"]
    tune.print_rankings([spec], torch.bfloat16, 90, time.monotonic() + 1e-9, tag="smoke")
    assert "no time is left" in capsys.readouterr().out
    candidates = Candidates(90, torch.bfloat16, processes=1)
    case = spec.tagged("aot")[0]
    (target,) = [
        x
        for x in tune.all_targets([spec], "smoke", torch.bfloat16, CPU, _launch.H100)
        if x.kernel == "unpool_runs"
    ]
    target = replace(target, case=case)
    small, default = candidates.least_us(target, [{"BLOCK": 32, "num_warps": 4}, target.default])
    assert small > default > 0


def test_neighbours_change_one_value_within_bounds() -> None:
    config = {"BLOCK_N": 1, "num_warps": 16, "num_stages": 1}
    assert list(neighbours(config)) == [
        config | {"BLOCK_N": 2},
        config | {"num_warps": 8},
        config | {"num_stages": 2},
    ]


@pytest.mark.lanes("aot")
def test_compilers_drop_what_spills_or_does_not_compile() -> None:
    case = SPEC.tagged("aot")[0]
    default = byte_pool_config.bwd_config(case["D"], False, torch.bfloat16, CPU)
    target = Target(SPEC, case, "bwd", "byte_pool_bwd", "any", default)
    large = default | {"BLOCK_V": 128, "BLOCK_P": 32, "BLOCK_D": 128, "num_warps": 1}
    odd = default | {"BLOCK_P": 24}  # no power of two
    usable = Candidates(90, torch.bfloat16, processes=1).usable
    assert usable(target, [default, large, odd]) == [default]


def test_tuning_learns_buckets_from_the_launcher() -> None:
    def run() -> None:
        byte_pool_config.fwd_config(768, torch.bfloat16, CPU)

    known: set[str] = set()
    (target,) = tune.targets(SPEC, "no-grad", CASE, run, known)
    assert target.kernel == "byte_pool_fwd"
    assert "BLOCK_D" in target.default
    assert list(tune.targets(SPEC, "no-grad", CASE, run, known)) == []


def test_tuned_file_is_merged_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_TUNED", tmp_path)
    path = _launch.device_file("Some GPU")
    about = environment.describe(CPU, commit="abc123")
    tune.write(path, about, {"a/x": {"config": {"n": 1}, "us": 2.0}})
    tune.write(path, about, {"b/y": {"config": {"n": 2}, "us": 1.0}})
    _launch._tuned_table.cache_clear()
    assert _launch._tuned_table("Some GPU").keys() == {"a/x", "b/y"}
    assert json.loads(path.read_text())["commit"] == "abc123"
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_tuning_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="2"):
        tune.main(["byte_pool"])
    assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tune.main(["no_such_op"])
