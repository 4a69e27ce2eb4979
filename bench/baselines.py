"""Train a pooled model and its two baselines for equal minutes.

The flat baseline reads the same bytes one by one, the word baseline words of the same text; what
makes the comparison fair stands in `stlm_models/presets.py`. The three train in one process by
turns of some seconds, so that whatever else the machine does slows them alike. Each is charged the
time of its own steps; making its data and evaluating it are free. Windows hold the same number of
bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from stlm_kernels import terminal
from stlm_models.config import ModelConfig
from stlm_models.data.corpus import Corpus, load_corpus
from stlm_models.data.words import WordVocabulary
from stlm_models.presets import preset
from stlm_models.training.precision import faster_precision
from stlm_models.training.process import prepare_process
from stlm_models.training.reporting import judge
from stlm_models.training.trainer import PRECISIONS, StepResult, Trainer, TrainOptions

from .harness import environment
from .harness.commandline import positive
from .harness.results import Record, Result, add_result_options, command_line, result_path

KINDS = ("", "-flat", "-word")
RATES = {"": (0.04, 0.008), "-flat": (0.04, 0.008), "-word": (0.04, 0.008)}
"""Peak learning rates (Muon's, AdamW's) of each kind: the best of these, half and a quarter of them
for each of the three demo models, in a minute each (2 windows a step, about 100 steps); try others
by `--rates`."""
TURN_SECONDS = 5.0


class Contender:
    """Model in training that takes turns with others.

    Args:
        name: what tables call it.
        trainer: with a budget of minutes.
    """

    def __init__(self, name: str, trainer: Trainer) -> None:
        self.name, self.trainer = name, trainer
        self.n_bytes = 0
        self.curve: list[dict[str, float]] = []
        """State at the end of each turn: step, seconds, bytes read; bits per byte of the turn."""

    def turn(self, seconds: float) -> None:
        """Train for so many seconds, one step at least, or to the end of the budget."""
        trainer = self.trainer
        ends = time.monotonic() + seconds
        results: list[StepResult] = []
        over = False

        def note(result: StepResult) -> None:
            nonlocal over
            results.append(result)
            over = time.monotonic() >= ends or trainer.progress >= 1
            if over and trainer.device.type == "cuda":
                torch.cuda.synchronize()  # what is still queued belongs to this turn

        trainer.run(note, lambda: over)
        self.n_bytes += sum(result.n_bytes for result in results)
        loss = float(torch.stack([result.loss for result in results]).mean())
        self.curve.append(
            {
                "step": trainer.step,
                "seconds": round(trainer.seconds, 3),
                "bytes": self.n_bytes,
                "bits_per_byte": round(loss / math.log(2), 4),
            }
        )


def compete(contenders: Sequence[Contender], turn_seconds: float) -> None:
    """Train in turns until the budget of each is used, with a line for each round."""
    while any(each.trainer.progress < 1 for each in contenders):
        for each in contenders:
            if each.trainer.progress < 1:
                each.turn(turn_seconds)
        print(progress_line(contenders), flush=True)


def progress_line(contenders: Iterable[Contender]) -> str:
    cells = [
        f"{each.name} {each.curve[-1]['bits_per_byte']:.3f} at {each.n_bytes / 1e6:.2f} MB"
        for each in contenders
    ]
    seconds = max(each.trainer.seconds for each in contenders)
    return f"{seconds:6.0f} s  bits per byte of training: {', '.join(cells)}"


def config_of(name: str, corpus: Corpus, window_bytes: int) -> ModelConfig:
    """Return the preset's config; windows of words hold `window_bytes` bytes on average."""
    config = preset(name)
    if config.tokens == "bytes":
        return config
    words = WordVocabulary.of(corpus.train, config.vocab_size)
    n_ids = sum(len(words.encode(document)) for document in corpus.train)
    ids_per_byte = n_ids / sum(map(len, corpus.train))
    return dataclasses.replace(config, context=max(2, round(window_bytes * ids_per_byte)))


def result_of(each: Contender) -> Record:
    """Return what the model reached, and its settings."""
    trainer = each.trainer
    return {
        "model": each.name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "context": trainer.config.context,
        "bytes_per_id": round(trainer.bytes_per_id, 4),
        "muon_lr": trainer.options.muon_lr,
        "adamw_lr": trainer.options.adamw_lr,
        "bytes_read": each.n_bytes,
        "bytes_per_second": round(each.n_bytes / trainer.seconds),
        **judge(trainer),
        "curve": each.curve,
    }


def table(rows: Sequence[Record]) -> Iterator[str]:
    """Lay out models trained for the same minutes, and what compression programs reach."""
    yield "held-out bits per byte, parameters, steps, bytes read, bytes/s"
    for x in rows:
        yield (
            f"{x['model']:<24} {x['bits_per_byte']:.4f} {x['parameters']:>12,} {x['step']:>7,}"
            f" {x['bytes_read']:>12,} {x['bytes_per_second']:>9,}"
        )
    yield ", ".join(f"{name} {bits:.4f}" for name, bits in rows[0]["compressors"].items())


def first_bytes(documents: Iterable[bytes], n_bytes: int) -> list[bytes]:
    """Return the first documents that together have so many bytes, the last one cut."""
    found = []
    for document in documents:
        found.append(document[:n_bytes])
        n_bytes -= len(found[-1])
    return [document for document in found if document]


def contenders_of(arguments: argparse.Namespace) -> tuple[Corpus, list[Contender]]:
    """Return the corpus and the untrained models.

    Raises:
        ValueError: for an unknown preset, an option out of range, or a corpus that is too small.
        OSError: where a file cannot be read.
    """
    corpus = load_corpus(arguments.data, text_key=arguments.text_key, raw=arguments.raw)
    if arguments.judge_bytes is not None:
        if arguments.judge_bytes < 1:
            raise ValueError(f"judge-bytes: expected at least 1, got {arguments.judge_bytes}")
        held_out = first_bytes(corpus.held_out, arguments.judge_bytes)
        corpus = dataclasses.replace(corpus, held_out=held_out)
    precision = arguments.precision or faster_precision().name
    contenders = []
    for kind in KINDS:
        name = arguments.preset + kind
        config = config_of(name, corpus, preset(arguments.preset).context)
        for muon_lr, adamw_lr in arguments.rates or [RATES[kind]]:
            options = TrainOptions(
                minutes=arguments.minutes,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
                precision=precision,
                muon_lr=muon_lr,
                adamw_lr=adamw_lr,
            )
            shown = f"{name}@{muon_lr:g}/{adamw_lr:g}" if arguments.rates else name
            contenders.append(Contender(shown, Trainer(config, corpus, options)))
    return corpus, contenders


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    prepare_process()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment.describe(device, parsed.commit)
    print(environment.header(about, None))
    try:
        corpus, contenders = contenders_of(parsed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    path = result_path(parsed.json, f"baselines-{parsed.preset}", parser)
    described = [corpus.name, *corpus.describe()]
    print("corpus:", *described, sep="\n", flush=True)
    compete(contenders, parsed.turn)
    rows = [result_of(each) for each in contenders]
    print(*table(rows), sep="\n")
    settings = {
        "load_after": os.getloadavg()[0],
        "precision": contenders[0].trainer.options.precision,
        "corpus": described,
    }
    command = command_line("bench.baselines", arguments)
    Result(command, about, rows, [*described, *table(rows)], settings).write(path)
    print(path)


def _rates(text: str) -> tuple[float, float]:
    try:
        muon_lr, adamw_lr = map(float, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected MUON/ADAMW, got {text!r}") from None
    return muon_lr, adamw_lr


def _parser() -> argparse.ArgumentParser:
    parser = terminal.argument_parser("bench.baselines", __doc__)
    add = parser.add_argument
    add("preset", nargs="?", default="demo", help="the pooled model (default: demo)")
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="of training, for each of the three (default: 10)",
    )
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="PATH",
        help="files, folders or globs (default: the stdlib)",
    )
    add("--text-key", metavar="KEY", help="field of each line of .jsonl files that is a document")
    add("--raw", action="store_true", help="take the bytes of every file as they are")
    add("--batch-size", type=positive, default=8, help="windows in a step (default: 8)")
    add("--seed", type=int, default=0, help="of weights and windows (default: 0)")
    add("--precision", choices=sorted(PRECISIONS), help="default: bf16 where the device has it")
    add(
        "--rates",
        nargs="+",
        type=_rates,
        metavar="MUON/ADAMW",
        help="train each model at each of these rates",
    )
    add("--threads", type=positive, help="threads of torch (default: its own choice)")
    add("--turn", type=float, default=TURN_SECONDS, help="seconds of a turn (default: 5)")
    add("--judge-bytes", type=int, help="evaluate on so many held-out bytes (default: all)")
    add_result_options(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
