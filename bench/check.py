"""Compare our torch path with the best eager composition on this CPU.

All take turns, so that a drifting machine slows them alike, and freed memory is kept, so that no
page is mapped anew. A median above 1.05 times the best peer's is a miss: printed and recorded.
Above 1.25 in each of three repeats fails the command. Only the passes that a caller waits for can
fail: "no-grad", which is evaluation, and "fwd+bwd". The two halves of the latter are shown, since
an op may rightly do the work of one in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from stlm_kernels import terminal
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec
from stlm_models.training.process import keep_freed_memory

from .harness import environment
from .harness.commandline import positive
from .harness.jobs import CaseData, Job, Task, entries_of, passes_of, task_of
from .harness.results import Result, add_result_options, command_line, result_path
from .harness.timing import interleaved_medians

MISS, FAILURE, REPEATS = 1.05, 1.25, 3
JUDGED = ("no-grad", "fwd+bwd")
VERDICTS = ("met", "missed", "FAILED", "shown")
HEAD = f"ours, then the best eager peer; the aim is at most {MISS}x, {FAILURE}x fails"
Medians = Callable[[Sequence[Task], int], list[float]]


@dataclass(frozen=True)
class Comparison:
    """Times of our torch path and of the fastest eager peer in one pass of one case."""

    op: str
    case: str
    direction: str
    peer: str
    ours_s: float
    peer_s: float
    ratios: list[float]

    @property
    def verdict(self) -> str:
        if self.direction not in JUDGED:
            return "shown"
        if len(self.ratios) == REPEATS and min(self.ratios) > FAILURE:
            return "FAILED"
        return "missed" if self.ratios[-1] > MISS else "met"


def compare(
    spec: OpSpec, case: Case, direction: str, data: CaseData, medians: Medians, rounds: int
) -> Comparison | None:
    """Find the fastest peer, then time both in turns; None where no eager peer exists.

    A ratio that would fail is measured again, up to three times: other work on the machine must
    not fail it.
    """
    entries = [
        entry
        for entry in entries_of(spec, ["torch"])
        if not entry.compiled and entry.unsupported(case) is None
    ]
    if len(entries) < 2:
        return None
    tasks = []
    for entry in entries:
        data.errors_of(entry, entry.function)
        tasks.append(task_of(Job(spec, case, direction, entry), [data.first], entry.function))
    first_look = medians(tasks, 5)
    best = 1 + min(range(len(tasks) - 1), key=lambda k: first_look[k + 1])
    ratios: list[float] = []
    repeats = REPEATS if direction in JUDGED else 1
    while len(ratios) < repeats and (not ratios or ratios[-1] > FAILURE):
        count = max(5, min(rounds, int(1.0 / max(first_look[0] + first_look[best], 1e-6))))
        ours, peer = medians([tasks[0], tasks[best]], count)
        ratios.append(ours / peer)
    return Comparison(spec.name, case.name, direction, entries[best].name, ours, peer, ratios)


def comparisons(
    specs: Iterable[OpSpec], rounds: int, medians: Medians = interleaved_medians
) -> Iterable[Comparison]:
    for spec in specs:
        for case in spec.tagged("bench_cpu"):
            data = CaseData(spec, case, torch.float32, torch.device("cpu"))
            for direction in passes_of(spec):
                found = compare(spec, case, direction, data, medians, rounds)
                if found is not None:
                    yield found


def line(found: Comparison) -> str:
    return (
        f"{found.verdict:>6}  {found.ratios[-1]:5.2f}x  {found.ours_s * 1e6:9.0f} us  "
        f"{found.peer_s * 1e6:9.0f} us {found.peer:<28} {found.op} {found.case} {found.direction}"
    )


@terminal.command(on_closed_pipe=1)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("bench.check", __doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to check (default: all)")
    parser.add_argument(
        "--rounds", type=positive, default=41, help="most rounds of one comparison (default: 41)"
    )
    parser.add_argument(
        "--threads", type=positive, help="threads of torch (default: its own choice)"
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - OPS.keys())
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)} (there are {', '.join(OPS)})")
    path = result_path(options.json, "check", parser)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    about = environment.describe(torch.device("cpu"), options.commit)
    print(environment.header(about, None))
    print(HEAD)
    found = []
    for each in comparisons([OPS[name] for name in options.ops or OPS], options.rounds):
        print(line(each), flush=True)
        found.append(each)
    rows = [asdict(each) | {"verdict": each.verdict} for each in found]
    summary = [HEAD, *map(line, found)]
    Result(command_line("bench.check", arguments), about, rows, summary).write(path)
    counts = {verdict: sum(x.verdict == verdict for x in found) for verdict in VERDICTS}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; {path}")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
