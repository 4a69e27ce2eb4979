"""Compiled kernels executed on the CPU: right values, and every check seen to catch its fault."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ptx_launches import again, products, replaced, rows, sums, without

from stlm_kernels import byte_pool, ptx
from stlm_kernels.ptx import Fault, PtxError
from stlm_kernels.ptx.faults import KINDS

pytestmark = pytest.mark.lanes("compiled")
ARCHS = pytest.mark.parametrize("arch", [80, 90])


@pytest.fixture(name="kernels")
def kernels_of_the_tests() -> Any:
    from helpers import ptx_kernels

    return ptx_kernels


def test_elementwise_values(kernels: Any) -> None:
    _, out, want = rows(kernels)
    assert torch.equal(out, want)


def test_sums_across_warps(kernels: Any) -> None:
    _, out, want = sums(kernels)
    torch.testing.assert_close(out, want)


@ARCHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_products(kernels: Any, arch: int, dtype: torch.dtype) -> None:
    done, out, want = products(kernels, arch, dtype)
    assert ("wgmma" if arch == 90 else "mma.sync") in done.ptx
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)


@ARCHS
def test_tf32_products(kernels: Any, arch: int) -> None:
    done, out, want = products(kernels, arch, torch.float32)
    assert "tf32" in done.ptx
    assert float((out - want).norm()) < 2e-3 * float(want.norm())


def test_lanes_and_blocks_that_leave_loops_at_different_times(kernels: Any) -> None:
    x = torch.tensor([0, 3, 1, 7] * 64, dtype=torch.int32)
    x[128:] = 2
    out = torch.full((256,), -1, dtype=torch.int32)
    ptx.run(kernels.count_down, (8,), x, out, 256, BLOCK=32, num_warps=1)
    assert torch.equal(out, x)


def test_atomics(kernels: Any) -> None:
    ids = torch.randint(0, 5, (300,), dtype=torch.int32)
    bins = torch.zeros(5, dtype=torch.int32)
    ptx.run(kernels.add_to_bins, (3,), ids, bins, 300, BLOCK=128, num_warps=4)
    assert torch.equal(bins, torch.bincount(ids, minlength=5).int())


def test_a_store_without_its_predicate_leaves_the_tensors(kernels: Any) -> None:
    done, _, _ = rows(kernels, 1001)
    with pytest.raises(
        Fault, match=r"outside: add_rows, ptx_kernels.py:\d+, .*block 7, thread"
    ) as e:
        again(done, replaced(r"@%p\d+ (st\.global)", r"\1", count=99))
    assert e.value.kind == "outside"
    assert e.value.place is not None
    assert e.value.place.block == 7
    assert re.fullmatch(
        r"4 bytes at byte 40\d\d of argument 2 \(1001,\), which has 4004", e.value.detail
    )


def test_a_load_shifted_by_two_bytes_is_misaligned(kernels: Any) -> None:
    done, _, _ = rows(kernels)
    with pytest.raises(Fault, match="misaligned"):
        again(done, replaced(r"(ld\.global[\w.]+ \{[^}]*\}, \[ %rd\d+ \+) 0", r"\1 2"))


def test_a_wrong_address_changes_values_or_leaves_the_tensors(kernels: Any) -> None:
    done, out, want = rows(kernels)
    with pytest.raises(Fault, match="outside"):
        again(done, replaced(r"(st\.global[\w.]+ \[ %rd\d+ \+) 0", r"\1 4096", count=99))
    assert torch.equal(out, want)


def test_sums_without_their_barrier_race(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    with pytest.raises(Fault, match="race: row_sums"):
        again(done, without(r"bar\.sync\s+0;"))


def test_a_barrier_that_half_a_block_skips(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    skip = (
        "{ .reg .pred %half; .reg .b32 %which; mov.u32 %which, %tid.x;\n"
        "setp.lt.u32 %half, %which, 64;\n@%half bra $SKIP;\nbar.sync 0;\n$SKIP: }"
    )
    with pytest.raises(Fault, match="barrier"):
        again(done, replaced(r"bar\.sync\s+0;", skip))


def test_a_barrier_that_is_switched_off_for_half_a_block(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    half = (
        "{ .reg .pred %half; .reg .b32 %which; mov.u32 %which, %tid.x;\n"
        "setp.lt.u32 %half, %which, 64;\n@%half bar.sync 0; }"
    )
    with pytest.raises(Fault, match=r"barrier: .*some threads of the block never reach"):
        again(done, replaced(r"bar\.sync\s+0;", half))


def test_a_shuffle_that_half_a_warp_skips(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    skip = (
        "{ .reg .pred %half; .reg .b32 %which; mov.u32 %which, %laneid;\n"
        "setp.lt.u32 %half, %which, 16;\n@%half bra $SKIP;\n\\g<0>\n$SKIP: }"
    )
    with pytest.raises(Fault, match=r"barrier: row_sums.*all 32 lanes"):
        again(done, replaced(r"shfl\.sync\.bfly[^;]*;", skip))


def test_shared_memory_off_by_a_row(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    with pytest.raises(Fault, match=r"unwritten|outside|race"):
        again(done, replaced(r"(ld\.shared\.b32 +\S+ \[ ?%r\d+)( \+ 0)? ?\]", r"\1+32]", count=9))


def test_more_shared_memory_than_was_asked_for(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    with pytest.raises(Fault, match=r"outside: .* bytes beyond the 8 of shared memory"):
        ptx.execute(done.ptx, done.grid, done.arguments, shared_bytes=8)


@ARCHS
def test_copies_read_before_their_wait(kernels: Any, arch: int) -> None:
    done, _, _ = products(kernels, arch)
    assert "cp.async.wait_group" in done.ptx
    with pytest.raises(Fault, match="async: multiply"):
        again(done, without(r"cp\.async\.wait_group[^;]*;"))
    with pytest.raises(Fault, match="async"):
        again(done, replaced(r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 9;", count=99))


@ARCHS
def test_copies_read_without_a_barrier(kernels: Any, arch: int) -> None:
    done, _, _ = products(kernels, arch)
    with pytest.raises(Fault, match="race"):
        again(done, without(r"bar\.sync\s+0;"))


@pytest.mark.parametrize(
    ("arch", "pattern", "new"),
    [
        (80, r"(mma\.sync[^{]*\{[^}]*\}, )(\{[^}]*\})", r"\1{ %r1, %r1, %r1, %r1 }"),
        (80, r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans", "ldmatrix.sync.aligned.m8n8.x4"),
        (90, r", 1, 1, 1, 0, 1;|, 1, 1, 0, 1;", ", 1, 1, 0, 0;"),
        (90, r"(wgmma\.mma_async[^;]*), (%rd\d+), (%rd\d+),", r"\1, \3, \2,"),
    ],
    ids=["operand", "untransposed", "transposed flag", "swapped descriptors"],
)
def test_wrong_operands_change_products(kernels: Any, arch: int, pattern: str, new: str) -> None:
    done, out, want = products(kernels, arch)
    if not re.search(pattern, done.ptx):
        pytest.skip("this triton writes the product otherwise")
    out.fill_(float("nan"))
    again(done, replaced(pattern, new, count=999), collect=KINDS)
    assert not torch.allclose(out, want, rtol=1e-3, atol=1e-2)


def test_a_wrong_rounding_changes_values(kernels: Any) -> None:
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16()
    out = torch.empty(64, 64, dtype=torch.bfloat16)
    done = ptx.run(
        kernels.multiply, (1,), a, b, out, 128, arch=80, M=64, N=64, K=32, num_warps=4
    )  # fmt: skip
    right = out.clone()
    again(done, replaced(r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2", count=999))
    assert not torch.equal(out, right)


def test_an_element_never_stored() -> None:
    ids, table = torch.randint(0, 256, (64,), dtype=torch.uint8), torch.randn(256, 32)
    cu = torch.tensor([0, 20, 64], dtype=torch.int32)
    with ptx.executing(arch=90) as session:
        out = byte_pool(ids, table, cu, impl="triton")
        session.assert_written(out)
        made = torch.empty(3, 4)
        with pytest.raises(AssertionError, match=r"12 of 12 elements .*, the first at \(0, 0\)"):
            session.assert_written(made)
        made[:] = 1  # torch wrote it
        session.assert_written(made)


def test_reading_what_nothing_wrote(kernels: Any) -> None:
    with ptx.executing() as session:
        x, out = torch.empty(64), torch.empty(64)
        shadows = session.shadows()
        with pytest.raises(Fault, match=r"unwritten: add_rows.*of argument 0 \(64,\)"):
            ptx.run(
                kernels.add_rows, (1,), x, torch.ones(64), out, 64, fresh=shadows, BLOCK=64,
                num_warps=1,
            )  # fmt: skip


@pytest.mark.parametrize("lead", [0, 1, 4, 13])
def test_storages_that_begin_anywhere(kernels: Any, lead: int) -> None:
    """Words are aligned in memory, not from where the storage begins."""
    memory = bytearray(range(200, 256)) + bytearray(range(256)) * 3
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 128
    x = torch.frombuffer(memory, dtype=torch.uint8, offset=begin + 16 - lead)[lead:][:512]
    assert x.data_ptr() % 16 == 0
    out = torch.zeros(512, dtype=torch.uint8)
    ptx.run(kernels.add_rows, (1,), x, out.clone(), out, 512, BLOCK=512, num_warps=1)
    assert torch.equal(out, x)


def test_blocks_that_read_one_word_and_one_that_writes_it(kernels: Any) -> None:
    """Reads of several blocks are remembered as such, at whatever size they came."""
    words = torch.zeros(64, dtype=torch.int32)
    done = ptx.run(kernels.add_rows, (2,), words, words, torch.empty_like(words), 64, BLOCK=32,
                   num_warps=1)  # fmt: skip
    one_place = re.sub(
        r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;", done.ptx
    )  # both blocks read and write the first half
    assert one_place != done.ptx
    arguments = (words, words, words, 64)
    ptx.execute(one_place, (2,), arguments, shared_bytes=0)  # they write what was there
    words += 1
    with pytest.raises(Fault, match=r"race: add_rows"):
        ptx.execute(one_place, (2,), arguments, shared_bytes=0)


def test_two_blocks_that_write_one_row(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    with pytest.raises(Fault, match=r"race: row_sums.*another thread writes other values"):
        again(done, _to_one_row)


def _to_one_row(text: str) -> str:
    """All programs store to the first row: the address of the store without its offset."""
    first = re.search(r"ld\.param\.b64\s+(%rd\d+), \[row_sums_param_1\]", text)
    assert first is not None
    return re.sub(r"(st\.global\.b32 \[ )%rd\d+", rf"\g<1>{first[1]}", text)


def test_what_is_not_known_names_the_instruction_and_the_line(kernels: Any) -> None:
    done, _, _ = rows(kernels)
    with pytest.raises(
        PtxError, match=r"tcgen05.alloc.* is not known here \(ptx_kernels.py:\d+, PTX line"
    ):
        again(
            done,
            replaced(
                r"\n(\s*)(@%p\d+ )?st\.global", r"\n tcgen05.alloc.sync %r1, 4;\n\1\2st.global"
            ),
        )


def test_unknown_instructions_that_are_never_reached_do_no_harm(kernels: Any) -> None:
    done, out, want = rows(kernels)
    again(done, replaced(r"\n(\s*)ret;", r"\n ret;\n tcgen05.alloc.sync %r1, 4;\n ret;"))
    assert torch.equal(out, want)


def test_predicates_of_halves(kernels: Any) -> None:
    """setp of two 16-bit floats has a predicate for each, not one and its negation."""
    done, out, _ = rows(kernels)
    compare = (
        "{ .reg .pred %low, %high; .reg .b32 %pair, %zero;\n"
        "mov.b32 %pair, 0x7E003C00; mov.b32 %zero, 0;\n"  # NaN above 1.0
        "setp.nan.f16x2 %low|%high, %pair, %zero;\n"
        "@%low mov.b32 %value, 0x3F800000;\n@%high mov.b32 %value, 0x40000000; }\n"
    )

    def plant(text: str) -> str:
        text = re.sub(r"(\.reg \.b64[^;]*;)", r"\1\n.reg .b32 %value;", text, count=1)
        return re.sub(
            r"(@%p\d+ st\.global\.b32 \[ %rd\d+ \+ 0 \], \{ )%r\d+",
            lambda found: compare + found[1] + "%value",
            text,
        )

    again(done, plant)
    assert torch.equal(out, torch.full_like(out, 2.0))


def test_lanes_that_store_different_values(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    with pytest.raises(Fault, match=r"lanes: row_sums.*another lane stores another value there"):
        again(
            done,
            replaced(
                r"bar\.sync\s+0;",
                "{ .reg .b32 %mine; mov.u32 %mine, %laneid; st.shared.b32 [global_smem], %mine; }"
                " bar.sync 0;",
            ),
            collect=("race", "unwritten"),
        )


def test_faults_can_be_collected(kernels: Any) -> None:
    done, _, _ = sums(kernels)
    found = again(done, without(r"bar\.sync\s+0;"), collect=("race", "unwritten")).faults
    assert {fault.kind for fault in found} <= {"race", "unwritten"}
    assert found
    with pytest.raises(ValueError, match="collect: expected kinds of"):
        ptx.execute(done.ptx, done.grid, done.arguments, shared_bytes=64, collect=("racing",))


def test_tensors_elsewhere_are_refused(kernels: Any) -> None:
    done, _, _ = rows(kernels)
    arguments = (torch.empty(4, device="meta"), *done.arguments[1:])
    with pytest.raises(ValueError, match="expected CPU tensors, got one on meta"):
        ptx.execute(done.ptx, done.grid, arguments, shared_bytes=0)


def test_issues_are_counted(kernels: Any) -> None:
    done, _, _ = rows(kernels)
    stores = [
        int(count)
        for instruction, count in zip(done.program.instructions, done.counts.issued, strict=False)
        if instruction.opcode.startswith("st.global")
    ]
    assert set(stores) == {8 * 2}, "each store is issued by the two warps of eight programs"


def test_importing_the_library_does_not_load_the_executor() -> None:
    code = "import stlm_kernels, stlm_models, sys; assert 'stlm_kernels.ptx' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_what_follows_a_label_is_issued_once() -> None:
    text = """.visible .entry one() .reqntid 32 { .reg .b32 %a;
    mov.u32 %a, 1; reached: add.u32 %a, %a, 1; ret; }"""
    done = ptx.execute(text, (2,), (), shared_bytes=0)
    assert done.counts.issued[:3].tolist() == [2, 2, 2]


def test_a_branch_with_a_label_is_issued_from_above_and_from_afar() -> None:
    """It ends the run before it, and is a run of its own for those that jump there."""
    text = """.visible .entry both() .reqntid 64 { .reg .b32 %t; .reg .pred %p, %q;
    mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 32; setp.lt.u32 %q, %t, 0;
    @%p bra $THERE; mov.u32 %t, 1; $THERE: @%q bra $END; mov.u32 %t, 2; $END: ret; }"""
    done = ptx.execute(text, (1,), (), shared_bytes=0)
    assert done.counts.issued.tolist() == [2, 2, 2, 2, 1, 2, 2, 2, 0]


def test_threads_that_left_a_loop_keep_what_they_had() -> None:
    text = """.visible .entry one(.param .u64 out) .reqntid 64 { .reg .b32 %t, %n, %twice;
    .reg .pred %p; .reg .b64 %at, %o; ld.param.u64 %o, [out]; mov.u32 %t, %tid.x; mov.u32 %n, 0;
    again: add.u32 %twice, %n, %n; sub.u32 %twice, %twice, %n; add.u32 %n, %twice, 1;
    setp.lt.u32 %p, %n, %t; @%p bra again;
    mul.wide.u32 %at, %t, 4; add.s64 %o, %o, %at; st.global.b32 [%o], %n; ret; }"""
    out = torch.zeros(64, dtype=torch.int32)
    ptx.execute(text, (1,), (out,), shared_bytes=0)
    assert out.tolist() == [1, *range(1, 64)]


def test_a_warp_that_waits_at_a_barrier_does_not_order_what_others_do_before_it() -> None:
    text = """.visible .entry early(.param .u64 out) .reqntid 64 {
    .reg .b32 %t, %a, %v; .reg .pred %p;
    mov.u32 %t, %tid.x; mov.u32 %a, 0; setp.ge.u32 %p, %t, 32;
    @%p bra $LATE;
    st.shared.b32 [%a], 7;
    $MEET: bar.sync 0; ret;
    $LATE: ld.shared.b32 %v, [%a]; bra $MEET; }"""
    with pytest.raises(Fault, match=r"race: early.*another warp wrote it since the last barrier"):
        ptx.execute(text, (2,), (torch.zeros(1),), shared_bytes=16)
