"""find_patches beyond what every op owes: the leak rule, overflow, documents, bad arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.tensors import ints
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stlm_kernels import Patches, _launch, explain, find_patches, segment_pool, unpool
from stlm_kernels.ops.find_patches.reference import reference
from stlm_kernels.testing import assert_causal

ROOT = Path(__file__).parents[2]
WAYS_TO_CUT = ("space", "fixed", "patch_start_mask", "patch_end_mask")
RESULT_LANES = pytest.mark.lanes("cpu", "interpret", "gpu")
TEXT = b"ab  cd, e\xc3\xa9f!x"
Cut = Callable[..., Patches]


def text_ids(text: bytes = TEXT) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def mask(length: int, *true_at: int) -> Tensor:
    return torch.isin(torch.arange(length), torch.tensor(true_at, dtype=torch.long))


def assert_equal(got: Patches, want: Patches) -> None:
    for name, a, b in zip(Patches._fields, got, want, strict=True):
        assert a.dtype == torch.int32, name
        assert a.tolist() == b.tolist(), name


def small_blocks(device: str) -> dict[str, dict[str, int]]:
    """Configurations with which short texts take several blocks and rounds of the scan."""
    bytes_, blocks = (16, 2) if device == "cpu" else (32, 32)  # a warp has 32 lanes
    return {
        "find_patches_write": {"BLOCK": bytes_, "num_warps": 1},
        "find_patches_carry": {"BLOCK": blocks, "num_warps": 1},
    }


@pytest.fixture
def cut(way: Way) -> Cut:
    """find_patches on this way, kernels in small blocks; arguments and results on the CPU."""
    if way.dtype != torch.float32:
        pytest.skip("no floats here")

    def call(byte_ids: Tensor, **options: Any) -> Patches:
        given = {"byte_ids": byte_ids, **options}
        moved = {k: v.to(way.device) if isinstance(v, Tensor) else v for k, v in given.items()}
        with _launch.overriding(small_blocks(way.device)):
            got = find_patches(**moved, impl=way.impl)
        return Patches(*(x.cpu() for x in got))

    return call


# ---- by hand ----------------------------------------------------------------------------------


@RESULT_LANES
def test_space_rule_closes_on_the_first_spacelike_byte_of_a_run(cut: Cut) -> None:
    got = cut(text_ids(), rule="space")
    # "ab ", " cd,", " e\xc3", "\xa9f!", "x": the lead byte of an accent closes, its tail does not.
    assert got.cu_patchlens.tolist() == [0, 3, 7, 10, 13, 14]
    assert got.patch_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert got.read_ids.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert got.n_patches.item() == 5
    assert got.n_patches.shape == ()
    assert got.cu_seqlens.tolist() == [0, 5]


@RESULT_LANES
def test_space_rule_classifies_every_id(way: Way) -> None:
    """Each id follows a letter in a document of two bytes: only one that closes reads a patch."""
    others = torch.arange(301, device=way.device)
    others[300] = 2**32 + ord("a")  # no letter, although its lower bits are one
    pairs = torch.stack([torch.full_like(others, ord("a")), others], 1)
    documents = torch.arange(0, 603, 2, dtype=torch.int32, device=way.device)
    got = find_patches(pairs.flatten(), rule="space", cu_seqlens=documents, impl=way.impl)
    closing = (got.read_ids[1::2] >= 0).nonzero().flatten().tolist()
    letters = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert closing == sorted(set(range(301)) - set(letters) - set(range(0x80, 0xC0)))


@RESULT_LANES
def test_a_document_that_begins_with_a_space_closes_there(cut: Cut) -> None:
    got = cut(text_ids(b"a  b"), rule="space", cu_seqlens=ints(0, 2, 4))
    assert got.cu_patchlens.tolist() == [0, 2, 3, 4]
    assert got.read_ids.tolist() == [-1, 0, 1, 1]


@RESULT_LANES
def test_starts_are_read_one_patch_back(cut: Cut) -> None:
    ids = text_ids(b"abcdefgh")
    got = cut(ids, patch_start_mask=mask(8, 3, 5))
    assert got.cu_patchlens.tolist() == [0, 3, 5, 8]
    assert got.read_ids.tolist() == [-1, -1, -1, 0, 0, 1, 1, 1]
    capped = cut(ids, patch_start_mask=mask(8, 3, 5), max_patch_len=2)
    assert capped.cu_patchlens.tolist() == [0, 2, 3, 5, 7, 8]
    # Reaching the limit is known at once; being followed by a start is not.
    assert capped.read_ids.tolist() == [-1, 0, 0, 1, 2, 2, 3, 3]


@RESULT_LANES
def test_forced_closes_restart_at_natural_ones(cut: Cut) -> None:
    got = cut(text_ids(b"abcdefg"), patch_end_mask=mask(7, 3), max_patch_len=3)
    assert got.cu_patchlens.tolist() == [0, 3, 4, 7]
    assert got.read_ids.tolist() == [-1, -1, 0, 1, 1, 1, 2]
    got = cut(text_ids(b"abcdefghij"), rule="fixed", patch_size=5, max_patch_len=3)
    assert got.cu_patchlens.tolist() == [0, 3, 5, 8, 10]


@RESULT_LANES
def test_fixed_counts_from_the_document(cut: Cut) -> None:
    got = cut(text_ids(b"abcdefgh"), rule="fixed", patch_size=3, cu_seqlens=ints(0, 4, 8))
    assert got.cu_patchlens.tolist() == [0, 3, 4, 7, 8]
    assert got.read_ids.tolist() == [-1, -1, 0, 0, -1, -1, 2, 2]
    assert got.cu_seqlens.tolist() == [0, 2, 4]


@RESULT_LANES
def test_documents_may_be_empty_and_end_before_the_bytes(cut: Cut) -> None:
    got = cut(text_ids(b"abcdef"), patch_end_mask=mask(6, 1), cu_seqlens=ints(0, 0, 3, 3, 4))
    assert got.cu_patchlens.tolist() == [0, 2, 3, 4]
    assert got.patch_ids.tolist() == [0, 0, 1, 2, -1, -1]
    assert got.read_ids.tolist() == [-1, 0, 0, -1, -1, -1]
    assert got.cu_seqlens.tolist() == [0, 0, 2, 2, 3]
    nothing = cut(text_ids(b"abc"), patch_end_mask=mask(3, 1), cu_seqlens=ints(0))
    assert nothing.cu_patchlens.tolist() == [0]
    assert nothing.patch_ids.tolist() == [-1, -1, -1]
    assert nothing.cu_seqlens.tolist() == [0]


@RESULT_LANES
def test_unused_slots_are_empty_at_the_last_offset(cut: Cut) -> None:
    got = cut(text_ids(b"abcd"), patch_end_mask=mask(4, 1), cu_seqlens=ints(0, 3), max_patches=5)
    assert got.cu_patchlens.tolist() == [0, 2, 3, 3, 3, 3]
    assert got.n_patches.item() == 2
    assert got.cu_seqlens.tolist() == [0, 2]


@RESULT_LANES
def test_overflow_reads_the_last_slot_of_the_own_document(cut: Cut) -> None:
    options: dict[str, Any] = {"rule": "fixed", "patch_size": 2, "cu_seqlens": ints(0, 6, 10)}
    got = cut(text_ids(b"abcdefghij"), **options, max_patches=2)
    assert got.cu_patchlens.tolist() == [0, 2, 4]
    assert got.patch_ids.tolist() == [0, 0, 1, 1, *[-1] * 6]
    assert got.read_ids.tolist() == [-1, 0, 0, 1, 1, 1, -1, -1, -1, -1]
    assert got.n_patches.item() == 5
    assert got.cu_seqlens.tolist() == [0, 2, 2]
    got = cut(text_ids(b"abcdefghij"), **options, max_patches=4)
    assert got.cu_patchlens.tolist() == [0, 2, 4, 6, 8]
    assert got.read_ids.tolist() == [-1, 0, 0, 1, 1, 2, -1, 3, 3, 3]
    assert got.cu_seqlens.tolist() == [0, 3, 4]


@RESULT_LANES
def test_a_document_that_begins_where_slots_end_reads_nothing(cut: Cut) -> None:
    options: dict[str, Any] = {"rule": "fixed", "patch_size": 2, "cu_seqlens": ints(0, 6, 8)}
    got = cut(text_ids(b"abcdefgh"), **options, max_patches=3)
    assert got.cu_patchlens.tolist() == [0, 2, 4, 6]
    assert got.patch_ids.tolist() == [0, 0, 1, 1, 2, 2, -1, -1]
    assert got.read_ids.tolist() == [-1, 0, 0, 1, 1, 2, -1, -1]
    assert got.n_patches.item() == 4
    assert got.cu_seqlens.tolist() == [0, 3, 3]


@RESULT_LANES
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_id_dtypes_agree(cut: Cut, dtype: torch.dtype) -> None:
    got = cut(text_ids().to(dtype), rule="space", max_patch_len=3)
    assert_equal(got, cut(text_ids(), rule="space", max_patch_len=3))


@RESULT_LANES
@pytest.mark.parametrize("size", [2**31 - 1, 2**32 + 3, 2**40])
def test_sizes_beyond_int32_are_never_reached(cut: Cut, size: int) -> None:
    unlimited = cut(text_ids(), rule="space")
    assert_equal(cut(text_ids(), rule="space", max_patch_len=size), unlimited)
    whole = cut(text_ids(), rule="fixed", patch_size=size)
    assert whole.cu_patchlens.tolist() == [0, len(TEXT)]


# ---- properties -------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of find_patches, all options and edges."""
    total = draw(st.integers(0, 24))
    bools = st.lists(st.booleans(), min_size=total, max_size=total)
    ids = draw(st.lists(st.sampled_from(b"aZ5 .\n\xa9\xc3"), min_size=total, max_size=total))
    call: dict[str, Any] = {"byte_ids": torch.tensor(ids, dtype=torch.uint8)}
    how = draw(st.sampled_from(WAYS_TO_CUT))
    if how in ("patch_start_mask", "patch_end_mask"):
        call[how] = torch.tensor(draw(bools), dtype=torch.bool)
    else:
        call["rule"] = how
    if how == "fixed":
        call["patch_size"] = draw(st.integers(1, 6))
    if draw(st.booleans()):
        call["max_patch_len"] = draw(st.integers(1, 6))
    if draw(st.booleans()):
        boundaries = sorted(draw(st.lists(st.integers(0, total), max_size=4)))
        call["cu_seqlens"] = ints(0, *boundaries)
    return call


@RESULT_LANES
@given(calls(), st.none() | st.integers(1, 30))
def test_equals_the_reference(cut: Cut, call: dict[str, Any], max_patches: int | None) -> None:
    assert_equal(cut(**call, max_patches=max_patches), reference(**call, max_patches=max_patches))


@RESULT_LANES
@pytest.mark.parametrize("how", WAYS_TO_CUT)
def test_longer_texts_equal_the_reference(cut: Cut, how: str) -> None:
    """A run over several rounds of the scan, documents in a block and over many, bytes of none."""
    total, rng = 110, torch.Generator().manual_seed(0)
    ids = torch.where(torch.rand(total, generator=rng) < 0.1, ord(" "), ord("a"))
    ids[12:75] = ord("a")
    call: dict[str, Any] = {"byte_ids": ids, "cu_seqlens": ints(0, 3, 3, 5, 80, 95, 102)}
    call |= (
        {how: ids < ord("a")} if how in ("patch_start_mask", "patch_end_mask") else {"rule": how}
    )
    call |= {"patch_size": 60} if how == "fixed" else {}
    for limit, max_patches in ((None, None), (1, 1), (3, 11), (20, 12), (20, 200)):
        options = {"max_patch_len": limit, "max_patches": max_patches}
        assert_equal(cut(**call, **options), reference(**call, **options))


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.parametrize("how", WAYS_TO_CUT)
def test_default_configurations_agree_with_the_torch_path(way: Way, how: str) -> None:
    """Texts on a GPU have more blocks than one round of the scan takes."""
    if way.impl != "triton" or way.dtype != torch.float32:
        pytest.skip("the torch path is what is compared with")
    on_cpu = way.device == "cpu"
    for total in (1500,) if on_cpu else (60_000, 3_000_000):
        ids = torch.randint(0, 256, (total,), generator=torch.Generator().manual_seed(0))
        call: dict[str, Any] = {
            "byte_ids": ids.to(way.device, torch.uint8),
            "max_patches": total // 7,
        }
        call["cu_seqlens"] = ints(0, 1, 200, 1100, total - 50).to(way.device)
        marks = (ids % 9 == 0).to(way.device)
        call |= {how: marks} if how in ("patch_start_mask", "patch_end_mask") else {"rule": how}
        call |= {"patch_size": 600} if how == "fixed" else {}
        for limit in (300,) if on_cpu else (None, 300, 11):
            got = find_patches(**call, max_patch_len=limit, impl="triton")
            assert_equal(got, find_patches(**call, max_patch_len=limit, impl="torch"))


def cut_off(call: dict[str, Any], length: int) -> dict[str, Any]:
    """Cut a call to the first `length` bytes."""
    short = {
        k: v[:length] if k in ("byte_ids", "patch_start_mask", "patch_end_mask") else v
        for k, v in call.items()
    }
    if "cu_seqlens" in call:
        short["cu_seqlens"] = call["cu_seqlens"].clamp(max=length)
    return short


@RESULT_LANES
@given(calls())
def test_prefixes_know_the_same(cut: Cut, way: Way, call: dict[str, Any]) -> None:
    """Boundaries and reads of every prefix are those of the full run: nothing looks ahead."""
    full = cut(**call)
    for length in range(0, len(call["byte_ids"]), 1 if way.impl == "torch" else 11):
        got = cut(**cut_off(call, length))
        assert got.read_ids.tolist() == full.read_ids[:length].tolist()
        assert got.patch_ids.tolist() == full.patch_ids[:length].tolist()
        boundaries = [b for b in full.cu_patchlens.tolist() if b < length]
        assert [b for b in got.cu_patchlens.tolist() if b < length] == boundaries


@given(calls(), st.none() | st.integers(1, 30))
def test_reads_are_complete_and_of_the_own_document(
    call: dict[str, Any], max_patches: int | None
) -> None:
    got = find_patches(**call, max_patches=max_patches)
    ends, boundaries = got.cu_patchlens[1:].tolist(), got.cu_seqlens.tolist()
    total = len(call["byte_ids"])
    documents = call.get("cu_seqlens", ints(0, total)).tolist()
    for t, read in enumerate(got.read_ids.tolist()):
        if read >= 0:
            document = next(d for d in range(len(documents) - 1) if t < documents[d + 1])
            assert boundaries[document] <= read < boundaries[document + 1]
            assert ends[read] <= t + 1
    last = documents[-1] if got.n_patches <= len(ends) else None
    assert last is None or got.cu_patchlens[-1].item() == last


@given(calls(), st.none() | st.integers(1, 30))
def test_each_id_is_read_in_one_run(call: dict[str, Any], max_patches: int | None) -> None:
    got = find_patches(**call, max_patches=max_patches)
    states = torch.randn(len(got.cu_patchlens) - 1, 2)
    assert unpool(states, got.read_ids).shape == (len(call["byte_ids"]), 2)  # else ValueError


def byte_model(read: str, how: str) -> Any:
    """A model of one pool: logits of a byte are what it may read, and its own embedding."""
    table = torch.randn(257, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"rule": how, "patch_size": 3 if how == "fixed" else None}

    def model(ids: Tensor) -> Tensor:
        given = options
        if how in ("patch_start_mask", "patch_end_mask"):
            given = {how: ids % 4 == 0}
        patches = find_patches(ids, **given, max_patch_len=5)
        pooled = segment_pool(table[ids], patches.cu_patchlens, mode="mean")
        return unpool(pooled, getattr(patches, read), residual=table[ids])

    return model


@pytest.mark.parametrize("how", WAYS_TO_CUT)
def test_a_byte_model_is_causal_through_read_ids_alone(how: str) -> None:
    assert_causal(byte_model("read_ids", how), 257, length=32)
    with pytest.raises(AssertionError, match="leaks"):
        assert_causal(byte_model("patch_ids", how), 257, length=32)


# ---- synchronisation, compilation -------------------------------------------------------------


class Synchronisations(TorchDispatchMode):
    """Counts the ops that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")
        name = func.overloadpacket.__name__
        known_size = (kwargs or {}).get("output_size") is not None
        self.count += name.startswith(waits) and not known_size
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("max_patches", "count"), [(None, 1), (9, 0)])
@pytest.mark.parametrize("how", WAYS_TO_CUT)
def test_synchronises_once_or_never(how: str, max_patches: int | None, count: int) -> None:
    ids = text_ids()
    given = (
        {how: mask(len(ids), 2, 5)}
        if how in ("patch_start_mask", "patch_end_mask")
        else {"rule": how}
    )
    size = 4 if how == "fixed" else None
    with Synchronisations() as seen:
        find_patches(ids, **given, patch_size=size, max_patch_len=3, max_patches=max_patches)
    assert seen.count == count


@RESULT_LANES
@pytest.mark.parametrize(
    "boundaries", [(0, 5, 3, 9), (2, 6), (0, 1000), (-7, 4), (0, -5, 20), (0, 14, 2)]
)
def test_unchecked_boundaries_stay_in_bounds(way: Way, boundaries: tuple[int, ...]) -> None:
    """Compiled code does not look at values: results are then unspecified, but in range."""
    if way.dtype != torch.float32:
        pytest.skip("no floats here")
    compiled = torch.compile(find_patches, fullgraph=True, backend="eager", dynamic=False)
    ids, offsets = text_ids().to(way.device), ints(*boundaries).to(way.device)
    with _launch.overriding(small_blocks(way.device)):
        got = compiled(ids, rule="space", cu_seqlens=offsets, max_patches=6, impl=way.impl)
    total = len(TEXT)
    assert 0 <= got.cu_patchlens.min() <= got.cu_patchlens.max() <= total
    assert (got.cu_patchlens.diff() >= 0).all()
    assert -1 <= got.patch_ids.min() <= got.patch_ids.max() < 6
    assert -1 <= got.read_ids.min() <= got.read_ids.max() < 6


# ---- arguments --------------------------------------------------------------------------------

IDS = torch.zeros(4, dtype=torch.uint8)
FLAGS = torch.zeros(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "rule, patch_start_mask, patch_end_mask: expected exactly one of them, got none",
        ),
        (
            {"rule": "space", "patch_end_mask": FLAGS},
            "exactly one of them, got rule and patch_end_mask",
        ),
        (
            {"patch_start_mask": FLAGS, "patch_end_mask": FLAGS},
            "exactly one of them, got patch_start_mask and patch_end_mask",
        ),
        ({"rule": "bpe"}, "rule: expected one of 'space', 'fixed', got 'bpe'"),
        ({"rule": "fixed"}, "patch_size: expected an int >= 1, got None"),
        ({"rule": "fixed", "patch_size": 0}, "patch_size: expected an int >= 1, got 0"),
        ({"rule": "space", "patch_size": 4}, "patch_size: expected None unless"),
        ({"patch_end_mask": FLAGS, "patch_size": 4}, "patch_size: expected None unless"),
        ({"rule": "space", "max_patch_len": 0}, "max_patch_len: expected an int >= 1, got 0"),
        ({"rule": "space", "max_patches": 0}, "max_patches: expected an int >= 1, got 0"),
        ({"rule": "space", "max_patches": 2.0}, "max_patches: expected an int >= 1, got 2.0"),
        ({"rule": "space", "max_patches": True}, "max_patches: expected an int >= 1, got True"),
        ({"patch_end_mask": FLAGS[:3]}, r"patch_end_mask: expected shape \(4,\), got \(3,\)"),
        ({"patch_start_mask": IDS}, "patch_start_mask: expected dtype bool, got uint8"),
        ({"rule": "space", "cu_seqlens": ints(0, 4).long()}, "cu_seqlens: expected dtype int32"),
        ({"rule": "space", "cu_seqlens": ints()}, "cu_seqlens: expected at least 1 entry"),
        ({"rule": "space", "cu_seqlens": ints(1, 4)}, "cu_seqlens: expected first entry 0, got 1"),
        ({"rule": "space", "cu_seqlens": ints(0, 3, 2)}, "got 2 after 3 at position 2"),
        ({"rule": "space", "cu_seqlens": ints(0, 5)}, "expected last entry <= 4, got 5"),
        ({"rule": "space", "impl": "fast"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_patches(IDS, **arguments)


@pytest.mark.parametrize("ids", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), [1, 2]])
def test_wrong_ids(ids: Any) -> None:
    with pytest.raises(ValueError, match="byte_ids: expected"):
        find_patches(ids, rule="space")


def test_negative_ids() -> None:
    ids = torch.tensor([97, 32, -1, -7])
    with pytest.raises(IndexError, match="byte_ids: expected values >= 0, got -1 at position 2"):
        find_patches(ids, rule="space")
    assert find_patches(ids, rule="space", cu_seqlens=ints(0, 2)).n_patches.item() == 1
    assert find_patches(ids, rule="fixed", patch_size=2).n_patches.item() == 2


def test_which_path_takes_the_call() -> None:
    with pytest.raises(NotImplementedError, match="the tensors are on cpu"):
        find_patches(IDS, rule="space", impl="triton")
    assert explain("find_patches", IDS, rule="space", impl="torch")[0].startswith("impl='torch'")


def test_the_package_may_be_imported_where_tensors_are_made_elsewhere() -> None:
    code = """
import torch
with torch.device("meta"):
    from stlm_kernels import find_patches
patches = find_patches(torch.tensor([97, 32, 98], dtype=torch.uint8), rule="space")
print(patches.cu_patchlens.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[0, 2, 3]", done.stderr
