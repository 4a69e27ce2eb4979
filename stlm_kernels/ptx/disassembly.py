"""Instructions of the machine code, weighted by how often their source lines ran.

The assembler moves, merges and copies instructions, so its code has no exact map from PTX's. Both
name the source line of each instruction: a line's machine instructions are taken to run as often as
its PTX instructions did. Where it unrolled a loop its code holds the loop's lines several times;
how often shows in the loop's accesses, shuffles and barriers, which it neither adds nor removes.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .launch import Execution

_FILE_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
PADDING = ("NOP",)
KEPT = {
    "LDG": "ld.global", "STG": "st.global", "LDS": "ld.shared", "STS": "st.shared",
    "LDGSTS": "cp.async", "LDSM": "ldmatrix", "STSM": "stmatrix", "SHFL": "shfl", "BAR": "bar",
    "HMMA": "mma", "HGMMA": "wgmma", "MUFU": "ex2",
}  # fmt: skip
"""Machine instructions that stand for one PTX instruction each."""


@dataclass(frozen=True)
class MachineCounts:
    """Machine instructions that warps issued.

    Args:
        issued: of the executed blocks.
        by_line: the same for each source line.
        exact_share: part of `issued` on lines that the code holds once and whose PTX instructions
            all ran equally often.
        static: instructions in the code.
    """

    issued: float
    by_line: dict[str, float]
    exact_share: float
    static: int


def machine_counts(done: Execution) -> MachineCounts:
    """Count the machine instructions of an execution by source line."""
    static = machine_lines(done.cubin)
    runs: dict[str, list[int]] = defaultdict(list)
    kept: Counter[str] = Counter()
    for instruction, count in zip(done.program.instructions, done.counts.issued, strict=False):
        runs[instruction.source].append(int(count))
        kept[instruction.source] += instruction.opcode.startswith(tuple(KEPT.values()))
    entries = int(done.counts.issued[0])  # what no PTX instruction names runs once a warp
    means = {line: float(np.mean(runs.get(line, [entries]))) for line in static}
    copies = _copies(static, kept, means)
    by_line, exact = {}, 0.0
    for line, (count, _) in static.items():
        by_line[line] = count * means[line] / copies[line]
        is_exact = len(set(runs.get(line, [entries]))) == 1 and copies[line] == 1
        exact += by_line[line] if is_exact else 0.0
    issued = sum(by_line.values())
    total = sum(count for count, _ in static.values())
    return MachineCounts(issued, by_line, exact / issued if issued else 1.0, total)


def _copies(
    static: dict[str, tuple[int, int]], kept: Counter[str], means: dict[str, float]
) -> dict[str, float]:
    """Count copies of each line in the machine code: lines that ran equally often share a loop."""
    loops: dict[float, list[str]] = defaultdict(list)
    for line, mean in means.items():
        loops[mean].append(line)
    found = {}
    for lines in loops.values():
        in_ptx = sum(kept[line] for line in lines)
        in_machine = sum(static[line][1] for line in lines)
        ratio = in_machine / in_ptx if in_ptx and in_machine else 1.0
        found.update(dict.fromkeys(lines, ratio if ratio >= 1.5 else 1.0))
    return found


@functools.lru_cache(maxsize=256)
def machine_lines(cubin: bytes) -> dict[str, tuple[int, int]]:
    """Machine instructions of each source line, "file.py:12", and how many of them are `KEPT`."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-g", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines: dict[str, tuple[int, int]] = {}
    source = ""
    for row in text.splitlines():
        named = _FILE_LINE.search(row)
        if named:
            source = f"{named[1].rsplit('/', 1)[-1]}:{named[2]}"
            continue
        found = _INSTRUCTION.search(row)
        if found and found[1] not in PADDING:
            count, kept = lines.get(source, (0, 0))
            lines[source] = (count + 1, kept + (found[1].split(".")[0] in KEPT))
    return lines
