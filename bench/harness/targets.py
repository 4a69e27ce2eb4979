"""Targets: bounds that kernels should come down to, what they mean as times, and ratios to peers.

Bounds are counted everywhere (`bench.bounds`), and the committed table says what they are today.
Microseconds are judged on an H200 only, ratios to peers on every GPU, by medians of one run. On a
CPU the torch path is held to the best eager composition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stlm_kernels.registry import OPS

from . import counting
from .counting import Key

Record = dict[str, Any]

MEASURED_ON = "H200"
LIKELY = 0.7
"""Share of its bound's rate that a kernel of 16 warps or more on each SM is likely to reach."""
CPU_MOST = 1.05
"""Most time on a CPU, over that of the best eager composition."""
CPU_PASSES = ("no-grad", "fwd+bwd", "step", "greedy")
"""Passes that a caller waits for; of their halves one may rightly do the work of the other."""


@dataclass(frozen=True)
class Target:
    """One pass ("fwd", "bwd" or "both") of one case, and the bound in microseconds on an H200 that
    it should come down to (None: it is near its floor, and shall stay where it is)."""

    op: str
    case: str
    direction: str
    reach: float | None = None

    @property
    def timed_pass(self) -> str:
        """The pass of a benchmark that does this work and no other."""
        if self.direction == "both":
            return "fwd+bwd"
        return self.direction if OPS[self.op].grad_args else "no-grad"


def _of(op: str, case: str, **reach: float | None) -> Iterator[Target]:
    for direction, us in reach.items():
        yield Target(op, case, direction, us)


BYTES = "T1048576"
EVEN, WORDS = f"{BYTES}-P174763", f"{BYTES}-P120646"
NGRAMS = "D128-tables((3, 50000), (4, 50000), (5, 50000), (6, 50000), (7, 50000), (8, 50000))"
TARGETS = (
    *_of("byte_pool", f"{WORDS}-V256-D768-mean-words-english", fwd=110, bwd=90),
    *_of("byte_pool", f"{EVEN}-V256-D768-mean-even-english", fwd=100, bwd=90),
    *_of("byte_pool", f"{EVEN}-V256-D768-mean-even-uniform", fwd=100, bwd=125),
    *_of("byte_pool", f"{EVEN}-V256-D768-mean-even-equal", fwd=100, bwd=125),
    *_of("byte_pool", f"{WORDS}-V256-D128-mean-words-english", fwd=21, bwd=15),
    *_of("byte_pool", f"{WORDS}-V257-D128-mean-words-english-int16", fwd=21, bwd=15),
    *_of("byte_pool", f"{EVEN}-V256-D128-mean-even-english", fwd=19, bwd=15),
    *_of("byte_pool", f"{EVEN}-V256-D128-mean-even-uniform", fwd=19, bwd=20),
    *_of("byte_pool", f"{EVEN}-V256-D128-mean-even-equal", fwd=19, bwd=20),
    *_of("segment_pool", f"{WORDS}-D768-mean-words", fwd=None, bwd=250),
    *_of("segment_pool", f"{EVEN}-D768-mean-even", fwd=None, bwd=250),
    *_of("segment_pool", f"{EVEN}-D128-mean-even", fwd=None, bwd=60),
    *_of("attention_pool", f"{WORDS}-H8-KV8-K16-shared-words", fwd=None, bwd=None),
    *_of("attention_pool", f"{EVEN}-H8-KV8-K16-shared-ragged", fwd=None, bwd=None),
    *_of("ngram_embedding", f"{BYTES}-{NGRAMS}-S128-even-english", fwd=None, bwd=None),
    *_of("ngram_embedding", f"{BYTES}-{NGRAMS}-S128-even-equal", fwd=None, bwd=None),
    *_of("find_patches", f"{BYTES}-space-max16-S128-C524288-english", fwd=10),
    *_of("find_patches", f"{BYTES}-space-max16-S128-C524288-equal", fwd=10),
    *_of("unpool", f"{WORDS}-D768-S128-words-null+residual", fwd=None, bwd=None),
    *_of("unpool", f"{EVEN}-D768-S128-even-null+residual", fwd=None, bwd=None),
    *_of("unpool", f"{EVEN}-D128-S128-even-null+residual", fwd=None, bwd=None),
    *_of("ema_unpool", f"{WORDS}-D768-S128-words-router-residual", fwd=950, bwd=None),
    *_of("ema_unpool", f"{EVEN}-D768-S128-even-router-residual", fwd=950, bwd=None),
    *_of("ema_unpool", f"{EVEN}-D128-S128-even-router-residual", fwd=160, bwd=None),
    *_of("linear_cross_entropy", "N65536-D128-V256-mean", both=22),
    *_of("linear_cross_entropy", "N98304-D128-V258-mean", both=36),
    *_of("linear_cross_entropy", "N65536-D512-V256-mean", both=100),
    *_of("linear_cross_entropy", "N12288-D512-V50257-mean", both=3300),
    *_of("linear_sample", "N64-D512-V256-k1-p0.9-tensor", fwd=None),
    *_of("attention", "B24-T512-H16-KV4-K32", fwd=21, bwd=40),
    *_of("attention", "B8-T8192-H8-KV8-K64-W256", fwd=98, bwd=235),
    *_of("patch_attention", "T98304-P8192-H8-KV8-K16-even-causal0", fwd=22, bwd=48),
    *_of("patch_attention", "T98304-P8192-H8-KV8-K32-even-causal0", fwd=None, bwd=None),
    *_of("patch_attention", "T262144-P30161-H8-KV8-K32-words", fwd=None, bwd=None),
    *_of("qk_norm_rope", "B24-T512-H16-KV4-K32-qk", fwd=None, bwd=None),
    *_of("qk_norm_rope", "T65536-H12-KV4-K64-qk-packed", fwd=None, bwd=None),
    *_of("qkv_rope", "T65536-D256-H4-KV4-K64-qk-packed", fwd=None, bwd=None),
    *_of("qkv_rope", "T65536-D128-H4-KV4-K32-qk-packed", fwd=None, bwd=None),
    *_of("swiglu", "T65536-D256-F768-none", fwd=None, bwd=None),
    *_of("swiglu", "T65536-D128-F340-weight", fwd=None, bwd=None),
    *_of("decode_attention", "B64-C2048-H16-KV4-K64-full", fwd=None),
    *_of("decode_attention", "B64-C8192-H16-KV4-K64-ragged", fwd=None),
)
"""Shapes and aims as the project set them, from counts of its first kernels."""

QUICK = {
    f"{WORDS}-V256-D128-mean-words-english",
    f"{EVEN}-D128-mean-even",
    f"{WORDS}-H8-KV8-K16-shared-words",
    f"{BYTES}-space-max16-S128-C524288-english",
    f"{EVEN}-D128-S128-even-null+residual",
    f"{EVEN}-D128-S128-even-router-residual",
    "N65536-D128-V256-mean",
    "N64-D512-V256-k1-p0.9-tensor",
    "B24-T512-H16-KV4-K32",
    "T262144-P30161-H8-KV8-K32-words",
    "B24-T512-H16-KV4-K32-qk",
    "T65536-D128-H4-KV4-K32-qk-packed",
    "T65536-D128-F340-weight",
    "B64-C2048-H16-KV4-K64-full",
}
"""Cases that are counted in seconds: `make bench` and `make test` take these, `--full` all."""


@dataclass(frozen=True)
class Ratio:
    """Peer that must take `factor` times as long as ours, in one pass of a benchmark.

    Args:
        op: its name.
        case: the case's.
        direction: the pass.
        factor: below 1 where the peer may be faster.
        entry: start of the names of the peer's entries, of which the fastest counts.
    """

    op: str
    case: str
    direction: str
    factor: float
    entry: str


def _peers(op: str, case: str, direction: str, factors: Mapping[str, float]) -> Iterator[Ratio]:
    for entry, factor in factors.items():
        yield Ratio(op, case, direction, factor, entry)


LOSS = "linear_cross_entropy"
BAGS = {"EmbeddingBag": 2, "embedding + segment_reduce": 8}
LOSSES = {"compiled F.linear": 1.8, "F.linear + F.": 4, "Liger": 4}
WIDE_LOSSES = {"compiled F.linear": 1.2, "F.linear + F.": 2, "Liger": 2}
FOLDS = {"varlen_attn": 10, "batch fold": 3, "compiled": 3}
WINDOWS = {"FlexAttention and its mask": 3, "SDPA, mask of all": 8}
RATIOS = (
    *(
        ratio
        for width in ("D768", "D128")
        for ratio in (
            *_peers("byte_pool", f"{EVEN}-V256-{width}-mean-even-english", "fwd", BAGS),
            *_peers(
                "byte_pool", f"{EVEN}-V256-{width}-mean-even-english", "bwd", {"EmbeddingBag": 15}
            ),
            *_peers(
                "byte_pool", f"{EVEN}-V256-{width}-mean-even-uniform", "bwd", {"EmbeddingBag": 5}
            ),
            *_peers("segment_pool", f"{EVEN}-{width}-mean-even", "bwd", {"segment_reduce": 1.8}),
            *_peers(
                "unpool", f"{EVEN}-{width}-S128-even-null+residual", "bwd", {"index_select": 3}
            ),
        )
    ),
    *_peers("byte_pool", f"{WORDS}-V256-D768-mean-words-english", "fwd", BAGS),
    *_peers("byte_pool", f"{WORDS}-V256-D768-mean-words-english", "bwd", {"EmbeddingBag": 15}),
    *_peers("segment_pool", f"{WORDS}-D768-mean-words", "bwd", {"segment_reduce": 1.8}),
    *_peers("unpool", f"{WORDS}-D768-S128-words-null+residual", "bwd", {"index_select": 3}),
    *_peers("find_patches", f"{BYTES}-space-max16-S128-C524288-english", "no-grad", {"BLT": 10}),
    *_peers(LOSS, "N65536-D128-V256-mean", "fwd+bwd", LOSSES),
    *_peers(LOSS, "N98304-D128-V258-mean", "fwd+bwd", LOSSES),
    *_peers(LOSS, "N65536-D512-V256-mean", "fwd+bwd", WIDE_LOSSES),
    *_peers(LOSS, "N12288-D512-V50257-mean", "fwd+bwd", {"compiled F.linear": 0.9, "Liger": 3}),
    *_peers(LOSS, "N65536-D768-V50257-mean", "fwd+bwd", {"compiled F.linear": 0.9, "Liger": 1.4}),
    *_peers("linear_sample", "N64-D512-V256-k1-p0.9-tensor", "no-grad", {"compiled": 1.5}),
    *_peers("linear_sample", "N64-D512-V50257-t0.0-tensor", "no-grad", {"compiled": 1.5}),
    *(
        ratio
        for width in ("K16", "K32")
        for ratio in _peers(
            "patch_attention", f"T98304-P8192-H8-KV8-{width}-even-causal0", "fwd", FOLDS
        )
    ),
    *_peers("attention", "B24-T512-H16-KV4-K32", "fwd", {"SDPA cuDNN": 1.5}),
    *_peers("attention", "B24-T512-H16-KV4-K32", "bwd", {"SDPA cuDNN": 1.4}),
    *(
        ratio
        for window in ("W128", "W256")
        for direction in ("fwd", "bwd")
        for ratio in _peers("attention", f"B8-T8192-H8-KV8-K64-{window}", direction, WINDOWS)
    ),
    *(
        ratio
        for cache in (
            "B1-C512-H16-KV4-K32",
            "B1-C2048-H16-KV4-K64",
            "B64-C2048-H16-KV4-K64",
            "B64-C8192-H16-KV4-K64",
        )
        for ratio in _peers("decode_attention", f"{cache}-full", "no-grad", {"SDPA": 1.5})
    ),
    *_peers("model-step", "10m", "step", {"compiled baseline ops": 1.5}),
    *_peers("model-step", "100m", "step", {"compiled baseline ops": 1.2}),
)

MOST_MIB = {(LOSS, "N12288-D512-V50257-mean"): 512, (LOSS, "N65536-D768-V50257-mean"): 512}
"""Peak of extra memory, whatever the number of rows."""
LEAST_SHARE = {("model-step", "100m", "step"): 0.4}
"""Part of the roofline measured in the same run."""


MET, MISSED, OPEN = " met", " MISSED", " not timed"


def lines(records: Sequence[Record], device: str, on_gpu: bool) -> Iterator[str]:
    """List which targets were met in this run; ops of which nothing was timed are left out.

    Args:
        records: entries of pytest-benchmark's JSON.
        device: the name of what they ran on.
        on_gpu: a GPU has times and ratios to meet, a CPU the best eager composition.
    """
    text = list(_gpu_lines(records, device) if on_gpu else _cpu_lines(records))
    if text:
        counts = {word: sum(x.count(word) for x in text) for word in (MET, MISSED, OPEN)}
        yield "targets:" + ",".join(f" {n}{word}" for word, n in counts.items())
        if not on_gpu:
            yield f"  {CPU_MOST}x the best eager peer; `python -m bench.check` judges in turns"
        yield from text


def _gpu_lines(records: Sequence[Record], device: str) -> Iterator[str]:
    ops = {record["extra_info"]["op"] for record in records}
    committed = counting.read(counting.COMMITTED)
    for target in TARGETS:
        if target.op in ops:
            ours = _ours(records, target.op, target.case, target.timed_pass)
            said = OPEN if ours is None else _time(target, ours, committed, MEASURED_ON in device)
            yield f"  {target.op} {target.case} {target.timed_pass}:{said}"
    for ratio in RATIOS:
        if ratio.op in ops:
            yield f"  {ratio.op} {ratio.case} {ratio.direction}:{_against(ratio, records)}"
    for (op, case), most in MOST_MIB.items():
        found = _ours(records, op, case, "fwd+bwd")
        if op in ops and found is not None:
            mib = found["extra_info"]["peak_bytes"] / 2**20
            yield f"  {op} {case}: {mib:.0f} MiB for {most}{_verdict(mib <= most)}"
    for (op, case, direction), least in LEAST_SHARE.items():
        found = _ours(records, op, case, direction)
        if op in ops and found is not None:
            share = found["extra_info"].get("roofline_share", 0.0)
            verdict = _verdict(share >= least)
            yield f"  {op} {case} {direction}: {share:.0%} of the roofline for {least:.0%}{verdict}"


def _time(target: Target, ours: Record, committed: Mapping[Key, Record], judged: bool) -> str:
    """A time beside the bound of the committed table, and the target's bound as a time."""
    us = ours["stats"]["median"] * 1e6
    bound = committed[target.op, target.case, target.direction, "stlm"]["bound"]
    most = (bound if target.reach is None else target.reach) / LIKELY
    said = f" {us:.1f} us for {most:.1f}, {us / bound:.2f}x the bound"
    return said + (_verdict(us <= most) if judged else f" of an {MEASURED_ON}")


def _against(ratio: Ratio, records: Sequence[Record]) -> str:
    ours = _ours(records, ratio.op, ratio.case, ratio.direction)
    peers = [
        record["stats"]["median"]
        for record in _of_case(records, ratio.op, ratio.case, ratio.direction)
        if record["extra_info"]["entry"].startswith(ratio.entry)
        and not record["extra_info"]["ours"]
    ]
    if ours is None or not peers:
        return f" {ratio.entry}{OPEN}"
    times = min(peers) / ours["stats"]["median"]
    return f" {times:.2f}x {ratio.entry} for {ratio.factor:g}x{_verdict(times >= ratio.factor)}"


def _verdict(good: bool) -> str:
    return MET if good else MISSED


def _ours(records: Sequence[Record], op: str, case: str, direction: str) -> Record | None:
    """Return the first of our entries: the default."""
    found = (x for x in _of_case(records, op, case, direction) if x["extra_info"]["ours"])
    return next(found, None)


def _of_case(records: Sequence[Record], op: str, case: str, direction: str) -> Iterator[Record]:
    """Yield the entries of a case; sizes of the machine may follow the name of a model's."""
    for record in records:
        info = record["extra_info"]
        same = info["case"] == case or (op not in OPS and info["case"].startswith(f"{case}-"))
        if same and (info["op"], info["pass"]) == (op, direction):
            yield record


def _cpu_lines(records: Sequence[Record]) -> Iterator[str]:
    """Compare the passes that a caller waits for with the fastest eager peer."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        info = record["extra_info"]
        if info["pass"] in CPU_PASSES and not info["compiled"]:
            groups.setdefault((info["op"], info["case"], info["pass"]), []).append(record)
    for names, found in groups.items():
        ours = next((x for x in found if x["extra_info"]["ours"]), None)
        peers = (x for x in found if not x["extra_info"]["ours"])
        best = min(peers, key=lambda x: x["stats"]["median"], default=None)
        if ours is not None and best is not None:
            ratio = ours["stats"]["median"] / best["stats"]["median"]
            verdict = MET if ratio <= CPU_MOST else MISSED
            yield f"  {ratio:5.2f}x{verdict:<7}  {' '.join(names)}, {best['extra_info']['entry']}"
