"""Train a preset with changes and judge it by validation text: one line of docs/speedrun.md.

The validation text is taken from the training split, so that no choice is made by the held-out
bytes. With --steps a trial is the same on a busy machine; with --minutes speed counts too.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stlm_kernels import terminal
from stlm_models.config import ModelConfig, config_from_dict
from stlm_models.data.corpus import Corpus, load_corpus
from stlm_models.evaluation import bits_per_byte
from stlm_models.presets import RATES, preset
from stlm_models.training.precision import faster_precision
from stlm_models.training.process import prepare_process
from stlm_models.training.trainer import Trainer, TrainOptions

from .harness import environment
from .harness.commandline import positive
from .harness.results import Record, Result, add_result_options, command_line, result_path

VALIDATION_BYTES = 200_000
LONGEST_DOCUMENT = 60_000
"""Bytes of a document of the validation text at most: a few long ones would be all of it."""
SEED = 0


def with_validation(corpus: Corpus, n_bytes: int) -> Corpus:
    """Return the training split in two: `held_out` are documents drawn from it, at least n_bytes.

    Raises:
        ValueError: where too few documents are short enough.
    """
    chosen: list[int] = []
    left = n_bytes
    for index in np.random.default_rng(SEED).permutation(len(corpus.train)).tolist():
        size = len(corpus.train[index])
        if left > 0 and size < LONGEST_DOCUMENT:
            chosen.append(index)
            left -= size
    if left > 0:
        raise ValueError(
            f"data: expected {n_bytes} bytes in training documents below {LONGEST_DOCUMENT} bytes,"
            f" got {n_bytes - left}"
        )
    drawn = set(chosen)
    return dataclasses.replace(
        corpus,
        train=[document for i, document in enumerate(corpus.train) if i not in drawn],
        held_out=[bytes(corpus.train[i]) for i in chosen],
    )


def config_with(name: str, changes: Sequence[str]) -> ModelConfig:
    """Return the preset with changes such as "match_sizes=(3, 6)".

    Raises:
        ValueError: for an unknown preset or field, or a value that is none.
    """
    values = preset(name).to_dict()
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"set: expected FIELD=VALUE, got {change!r}")
        try:
            values[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[field] = text
    return config_from_dict(values)


def run(config: ModelConfig, corpus: Corpus, options: TrainOptions) -> Record:
    """Train to the end of the budget; return what was read and reached."""
    trainer = Trainer(config, corpus, options)
    n_bytes = 0

    def count(result: Any) -> None:
        nonlocal n_bytes
        n_bytes += result.n_bytes

    trainer.run(count)
    with trainer.autocast():
        bits = bits_per_byte(trainer.model, corpus.held_out)
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "minutes": round(trainer.seconds / 60, 2),
        "steps": trainer.step,
        "bytes_read": n_bytes,
        "validation_bytes": sum(map(len, corpus.held_out)),
        "bits_per_byte": round(bits, 4),
    }


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    prepare_process()
    about = environment.describe(torch.device("cpu"), parsed.commit)
    try:
        config = config_with(parsed.preset, parsed.set)
        options = TrainOptions(
            minutes=None if parsed.steps else parsed.minutes,
            steps=parsed.steps,
            precision=parsed.precision or faster_precision().name,
            **{**RATES.get(parsed.preset, {}), **json.loads(parsed.options)},
        )
        corpus = with_validation(load_corpus(parsed.data), VALIDATION_BYTES)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    path = result_path(parsed.json, f"trial-{parsed.preset}", parser)
    print(environment.header(about, None), flush=True)
    record = run(config, corpus, options)
    others = [] if parsed.options == "{}" else [parsed.options]
    changes = " ".join([parsed.preset, *parsed.set, *others])
    line = (
        f"| {changes} | {record['minutes']} | {record['bytes_read']:,} |"
        f" {record['bits_per_byte']:.4f} | {about['commit']} |"
    )
    print(line)
    settings = {"config": config.to_dict(), "options": dataclasses.asdict(options)}
    Result(command_line("bench.trial", arguments), about, [record], [line], settings).write(path)
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = terminal.argument_parser("bench.trial", __doc__)
    parser.add_argument("preset", nargs="?", default="demo", help="(default: demo)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of ModelConfig"
    )
    parser.add_argument(
        "--options", default="{}", help="""of training, as JSON: '{"adamw_lr": 0.008}'"""
    )
    parser.add_argument("--minutes", type=float, default=10, help="(default: 10)")
    parser.add_argument("--steps", type=positive, help="in place of minutes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the faster here")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--data", nargs="+", help="default: Python's standard library")
    add_result_options(parser)
    return parser


if __name__ == "__main__":
    main()
