"""Instructions of whole warps and warpgroups as steps of the state."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from . import lanes, matrix
from .accesses import Place, count_access
from .code import Step
from .elements import WORDS, element
from .operands import Decoder
from .packs import Operation
from .parse import Constant, Instruction, Operand, PtxError, Register, Vector
from .registers import Array, Mask, signed, single, unsigned
from .state import State

WARPGROUP = 128
EVERY_LANE = 0xFFFFFFFF
"""A mask of lanes."""


def _registers(decoder: Decoder, operand: Operand, bits: int = 32) -> list[int]:
    assert isinstance(operand, Vector)
    return [decoder.slot(item, bits) for item in operand.items]


def _is_every_lane(operand: Operand) -> bool:
    return isinstance(operand, Constant) and operand.value % (1 << 32) == EVERY_LANE


def _members(decoder: Decoder, operand: Operand) -> Callable[[State, Mask], None]:
    """A check that all lanes of each warp take part: by their mask, and by being there."""
    if _is_every_lane(operand):
        return lambda state, mask: state.require_whole_warps(mask)
    slot = decoder.slot(operand, 32)

    def check(state: State, mask: Mask) -> None:
        state.require_whole_warps(mask)
        if (state.of(slot, state.active(mask)) != EVERY_LANE).any():
            at = state.current
            raise PtxError(
                f"{state.program.name}: {at.opcode} of some lanes is not known here"
                f" ({at.source or 'no source line'}, PTX line {at.line}: {at.text})"
            )

    return check


def shuffle(decoder: Decoder, instruction: Instruction) -> Step | None:
    target, value, b, c, lanes_of_it = instruction.operands
    members = _members(decoder, lanes_of_it)
    mode = instruction.parts[2]
    both = target.items if isinstance(target, Vector) else (target,)
    results = [decoder.destination(item) for item in both]
    slot, *rest = (decoder.slot(x, 32) for x in (value, b, c))
    if isinstance(b, Constant) and isinstance(c, Constant):
        if len(results) == 1 and results[0] is not None and _is_every_lane(lanes_of_it):
            return _lone_shuffle(mode, b.value, c.value, slot, results[0])
        return _fixed_shuffle(mode, b.value, c.value, slot, results, members)

    def step(state: State, mask: Mask) -> None:
        members(state, mask)
        found = lanes.shuffle(mode, *(state.whole(x) for x in (slot, *rest)))
        for result, outcome in zip(results, found, strict=False):
            if result is not None:
                state.set(result, outcome, mask)

    return step


@functools.lru_cache(maxsize=256)
def _lanes_read(mode: str, b: int, c: int, threads: int) -> tuple[Array, Array]:
    """The thread that each of so many reads by a shuffle, and whether it was in range."""
    source, in_range = lanes.sources(mode, *(np.full((1, lanes.LANES), x) for x in (b, c)))
    places = np.arange(threads).reshape(-1, lanes.LANES)
    return places[:, source[0]].reshape(-1), np.tile(in_range[0], len(places))


def _lone_shuffle(mode: str, b: int, c: int, slot: int, result: int) -> Step:
    """A shuffle by known lanes that does not ask which were in range."""

    def shuffled(value: Array) -> Array:
        return value if len(value) == 1 else value.take(_lanes_read(mode, b, c, len(value))[0])

    key = "shfl", mode, b, c
    return Operation(key, shuffled, (slot,), result, np.dtype(np.uint32), of_warps=True)


def _fixed_shuffle(
    mode: str,
    b: int,
    c: int,
    slot: int,
    results: list[int | None],
    members: Callable[[State, Mask], None],
) -> Step:
    """A shuffle whose lanes are known when it is decoded, as nearly all are."""

    def step(state: State, mask: Mask) -> None:
        members(state, mask)
        places, flags = _lanes_read(mode, b, c, state.n)
        value = state.values[slot]
        outcomes = (value if len(value) == 1 else value.take(places)), flags
        for result, outcome in zip(results, outcomes, strict=False):
            if result is not None:
                state.set(result, outcome, mask)

    return step


def reduce(decoder: Decoder, instruction: Instruction) -> Step | None:
    target, value, lanes_of_it = instruction.operands
    members = _members(decoder, lanes_of_it)
    name, *how, kind = instruction.parts[2:]
    if kind == "f32" and name in ("min", "max"):
        name = name if "NaN" in how else f"f{name}"
    elif kind not in ("s32", "u32", "b32") or how:
        return None
    result, slot = decoder.destination(target), decoder.slot(value, 32)
    view = {"s": signed, "f": single}.get(kind[0], unsigned)
    assert result is not None

    def step(state: State, mask: Mask) -> None:
        members(state, mask)
        operand = view(np.ascontiguousarray(state.whole(slot)))
        operand = np.abs(operand) if "abs" in how else operand
        state.set(result, unsigned(lanes.reduce(name, operand)), mask)

    return step


def vote(decoder: Decoder, instruction: Instruction) -> Step | None:
    target, value, lanes_of_it = instruction.operands
    members = _members(decoder, lanes_of_it)
    mode = instruction.parts[2]
    result, slot = decoder.destination(target), decoder.slot(value, 1)
    if result is None or mode not in ("any", "all", "uni", "ballot"):
        return None

    def step(state: State, mask: Mask) -> None:
        members(state, mask)
        ballot = lanes.ballot(state.whole(slot))
        outcomes = {
            "any": ballot != 0,
            "all": ballot == EVERY_LANE,
            "uni": (ballot == 0) | (ballot == EVERY_LANE),
            "ballot": ballot,
        }
        state.set(result, outcomes[mode], mask)

    return step


def elect(decoder: Decoder, instruction: Instruction) -> Step | None:
    """elect.sync: lane 0 of a whole warp is the leader."""
    target, lanes_of_it = instruction.operands
    members = _members(decoder, lanes_of_it)
    items = target.items if isinstance(target, Vector) else (target,)
    leader, chosen = decoder.destination(items[0]), decoder.destination(items[-1])

    def step(state: State, mask: Mask) -> None:
        members(state, mask)
        if len(items) == 2 and leader is not None:
            state.set(leader, np.zeros(1, np.uint32), mask)
        if chosen is not None:
            state.set(chosen, state.thread % lanes.LANES == 0, mask)

    return step


def active_mask(decoder: Decoder, instruction: Instruction) -> Step | None:
    result = decoder.destination(instruction.operands[0])
    assert result is not None

    def step(state: State, mask: Mask) -> None:
        active = np.ones(state.n, bool) if mask is None else mask
        state.set(result, lanes.ballot(active), mask)

    return step


def warp_barrier(decoder: Decoder, instruction: Instruction) -> Step | None:
    """bar.warp.sync; block-wide barriers are flow, those of some threads are not known here."""
    if "warp" not in instruction.parts:
        return None
    return _members(decoder, instruction.operands[0])


def fence(decoder: Decoder, instruction: Instruction) -> Step | None:
    """fence.proxy.async shows generic writes to shared memory to the asynchronous proxy."""
    spaces = [part for part in instruction.parts if part.startswith(("shared", "global"))]
    if instruction.parts[1:3] != ["proxy", "async"] or spaces == ["global"]:
        return lambda state, mask: None

    def step(state: State, mask: Mask) -> None:
        if state.shared.order is not None:
            state.shared.order.fence(state.active(mask))

    return step


def _matrix_access(instruction: Instruction) -> tuple[int, bool] | None:
    """Count of 8 x 8 matrices of 16-bit words, and whether they are transposed."""
    parts = instruction.parts
    counts = {"x1": 1, "x2": 2, "x4": 4}
    found = [counts[part] for part in parts if part in counts]
    if len(found) != 1 or "m8n8" not in parts or parts[-1] != "b16":
        return None
    return found[0], "trans" in parts


class _Rows:
    """Accesses of matrix rows: the lanes whose addresses count, and the positions of the rows."""

    def __init__(self, state: State, place: Place, mask: Mask, count: int) -> None:
        state.require_whole_warps(mask)
        self.threads = state.active(mask)
        addresses = place.of(state, self.threads)
        self.first = lanes.rows_of_matrices(addresses, count).reshape(-1)
        self.used = used = lanes.rows_of_matrices(self.threads, count).reshape(-1)
        self.report = state.reporter(used)
        self.index = state.shared.index(self.first, 16, used, self.report)


def load_matrix(decoder: Decoder, instruction: Instruction) -> Step | None:
    form = _matrix_access(instruction)
    if form is None:
        return None
    count, transposed = form
    slots = _registers(decoder, instruction.operands[0])
    place = Place(decoder, instruction.operands[1], "shared")

    def step(state: State, mask: Mask) -> None:
        rows = _Rows(state, place, mask, count)
        count_access(state, "shared", "load", rows.first, 16, rows.used)
        state.shared.check_read(rows.index, 16, rows.used, rows.report)
        words = state.shared.elements.of(16).take(rows.index).view(np.uint16)
        fragments = lanes.fragments_of(words.reshape(-1, count, 8, 8), transposed)
        for slot, fragment in zip(slots, fragments, strict=True):
            state.put(slot, rows.threads, fragment, mask)

    return step


def store_matrix(decoder: Decoder, instruction: Instruction) -> Step | None:
    form = _matrix_access(instruction)
    if form is None:
        return None
    count, transposed = form
    place = Place(decoder, instruction.operands[0], "shared")
    slots = _registers(decoder, instruction.operands[1])

    def step(state: State, mask: Mask) -> None:
        rows = _Rows(state, place, mask, count)
        count_access(state, "shared", "store", rows.first, 16, rows.used)
        fragments = [state.of(slot, rows.threads) for slot in slots]
        words = np.ascontiguousarray(lanes.matrices_of(fragments, transposed))
        elements = words.reshape(-1).view(element(16))
        state.shared.put(rows.index, elements, 16, rows.used, rows.report)

    return step


def count_flops(state: State, shape: matrix.Shape, products: int) -> None:
    costs = state.costs
    if costs is not None:
        flops = 2 * shape.m * shape.n * shape.k * products
        costs.add(**{f"matrix_flops_{shape.kind}": flops})


def multiply(decoder: Decoder, instruction: Instruction) -> Step | None:
    """mma.sync."""
    shape = matrix.shape_of(instruction.opcode)
    if shape is None:
        return None
    bits = shape.operand_bits
    d, a, b, c = (_registers(decoder, operand, bits) for operand in instruction.operands)
    rows = min(shape.m, 16)

    def step(state: State, mask: Mask) -> None:
        state.require_whole_warps(mask)
        threads = state.active(mask)

        left = matrix.operand_a(state.fragments(a, threads), shape)
        right = matrix.operand_b(state.fragments(b, threads), shape)
        count_flops(state, shape, len(threads) // lanes.LANES)
        before = matrix.accumulator(state.fragments(c, threads), shape.n, shape.sums, rows)
        total = matrix.product(left, right, before, shape.sums, shape.saturates)
        for slot, value in zip(d, matrix.registers_of(total, len(d), shape.sums), strict=True):
            state.put(slot, threads, value.reshape(-1), mask)

    return step


def multiply_asynchronously(decoder: Decoder, instruction: Instruction) -> Step | None:
    """wgmma: products of a warpgroup, and the fence, groups and waits around them."""
    kind = instruction.parts[1]
    if kind == "fence":
        return lambda state, mask: None
    if kind == "commit_group":
        return lambda state, mask: state.products.commit(mask)
    if kind == "wait_group":
        newest = instruction.operands[0]
        assert isinstance(newest, Constant)
        return lambda state, mask: state.products.wait(mask, newest.value)
    return _Warpgroup(decoder, instruction).step if kind == "mma_async" else None


class _Warpgroup:
    """One wgmma.mma_async: D (64 x n) = A (64 x k) B (k x n) + D, A in registers or in memory."""

    def __init__(self, decoder: Decoder, instruction: Instruction) -> None:
        shape = matrix.shape_of(instruction.opcode)
        assert shape is not None
        self.shape = shape
        d, a, b, scale, *rest = instruction.operands
        self.sums = _registers(decoder, d)
        self.left = _registers(decoder, a) if isinstance(a, Vector) else None
        self.left_descriptor = None if self.left else decoder.slot(a, 64)
        self.right_descriptor = decoder.slot(b, 64)
        self.scale = decoder.slot(scale, 1 if isinstance(scale, Register) else 32)
        flags = [x.value for x in rest if isinstance(x, Constant)]
        assert flags[:2] in ([], [1, 1]), "negated operands"
        transposed = flags[2:]
        self.right_transposed = bool(transposed and transposed[-1])
        self.left_transposed = bool(len(transposed) == 2 and transposed[0])

    def step(self, state: State, mask: Mask) -> None:
        state.require_whole_warps(mask)
        threads = state.active(mask)
        n, k, kind = self.shape.n, self.shape.k, self.shape.sums
        read: list[Array] = []  # units of shared memory
        if self.left is not None:
            registers = state.fragments(self.left, threads)
            left = matrix.operand_a(registers, self.shape).reshape(-1, 64, k)
        else:
            assert self.left_descriptor is not None
            left = self._operand(
                state, threads, self.left_descriptor, 64, self.left_transposed, read
            )
        right = self._operand(state, threads, self.right_descriptor, n, self.right_transposed, read)
        sums = state.fragments(self.sums, threads)
        before = matrix.accumulator(sums, n, kind).reshape(-1, 64, n)
        scale = state.of(self.scale, threads)[::WARPGROUP, None, None]
        before = np.where(scale, before, before.dtype.type(0))
        total = matrix.product(left, right.swapaxes(1, 2), before, kind, self.shape.saturates)
        values = matrix.registers_of(total.reshape(-1, 16, n), len(self.sums), kind)
        for slot, value in zip(self.sums, values, strict=True):
            state.put(slot, threads, value.reshape(-1), mask)
        state.products.issue(self.sums, read, mask)
        count_flops(state, self.shape, len(threads) // WARPGROUP)

    def _operand(
        self,
        state: State,
        threads: Array,
        slot: int,
        rows: int,
        transposed: bool,
        read: list[Array],
    ) -> Array:
        """(warpgroups, rows, k) from shared memory, as fp32; its units are added to `read`."""
        first, kind, k = threads[::WARPGROUP], self.shape.kind, self.shape.k
        size = matrix.BYTES[kind]
        # Elements lie side by side in units along one of the two dimensions.
        offsets = np.stack(
            [
                matrix.unit_offsets(descriptor, rows, k, size, not transposed)
                for descriptor in state.of(slot, first).tolist()
            ]
        )
        shared, report = state.shared, state.reporter(first)
        count = offsets.shape[1] * offsets.shape[2]
        each = first.repeat(count)
        units = shared.index(offsets.reshape(-1), matrix.UNIT, each, state.reporter(each))
        shared.check_product(units.reshape(-1, count), matrix.UNIT, first, report)
        read.append(units)
        found = shared.elements.of(matrix.UNIT).take(units)
        words = found.view(WORDS[size]).reshape(*offsets.shape, -1)
        if transposed:  # a unit is of several rows
            words = words.swapaxes(2, 3)
        return matrix.of_words(words.reshape(len(first), rows, k), kind)
