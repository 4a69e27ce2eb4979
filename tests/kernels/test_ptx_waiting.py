"""Programs that wait for each other, in whatever order they run; and those that wait for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stlm_kernels import ptx
from stlm_kernels.ptx import Fault, launch, progress, turns

pytestmark = [pytest.mark.lanes("compiled"), pytest.mark.parametrize("arch", [80, 90])]
RACES = ("race",)
"""An order that only atomics give is not followed: what is written under it counts as a race."""


@pytest.fixture(name="kernels")
def kernels_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels, of which few programs run at once."""
    from helpers import ptx_waiting

    monkeypatch.setattr(launch, "THREADS_AT_ONCE", 96)
    return ptx_waiting


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("step", [1, -1, 5])
def test_programs_that_wait_for_a_later_one(
    kernels: Any, arch: int, step: int, atomic: bool
) -> None:
    flags, out = (torch.zeros(12, dtype=torch.int32) for _ in range(2))
    ptx.run(
        kernels.wait_for_another, (12,), flags, out, STEP=step, ATOMIC=atomic, arch=arch,
        collect=RACES, num_warps=1,
    )  # fmt: skip
    distances = [(11 - i if step > 0 else i) // abs(step) for i in range(12)]
    assert out.tolist() == [1 + distance for distance in distances]


@pytest.mark.parametrize("warps", [1, 4])
def test_programs_that_meet(kernels: Any, arch: int, warps: int) -> None:
    counter, flags, out = torch.zeros(1, dtype=torch.int32), *torch.zeros(2, 9, dtype=torch.int32)
    ptx.run(
        kernels.meet, (9,), counter, flags, out, N=9, arch=arch, collect=RACES, num_warps=warps
    )  # fmt: skip
    assert out.tolist() == [9] * 9


@pytest.mark.parametrize("warps", [1, 4])
def test_programs_that_take_one_lock(kernels: Any, arch: int, warps: int) -> None:
    lock, total = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    ptx.run(
        kernels.add_under_a_lock, (15,), lock, total, arch=arch, collect=RACES, num_warps=warps
    )  # fmt: skip
    assert (int(lock), int(total)) == (0, 15)


@pytest.mark.parametrize("consumer", [1, 6])
def test_work_until_another_program_says_that_it_is_enough(
    kernels: Any, arch: int, consumer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that works never waits, in a batch with the other or in one before it."""
    monkeypatch.setattr(progress, "SLICE", 512)
    stop, count = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    ptx.run(
        kernels.work_until_told, (7,), stop, count, 500, CONSUMER=consumer, arch=arch,
        collect=RACES, num_warps=1,
    )  # fmt: skip
    assert int(stop) == 1
    assert int(count) >= 500


def test_waiting_that_ends_by_itself(kernels: Any, arch: int) -> None:
    flag, out = torch.zeros(1, dtype=torch.int32), torch.empty(6 * 32, dtype=torch.int32)
    ptx.run(kernels.wait_for_a_while, (6,), flag, out, 2000, N=32, arch=arch, num_warps=1)
    assert (out == 2000).all()


def test_loops_that_read_one_word_work(kernels: Any, arch: int) -> None:
    x, out = torch.arange(6 * 32, dtype=torch.int32), torch.empty(6 * 32, dtype=torch.int32)
    ptx.run(kernels.same_word, (6,), x, out, 2000, N=32, arch=arch, num_warps=1)
    assert torch.equal(out, 2000 * x)


@pytest.mark.parametrize("atomic", [True, False])
def test_a_store_that_never_comes(kernels: Any, arch: int, atomic: bool) -> None:
    flags, out = (torch.zeros(6, dtype=torch.int32) for _ in range(2))
    arguments: Any = (kernels.wait_for_another, (6,), flags, out)
    options: Any = {"STEP": 0, "ATOMIC": atomic, "arch": arch, "num_warps": 1}
    with pytest.raises(
        Fault,
        match=r"deadlock: wait_for_another, ptx_waiting.py:\d+, PTX line \d+ \(.*\): block 0, "
        r"thread 0: waits for a store that no other thread makes",
    ):
        ptx.run(*arguments, **options)
    (fault,) = ptx.run(*arguments, collect=("deadlock", "race"), **options).faults
    assert fault.kind == "deadlock"
    with pytest.raises(Fault, match="no other thread of those that run here makes"):
        ptx.run(*arguments, sample=2, **{**options, "STEP": 1})


def test_a_lock_that_is_never_given_back(kernels: Any, arch: int) -> None:
    lock, total = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Fault, match="deadlock: add_under_a_lock"):
        ptx.run(kernels.add_under_a_lock, (7,), lock, total, arch=arch, num_warps=1)
    assert int(total) == 0


def test_counting_does_not_hide_that_a_store_never_comes(
    kernels: Any, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registers that change are no progress when nothing else does for very long."""
    monkeypatch.setattr(turns, "MOST_IDLE_ROUNDS", 200)
    flag, out = torch.zeros(1, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    with pytest.raises(Fault, match="deadlock: wait_for_a_while"):
        ptx.run(
            kernels.wait_for_a_while, (1,), flag, out, 2**31 - 1, N=32, arch=arch, num_warps=1
        )  # fmt: skip
