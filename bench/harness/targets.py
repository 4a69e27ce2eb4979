"""Targets of the kernels on a GPU, and of the torch path on a CPU.

Figures in microseconds are arithmetic on one H200 and are judged there only. Ratios to peers
are judged on every GPU, by medians of one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

MEASURED_ON = "H200"
CPU_MOST = 1.05
"""Most time on a CPU, over that of the best eager composition."""
CPU_PASSES = ("no-grad", "fwd+bwd", "step", "greedy")
"""Passes that a caller waits for; of their halves one may rightly do the work of the other."""
MILLION, PATCHES = 1 << 20, 174_763


@dataclass(frozen=True)
class Against:
    """Peer that must take `factor` times as long as ours.

    Args:
        factor: below 1 where the peer may be faster.
        entry: start of the names of its entries, of which the fastest counts; "": ours.
        sizes: sizes of its case that differ from ours.
        op: another op; then `sizes` is all that names its case.
    """

    factor: float
    entry: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    op: str = ""


@dataclass(frozen=True)
class Aim:
    """Target of one pass of one case.

    Args:
        op: its name.
        sizes: the case has these among its sizes.
        direction: the pass.
        us: microseconds on an H200.
        share: of the roofline measured in the same run.
        mib: peak of extra memory.
        against: the peers.
    """

    op: str
    sizes: Mapping[str, Any]
    direction: str
    us: float | None = None
    share: float | None = None
    mib: float | None = None
    against: Sequence[Against] = ()

    @property
    def name(self) -> str:
        sizes = (x if isinstance(x, str) else f"{key}{x}" for key, x in self.sizes.items())
        return f"{self.op} {'-'.join(sizes)} {self.direction}"


def _pooling() -> Iterator[Aim]:
    pooled = {"T": MILLION, "P": PATCHES, "boundaries": "even"}
    bags = Against(2, "EmbeddingBag"), Against(8, "embedding + segment_reduce")
    for width, forward_us, backward_us in ((768, 85, 160), (128, 18, 35)):
        case = pooled | {"D": width}
        yield Aim("byte_pool", case | {"text": "english"}, "fwd", forward_us, against=bags)
        for text, factor in (("english", 15), ("uniform", 5)):
            bag = [Against(factor, "EmbeddingBag")]
            yield Aim("byte_pool", case | {"text": text}, "bwd", backward_us, against=bag)
        uniform = [Against(1 / 1.2, sizes={"text": "uniform"})]
        yield Aim("byte_pool", case | {"text": "equal"}, "bwd", against=uniform)
        mean = case | {"mode": "mean"}
        yield Aim("segment_pool", mean, "fwd", share=0.8)
        yield Aim("segment_pool", mean, "bwd", share=0.8, against=[Against(1.8, "segment_reduce")])
        both = case | {"plus": "null+residual"}
        yield Aim("unpool", both, "fwd", share=0.8)
        yield Aim("unpool", both, "bwd", share=0.8, against=[Against(3, "index_select")])
        plain = [Against(1 / 1.2, op="unpool", sizes=both)]
        for direction in ("fwd", "bwd"):
            smoothed = case | {"plus": "residual"}
            yield Aim("ema_unpool", smoothed, direction, share=0.8, against=plain)
    for how in ("space", "patch_start_mask"):
        case = {"T": MILLION, "how": how, "text": "english"}
        yield Aim("find_patches", case, "no-grad", 15, against=[Against(10, "BLT")])


def _projection() -> Iterator[Aim]:
    def peers(compiled: float, eager: float, liger: float) -> list[Against]:
        named = ("compiled F.linear", compiled), ("F.linear + F.", eager), ("Liger", liger)
        return [Against(factor, name) for name, factor in named if factor]

    for rows, width, vocab, us, mib, against in (
        (65_536, 128, 256, 40, None, peers(1.8, 4, 4)),
        (98_304, 128, 258, 60, None, peers(1.8, 4, 4)),
        (65_536, 512, 256, 105, None, peers(1.2, 2, 2)),
        (12_288, 512, 50_257, 3_900, 512, peers(0.9, 0, 3)),
        (65_536, 768, 50_257, 28_000, 512, peers(0.9, 0, 1.4)),
    ):
        case = {"N": rows, "D": width, "V": vocab, "reduction": "mean"}
        yield Aim("linear_cross_entropy", case, "fwd+bwd", us, mib=mib, against=against)
    for vocab, us, key, value in ((256, 6, "k", 1), (50_257, 18, "t", 0.0)):
        case = {"N": 64, "D": 512, "V": vocab, key: value}
        yield Aim("linear_sample", case, "no-grad", us, against=[Against(1.5, "compiled")])


def _attention() -> Iterator[Aim]:
    folds = [Against(10, "varlen_attn"), Against(3, "batch fold"), Against(3, "compiled")]
    for width, us in ((16, 35), (32, 68)):
        case = {"T": 98_304, "P": 8192, "K": width, "causal": 0}
        yield Aim("patch_attention", case, "fwd", us, against=folds)
    for direction, us, factor in (("fwd", 24, 1.5), ("bwd", 50, 1.4)):
        case = {"B": 24, "T": 512, "H": 16, "KV": 4, "K": 32}
        yield Aim("attention", case, direction, us, against=[Against(factor, "SDPA cuDNN")])
    for window in (128, 256):
        peers = [Against(3, "FlexAttention and its mask"), Against(8, "SDPA, mask of all")]
        case = {"B": 8, "T": 8192, "H": 8, "K": 64, "W": window}
        for direction, us in (("fwd", 80), ("bwd", 180)):
            yield Aim("attention", case, direction, us, against=peers)
    for batch, length, us in ((1, 512, 6), (1, 2048, 6), (64, 2048, 39), (64, 8192, 156)):
        cache = {"B": batch, "C": length, "lens": "full"}
        yield Aim("decode_attention", cache, "no-grad", us, against=[Against(1.5, "SDPA")])


AIMS = (
    *_pooling(),
    *_projection(),
    *_attention(),
    Aim("model-step", {"preset": "10m"}, "step", against=[Against(1.5, "compiled baseline ops")]),
    Aim(
        "model-step", {"preset": "100m"}, "step", share=0.4,
        against=[Against(1.2, "compiled baseline ops")],
    ),
)  # fmt: skip


MET, MISSED, OPEN = " met", " MISSED", " not timed"


def lines(records: Sequence[Record], device: str, on_gpu: bool) -> Iterator[str]:
    """List which targets were met in this run; ops of which nothing was timed are left out.

    Args:
        records: entries of pytest-benchmark's JSON.
        device: the name of what they ran on.
        on_gpu: a GPU has the targets of the design, a CPU the best eager composition.
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
    for aim in AIMS:
        if aim.op in ops:
            ours = _ours(records, aim.op, aim.sizes, aim.direction)
            parts = [OPEN] if ours is None else _judged(aim, ours, records, device)
            yield f"  {aim.name}:{','.join(parts)}"


def _judged(aim: Aim, ours: Record, records: Sequence[Record], device: str) -> Iterator[str]:
    info, seconds = ours["extra_info"], ours["stats"]["median"]
    if aim.us is not None:
        said = f" {seconds * 1e6:.1f} us for {aim.us:g}"
        yield said + (_verdict(seconds * 1e6 <= aim.us) if MEASURED_ON in device else
                      f" on an {MEASURED_ON}")  # fmt: skip
    if aim.share is not None:
        share = info.get("roofline_share", 0.0)
        yield f" {share:.0%} of the roofline for {aim.share:.0%}{_verdict(share >= aim.share)}"
    if aim.mib is not None:
        mib = info["peak_bytes"] / 2**20
        yield f" {mib:.0f} MiB for {aim.mib:g}{_verdict(mib <= aim.mib)}"
    for against in aim.against:
        name = against.entry or against.op or "-".join(map(str, against.sizes.values()))
        peer = _peer(aim, against, records)
        if peer is None:
            yield f" {name}{OPEN}"
            continue
        ratio = peer["stats"]["median"] / seconds
        yield f" {ratio:.2f}x {name} for {against.factor:.2g}x{_verdict(ratio >= against.factor)}"


def _verdict(good: bool) -> str:
    return MET if good else MISSED


def _peer(aim: Aim, against: Against, records: Sequence[Record]) -> Record | None:
    op = against.op or aim.op
    sizes = dict(against.sizes) if against.op else dict(aim.sizes) | dict(against.sizes)
    if not against.entry:
        return _ours(records, op, sizes, aim.direction)
    found = [
        record
        for record in _of(records, op, sizes, aim.direction)
        if record["extra_info"]["entry"].startswith(against.entry)
        and not record["extra_info"]["ours"]
    ]
    return min(found, key=lambda x: x["stats"]["median"], default=None)


def _ours(
    records: Sequence[Record], op: str, sizes: Mapping[str, Any], direction: str
) -> Record | None:
    """Return the first of our entries: the default."""
    found = (x for x in _of(records, op, sizes, direction) if x["extra_info"]["ours"])
    return next(found, None)


def _of(
    records: Sequence[Record], op: str, sizes: Mapping[str, Any], direction: str
) -> Iterator[Record]:
    for record in records:
        info = record["extra_info"]
        if (info["op"], info["pass"]) == (op, direction) and sizes.items() <= info["sizes"].items():
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
