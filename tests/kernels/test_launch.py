"""Launch configurations as data, and the one place kernels are launched from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stlm_kernels import _launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEFAULT = {"BLOCK": 16, "num_warps": 4}
TUNED = {"BLOCK": 64, "num_warps": 8}


class Kernel:
    """Takes the place of a jitted kernel: keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((grid, args, options))


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tuned files with one for a device that is not here."""
    monkeypatch.setattr(_launch, "_TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fast (TM) 9000")
    table = {"configs": {"op_fwd/D64-bfloat16": {"config": TUNED, "us": 1.0}}}
    (tmp_path / "nvidia_fast_tm_9000.json").write_text(json.dumps(table))
    _launch._tuned_table.cache_clear()
    yield tmp_path
    _launch._tuned_table.cache_clear()


def test_device_files_have_plain_names() -> None:
    assert _launch.device_file("NVIDIA H200").name == "nvidia_h200.json"
    assert _launch.device_file("NVIDIA GeForce RTX 3090 (Ti)").name == (
        "nvidia_geforce_rtx_3090_ti.json"
    )


def test_tuned_then_default(tuned: Path) -> None:
    assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CUDA) == TUNED
    assert _launch.config_for("op_fwd", "D128-bfloat16", DEFAULT, CUDA) == DEFAULT
    assert _launch.config_for("op_bwd", "D64-bfloat16", DEFAULT, CUDA) == DEFAULT
    assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CPU) == DEFAULT


def test_an_unknown_device_takes_the_default(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CUDA) == DEFAULT


def test_a_caller_may_change_what_it_gets(tuned: Path) -> None:
    """Launchers pop entries; the table and an override must not lose them."""
    with _launch.overriding({"op_bwd": dict(TUNED)}):
        for kernel in ("op_fwd", "op_bwd"):
            for _ in range(2):
                assert _launch.config_for(kernel, "D64-bfloat16", dict(DEFAULT), CUDA) == TUNED
                _launch.config_for(kernel, "D64-bfloat16", dict(DEFAULT), CUDA).clear()


def test_values_that_are_not_given_are_the_defaults(tuned: Path) -> None:
    """A tuned file may be older than a value of the configuration."""
    newer = {**DEFAULT, "PROGRAMS": 7}
    want = {**TUNED, "PROGRAMS": 7}
    assert _launch.config_for("op_fwd", "D64-bfloat16", newer, CUDA) == want
    with _launch.overriding({"op_fwd": {"PROGRAMS": 9}}):
        assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CPU) == DEFAULT | {
            "PROGRAMS": 9
        }


def test_overriding_names_kernels_and_ends(tuned: Path) -> None:
    chosen = {"BLOCK": 1, "num_warps": 1}
    with _launch.overriding({"op_fwd": chosen}):
        assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CUDA) == chosen
        assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CPU) == chosen
        assert _launch.config_for("op_bwd", "D64-bfloat16", DEFAULT, CUDA) == DEFAULT
    assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CUDA) == TUNED


def test_a_watcher_is_told_of_each_lookup() -> None:
    """Launches that were made before, too, and with what a launcher may change afterwards."""
    asked: list[Any] = []

    @_launch.remembered
    def choose(device: torch.device) -> _launch.Config:
        return _launch.config_for("op_fwd", "D64", dict(DEFAULT), device)

    choose(CPU)
    with _launch.watching(lambda *x: asked.append(x)):
        choose(CPU).clear()
        choose(CPU)
    choose(CPU)
    assert asked == [("op_fwd", "D64", DEFAULT)] * 2


def test_other_threads_see_both() -> None:
    """Autograd runs the backward of a GPU's tensors in a thread of its own."""
    seen: list[Any] = []

    def backward() -> None:
        seen.append(_launch.config_for("op_bwd", "D64", DEFAULT, CPU))
        _launch.launch(Kernel(), 3, device=CPU)

    with _launch.overriding({"op_bwd": TUNED}), _launch.recording(lambda *x: seen.append(x[1])):
        thread = Thread(target=backward)
        thread.start()
        thread.join()
    assert seen == [TUNED, 3]


@pytest.mark.parametrize("block", [_launch.overriding({"op_fwd": TUNED}), _launch.recording(print)])
def test_an_error_ends_the_block_too(block: AbstractContextManager[None]) -> None:
    with pytest.raises(KeyError), block:
        raise KeyError
    assert not _launch.is_recording()
    assert _launch._tools.configs == {}


def test_shipped_files_name_devices_and_hold_whole_numbers() -> None:
    for path in _launch._TUNED.glob("*.json"):
        configs = json.loads(path.read_text())["configs"]
        assert path == _launch.device_file(path.stem)
        for key, entry in configs.items():
            assert key.count("/") == 1
            assert all(isinstance(x, int) and x > 0 for x in entry["config"].values()), key


def test_launch_runs_on_a_flat_grid_with_explicit_fusion() -> None:
    kernel = Kernel()
    _launch.launch(kernel, 7, "a", 3, device=CPU, BLOCK=16)
    _launch.launch(kernel, 1, device=CPU, enable_fp_fusion=False)
    assert kernel.launches == [
        ((7,), ("a", 3), {"BLOCK": 16, "enable_fp_fusion": True}),
        ((1,), (), {"enable_fp_fusion": False}),
    ]


def test_nothing_is_launched_without_programs() -> None:
    kernel, seen = Kernel(), []
    _launch.launch(kernel, 0, device=CPU)
    with _launch.recording(lambda *launch: seen.append(launch)):
        _launch.launch(kernel, 0, device=CPU)
    assert kernel.launches == seen == []


def test_recording_takes_the_place_of_the_device(tuned: Path) -> None:
    kernel, seen = Kernel(), []
    with _launch.recording(lambda *launch: seen.append(launch)):
        assert _launch.is_recording()
        _launch.launch(kernel, 2, "a", device=CUDA, BLOCK=16)
        assert _launch.config_for("op_fwd", "D64-bfloat16", DEFAULT, CUDA) == DEFAULT
    assert seen == [(kernel, 2, ("a",), {"BLOCK": 16, "enable_fp_fusion": True})]
    assert kernel.launches == []
    assert not _launch.is_recording()


def test_a_gpu_is_known_by_its_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors' device, the one that launches are recorded for, or what the defaults suit."""
    properties = SimpleNamespace(major=8, minor=6, shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    _launch._gpu_here.cache_clear()
    here, there = _launch.Gpu(86, 99 << 10), _launch.Gpu(120, 99 << 10)
    assert _launch.gpu_of(CUDA) == here
    assert _launch.gpu_of(CPU) == _launch.H100
    with _launch.recording(print):
        assert _launch.gpu_of(CUDA) == here
    with _launch.recording(print, there):
        assert _launch.gpu_of(CUDA) == _launch.gpu_of(CPU) == there
    assert _launch.gpu_of(CUDA) == here
    _launch._gpu_here.cache_clear()


def test_the_amount_of_work_is_part_of_a_bucket() -> None:
    assert [_launch.amount(n) for n in (0, _launch.FULL - 1, _launch.FULL)] == [
        "small", "small", "large",
    ]  # fmt: skip
    assert _launch.width_bucket(100, _launch.amount(10), torch.float16) == "D128-small-float16"


@given(st.integers(0, 10**7), st.integers(1, 5000), st.integers(1, 600), st.sampled_from([16, 64]))
def test_splits_cover_every_row_once(count: int, tiles: int, programs: int, block: int) -> None:
    runs, length = _launch.splits(count, tiles, programs, block)
    assert length % block == 0
    assert runs >= 1
    assert runs * length >= count, "a row is left out"
    assert (runs - 1) * length < max(count, 1), "a run is empty"
    assert runs == 1 or runs * tiles <= programs, "more programs than fill the device"


def test_blocks_cover_widths() -> None:
    assert [_launch.block_of(w, 128) for w in (1, 16, 17, 100, 128, 768)] == [
        16, 16, 32, 128, 128, 128,
    ]  # fmt: skip
    assert [_launch.ceil_div(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_a_configuration_is_chosen_once() -> None:
    chosen: list[tuple[int, torch.device]] = []

    @_launch.remembered
    def config(width: int, device: torch.device) -> _launch.Config:
        chosen.append((width, device))
        return _launch.config_for("op_fwd", "D64-bfloat16", {"BLOCK": width}, device)

    config(16, CPU).clear()  # a copy
    assert config(16, CPU) == {"BLOCK": 16}
    assert config(32, CPU) == {"BLOCK": 32}
    assert chosen == [(16, CPU), (32, CPU)]
    with _launch.overriding({"op_fwd": {"BLOCK": 4}}):
        assert config(16, CPU) == {"BLOCK": 4}
    assert config(16, CPU) == {"BLOCK": 16}


def test_a_configuration_is_that_of_the_gpu_at_hand(tuned: Path) -> None:
    @_launch.remembered
    def config(device: torch.device) -> _launch.Config:
        shared = 0 if device == CUDA and not _launch.is_recording() else _launch.gpu_of(CPU).arch
        return _launch.config_for("op_fwd", "D64-bfloat16", {"BLOCK": shared}, device)

    assert config(CUDA) == {"BLOCK": 64, "num_warps": 8}
    for gpu in (_launch.Gpu(80, 1), _launch.Gpu(100, 1)):
        with _launch.recording(print, gpu):
            assert config(CUDA) == {"BLOCK": gpu.arch}
    assert config(CUDA) == {"BLOCK": 64, "num_warps": 8}
