"""Launches of a step and of a decoded byte are counted, wait for nothing, and do not grow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_models import MODELS
from torch._subclasses.fake_tensor import DataDependentOutputException

from bench import launches
from bench.harness.launches import BLOCKS, CHUNK, MORE, counting
from bench.harness.results import Result
from stlm_kernels import byte_pool, runtime
from stlm_models.layers import attention
from stlm_models.layers.norms import rms_norm
from stlm_models.presets import preset

CEILINGS = {"step": 571, "layer of bytes": 23, "byte": 94, "byte that closes a patch": 179}
"""Launches of the 10m preset as they are: fewer are better, and then these fall."""


def test_the_counts_do_not_grow() -> None:
    """A step that waited for the device would raise: it could not be captured in a graph."""
    found = {row["what"]: row["launches"] for row in launches.counted("10m")}
    assert found.keys() == CEILINGS.keys()
    for what, ceiling in CEILINGS.items():
        assert found[what] <= ceiling, f"{what}: more launches than there were"
        assert found[what] > 0.9 * ceiling, f"{what}: fewer than there were: lower the ceiling"


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_every_kind_of_model_wait_for_nothing(name: str) -> None:
    config = MODELS[name]
    if config.patch_rule != "none":
        config = replace(config, max_patches=64)
    assert launches.training_step(config).by_name["_fused_adamw_"] == 1


def test_more_layers_are_more_launches() -> None:
    """Tables, positions and masks of a stream are not made again for every layer."""
    two, three = (
        launches.training_step(replace(preset("demo"), decoder_layers=count)) for count in (2, 3)
    )
    grown = three.by_name - two.by_name
    # The arithmetic of a layer alone: no tables, positions, boundaries, masks.
    assert not grown.keys() & {"arange", "searchsorted", "index", "where", "masked_fill", "clamp"}
    products = grown["mm"] + grown["matmul"] + grown["addmm"] / MORE["addmm"]
    assert products + grown["stlm_qkv_rope_fwd"] == 3 * 2
    assert grown["stlm_swiglu_fwd"] == 1


def test_operators_count_as_their_launches() -> None:
    with counting() as counted:
        x, w = torch.empty(4, 8), torch.empty(8, 8)
        assert counted.by_name.total() == 0
        x.view(8, 4), x[1:], x.detach(), x.mT, w.split(4)
        assert counted.by_name.total() == 0
        torch.addmm(x, x, w)
        assert counted.by_name == {"addmm": 2}
        x[:0] + x[:0]
        assert counted.total == 2
        byte_pool(torch.empty(4, dtype=torch.uint8), w, torch.empty(3, dtype=torch.int32))
        assert counted.by_name["stlm_byte_pool_fwd"] == 1
        assert counted.total == 3


@pytest.mark.parametrize(
    ("sizes", "launched"),
    [([8] * 64, 1), ([8] * 65, 2), ([CHUNK * BLOCKS], 1), ([CHUNK * (BLOCKS + 1)], 2)],
    ids=["few", "many", "large", "larger"],
)
def test_many_tensors_take_few_launches(sizes: list[int], launched: int) -> None:
    with counting() as counted:
        x, y = ([torch.empty(size) for size in sizes] for _ in range(2))
        torch._foreach_add_(x, y)
    assert counted.by_name == {"_foreach_add_": launched}


def test_a_norm_is_a_launch_each_way() -> None:
    with counting() as counted:
        x = torch.empty(3, 8, requires_grad=True)
        rms_norm(x).backward(x.detach())
    assert counted.by_name == {"_fused_rms_norm": 1, "_fused_rms_norm_backward": 1}


def test_what_waits_raises_or_goes_on_with_the_number() -> None:
    with pytest.raises(DataDependentOutputException), counting():
        torch.empty(()).item()
    with counting(number=7, chosen=2) as counted:
        assert torch.empty(()).item() == 7
        assert torch.empty(5)[torch.empty(5, dtype=torch.bool)].shape == (2,)
        assert torch.empty(5, 3).nonzero().shape == (2, 2)
    assert counted.total > 2


def test_everything_is_as_before_afterwards() -> None:
    before = F.rms_norm, runtime.on_gpu, attention.rotary_tables, torch.nn.Module.to
    with pytest.raises(KeyError), counting():
        raise KeyError
    assert (F.rms_norm, runtime.on_gpu, attention.rotary_tables, torch.nn.Module.to) == before


def test_the_command_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "launches.json"
    assert launches.main(["10m-flat", "--json", str(path), "--commit", "abc"]) == 0
    step, layer, byte = Result.read(path).rows
    assert (step["what"], layer["what"], byte["what"]) == ("step", "layer of bytes", "byte")
    assert layer["kinds"]["stlm_attention_fwd"] == 1
    assert step["launches"] == sum(step["kinds"].values()) > byte["launches"]
    assert f"{byte['launches']} launches" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        launches.main(["nothing", "--json", str(path)])
