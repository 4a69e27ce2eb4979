"""Count the launches of a training step and of a decoded byte; no GPU is needed.

A step is that of `stlm_models.train` in bf16: forward, backward, both optimisers. A decoded byte is
that of `generate` for a batch: sampling, the byte's layers, and where its patch closes the core's;
such a byte costs more, and both are shown. How launches are counted: `bench/harness/launches.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from stlm_kernels import Patches, terminal
from stlm_models import STLM, ModelConfig
from stlm_models.data.corpus import Corpus
from stlm_models.data.loader import Batch
from stlm_models.generation.engine import CachedRun
from stlm_models.generation.sampling import _checked_ids, _Sampling
from stlm_models.presets import preset
from stlm_models.training.trainer import Trainer, TrainOptions

from .harness import environment
from .harness.launches import Launches, counting
from .harness.results import Result, add_result_options, command_line, result_path

AIMS = {"step": 400, "byte": 60}
"""Launches to reach for the 10m preset: of a step, and of a byte that closes no patch."""
PATCH_LEN = 6
ROWS = 4
"""Windows of a step, and texts that are written at once."""


def batch_of(config: ModelConfig, rows: int) -> Batch:
    """Return a batch of windows, of which only shapes count."""
    total = rows * config.context
    ids, targets = (torch.empty(total, dtype=x) for x in (torch.int16, torch.int64))
    boundaries = torch.empty(rows + 1, dtype=torch.int32)
    followers = None
    sizes = len(config.match_sizes) + len(config.memory_sizes)
    if sizes:
        followers = torch.empty(total, sizes, dtype=torch.int64)
    if config.patch_rule == "none":
        return Batch(ids, targets, boundaries, None, followers)
    cu_patchlens = torch.empty(total // PATCH_LEN + 1, dtype=torch.int32)
    each = torch.empty(total, dtype=torch.int32)
    count = torch.empty((), dtype=torch.int32)
    patches = Patches(cu_patchlens, each, each, count, boundaries.clone())
    return Batch(ids, targets, boundaries, patches, followers)


def training_step(config: ModelConfig) -> Launches:
    """Count a step of training; optimisers have states already, as in every step but the first."""
    text = b"bytes " * (config.context + 9)
    with counting() as launches:
        options = TrainOptions(steps=9, batch_size=ROWS, precision="bf16")
        trainer = Trainer(config, Corpus("a text", [text], [text]), options)
        batch = batch_of(config, ROWS)
        trainer.loader.batch = lambda index: batch  # type: ignore[method-assign]
        trainer.train_step()
        launches.by_name.clear()
        trainer.train_step()
    return launches


def decoded_byte(config: ModelConfig, *, closes: bool) -> Launches:
    """Count a byte of every text; `closes`: of whether it closes its patch, in all of them."""
    with counting(number=1, chosen=ROWS if closes else 0) as launches, torch.no_grad():
        model = STLM(config).eval()
        run = CachedRun(model, [[97] * 2 * PATCH_LEN for _ in range(ROWS)])
        settings = _Sampling(1.0, None, None, 0)
        for _ in range(2):  # caches grow in the first
            launches.by_name.clear()
            ids = model.embedding.sample(run.hidden, **settings.at_step(0, 0))
            _checked_ids(model, run, [], ids)
            run.step(ids, range(ROWS))
    return launches


def byte_layer(config: ModelConfig) -> Counter[str]:
    """Count what one more layer of the decoder adds to a step, forward and backward."""
    more = replace(config, decoder_layers=config.decoder_layers + 1)
    return training_step(more).by_name - training_step(config).by_name


def row(name: str, what: str, launches: Counter[str]) -> dict[str, Any]:
    """Return what was counted, with the launches of each kind, most first."""
    kinds = dict(launches.most_common())
    return {"preset": name, "what": what, "launches": launches.total(), "kinds": kinds}


def counted(name: str) -> list[dict[str, Any]]:
    """Count a step of a preset, and where it writes bytes a decoded one of either kind."""
    config = preset(name)
    found = [
        row(name, "step", training_step(config).by_name),
        row(name, "layer of bytes", byte_layer(config)),
    ]
    if config.tokens == "bytes":
        found.append(row(name, "byte", decoded_byte(config, closes=False).by_name))
        if config.patch_rule != "none":
            closing = decoded_byte(config, closes=True).by_name
            found.append(row(name, "byte that closes a patch", closing))
    return found


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.launches", __doc__)
    parser.add_argument(
        "presets", nargs="*", default=["10m"], metavar="preset", help="(default: 10m)"
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "launches", parser)
    about = environment.describe(torch.device("cpu"), options.commit)
    try:
        rows = [row for name in options.presets for row in counted(name)]
    except ValueError as error:
        parser.error(str(error))
    summary = [
        f"{x['preset']:<12} {x['what']:<26} {x['launches']:5d} launches: "
        + ", ".join(f"{count} {kind}" for kind, count in list(x["kinds"].items())[:6])
        for x in rows
    ]
    print(*summary, sep="\n")
    command = command_line("bench.launches", arguments)
    Result(command, about, rows, summary, {"aims": AIMS, "rows": ROWS}).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
