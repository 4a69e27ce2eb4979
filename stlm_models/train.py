"""`python -m stlm_models.train --preset demo --minutes 10 --out runs/x`: train on real bytes.

Without --data the corpus is the interpreter's own standard library. The run folder gets
checkpoints, metrics.jsonl, loss.png and result.json; Ctrl-C saves, --resume goes on.
`torchrun --nproc-per-node N -m stlm_models.train ...` trains in N processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stlm_kernels.terminal import INTERRUPTED, argument_parser, command, note, print_result

from .checkpoint import latest_checkpoint, load_checkpoint, require_extra
from .data.corpus import Corpus, load_corpus
from .files import replace_file
from .parallel import Ranks
from .presets import RATES, preset
from .training.interrupt import Interrupt
from .training.optim import SCHEDULES
from .training.precision import Precision, faster_precision
from .training.process import prepare_process
from .training.progress import (
    draw_loss_curve,
)
from .training.reporting import FINAL_SAMPLE_BYTES, Reporter, judge, run_reported, sample
from .training.trainer import Trainer, TrainOptions

EXTRA = ("safetensors", "tqdm", "matplotlib")
DEFAULT_MINUTES = 10.0
BUDGETS = {"minutes", "steps"}


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; 1 and one line on stderr for bad input."""
    parsed = _parser().parse_args(arguments)
    ranks = Ranks.join()
    try:
        require_extra(EXTRA)
        trainer, run = _prepare(parsed, ranks)
        if ranks.is_first:
            run.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError, OSError) as error:
        return _fail(error)
    said = prepare_process()
    if said and ranks.is_first:
        note(said)
    try:
        return _train(trainer, run, parsed) if ranks.is_first else _follow(trainer)
    except (OSError, FloatingPointError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        note("stopped; what was saved stays")
        return INTERRUPTED
    finally:
        ranks.leave()


def _fail(error: Exception) -> int:
    note(f"error: {error}")
    return 1


def _prepare(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Trainer, Path]:
    """Everything that can be wrong with the input is found here, before a file is written."""
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {arguments.threads}")
    for name in ("sample_every", "save_every"):
        if not getattr(arguments, name) >= 0:  # NaN neither
            raise ValueError(f"{name}: expected at least 0, got {getattr(arguments, name)}")
    run = arguments.out
    if run is None:
        run = Path("runs") / time.strftime(f"{arguments.preset or 'demo'}-%Y%m%d-%H%M%S")
    if arguments.resume:
        trainer = _resumed(arguments, run, ranks)
    else:
        if latest_checkpoint(run) is not None:
            raise ValueError(f"out: expected a folder without a run, got {run}; add --resume")
        name = arguments.preset or "demo"
        config, rates = preset(name), RATES.get(name, {})
        precision = _precision(arguments.precision, ranks)
        options = _options(arguments, {"precision": precision, **rates})
        trainer = Trainer(config, _corpus(arguments, run, ranks), options, ranks)
    return trainer, run


def _precision(wanted: str | None, ranks: Ranks) -> str:
    """The precision asked for, else the one that suits all processes; the first one says why."""
    if wanted is not None:
        chosen = Precision(wanted, "asked for by --precision")
    else:
        chosen = faster_precision()
        _, any_fp32 = ranks.agree(0.0, chosen.name == "fp32")
        if any_fp32 and chosen.name != "fp32":
            chosen = Precision("fp32", "the device of another process does not multiply in bf16")
    if ranks.is_first:
        note(f"precision: {chosen.name}, {chosen.reason}")
    return chosen.name


def _resumed(arguments: argparse.Namespace, run: Path, ranks: Ranks) -> Trainer:
    checkpoint = load_checkpoint(run)
    if arguments.preset is not None and preset(arguments.preset) != checkpoint.config:
        different = [
            f"{field.name} {getattr(checkpoint.config, field.name)!r}"
            for field in dataclasses.fields(checkpoint.config)
            if getattr(checkpoint.config, field.name)
            != getattr(preset(arguments.preset), field.name)
        ]
        raise ValueError(
            f"preset: expected the configuration of the checkpoint in {run}"
            f" ({', '.join(different)}), got {arguments.preset!r}"
        )
    missing = {"step", "seconds", "options", "train_sha256"} - checkpoint.state.keys()
    if missing:
        raise ValueError(
            f"checkpoint: expected one of a training run, got one without {sorted(missing)}"
        )
    fields = dataclasses.fields(TrainOptions)
    # Runs that began before an option existed are runs with its default.
    saved = {**{field.name: field.default for field in fields}, **checkpoint.state["options"]}
    for name in saved.keys() - BUDGETS:
        given = getattr(arguments, name)
        if given is not None and given != saved[name]:
            raise ValueError(f"{name}: expected {saved[name]} as the run began with, got {given}")
    if ranks.is_first:
        note(f"precision: {saved['precision']}, as the run began with")
    corpus = _corpus(arguments, run, ranks)
    return Trainer.resume(checkpoint, corpus, _options(arguments, saved), ranks)


def _options(arguments: argparse.Namespace, base: dict[str, Any]) -> TrainOptions:
    """The options given on top of those of `base`; a budget given replaces the one there."""
    names = {field.name for field in dataclasses.fields(TrainOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if BUDGETS & given.keys():
        base = {name: value for name, value in base.items() if name not in BUDGETS}
    elif "minutes" not in base:
        base = {**base, "minutes": DEFAULT_MINUTES}
    return TrainOptions(**{**base, **given})


def _corpus(arguments: argparse.Namespace, run: Path, ranks: Ranks) -> Corpus:
    corpus = load_corpus(arguments.data, text_key=arguments.text_key, raw=arguments.raw, out=run)
    if ranks.is_first:
        note(f"corpus: {corpus.name}", *corpus.describe())
    return corpus


def _train(trainer: Trainer, run: Path, arguments: argparse.Namespace) -> int:
    n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    note(f"{n_parameters:,} parameters, {trainer.options.precision}, {run}")
    reporter = Reporter(
        trainer, run, sample_every=arguments.sample_every, save_every=arguments.save_every
    )
    with Interrupt() as interrupt:
        finished = run_reported(trainer, reporter, interrupt.requested, arguments.threads)
        reporter.finish()
        reporter.save()
        draw_loss_curve(run)
        if not finished:
            note(f"stopped and saved; go on with  --resume --out {run}")
            return INTERRUPTED
    n_bytes = sum(map(len, trainer.corpus.held_out))
    note(f"judging by {n_bytes:,} held-out bytes")
    result = {**judge(trainer), **reporter.rates}
    reporter.require_finite("held-out bits per byte", result["bits_per_byte"])
    replace_file(run / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print_result(
        f"held out, {result['held_out_bytes']:,} bytes: {result['bits_per_byte']:.4f} bits per byte"
        f" ({', '.join(f'{name}: {bits:.4f}' for name, bits in result['compressors'].items())})"
    )
    print_result(f"sample:\n{sample(trainer, FINAL_SAMPLE_BYTES)}")
    return 0


def _follow(trainer: Trainer) -> int:
    """Train the same steps in another process, which neither reports nor saves."""
    with Interrupt() as interrupt:
        trainer.run(should_stop=interrupt.requested)
    return 0  # the first process says how it ended: a failure here would end that one early


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("stlm_models.train", __doc__)
    add = parser.add_argument
    add("--preset", help="shape of the model (default: demo, or the checkpoint's)")
    add("--out", type=Path, help="run folder (default: a new one under runs/)")
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="PATH",
        help="files, folders or globs (default: the stdlib)",
    )
    add("--text-key", metavar="KEY", help="field of each line of .jsonl files that is a document")
    add("--raw", action="store_true", help="take the bytes of every file as they are")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="time budget (default: 10)")
    budget.add_argument("--steps", type=int, help="budget in steps instead")
    add("--batch-size", type=int, help="windows of one context in a step")
    add("--seed", type=int, help="of the parameters and the order of the data")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 where the device has it")
    add("--muon-lr", type=float, help="peak learning rate of the matrices")
    add("--adamw-lr", type=float, help="peak learning rate of the rest")
    add("--schedule", choices=SCHEDULES, help="of the learning rates (default: wsd)")
    add("--max-grad-norm", type=float, help="limit of the gradients' norm (default: none)")
    add("--grad-accum-steps", type=int, help="read a step's windows in so many parts")
    add(
        "--threads",
        type=int,
        help="on a CPU; default: by the times of the steps, as others load it",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="through torch.compile")
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="keep the inputs of blocks alone: less memory, more time",
    )
    add("--sample-every", type=float, default=30.0, metavar="SECONDS")
    add("--save-every", type=float, default=120.0, metavar="SECONDS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
