"""Time the parts of a training step.

Each part of the model is run again by itself, forward and backward, on what it got in a real step;
parts and whole steps take turns. What the parts do not add up to is the rest: gathers, sums,
launches and the work between them; on a GPU its idle time in a step stands for itself. Beside each
stands its floor: the time of its products at full rate, or of what an optimiser must move.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from stlm_kernels import terminal
from stlm_models.config import ModelConfig
from stlm_models.data.corpus import load_corpus
from stlm_models.layers.memory import follower_rows
from stlm_models.presets import preset
from stlm_models.training.precision import faster_precision
from stlm_models.training.process import prepare_process
from stlm_models.training.trainer import PRECISIONS, Trainer, TrainOptions

from .harness import environment
from .harness.commandline import positive
from .harness.results import Result, add_result_options, command_line, result_path
from .harness.timing import Ceilings, Cpu, Gpu, Timer

OPTIMISER, REST, IDLE, WHOLE = "optimiser", "rest", "idle", "whole step"


@dataclass(frozen=True)
class Part:
    """Part of a step: seconds, FLOPs of its products, and the least time that it can take."""

    name: str
    seconds: float
    flops: int
    floor_seconds: float | None


def budget(trainer: Trainer, timer: Timer, rounds: int, ceilings: Ceilings) -> list[Part]:
    """Time the parts of a training step, the rest, idle time of a GPU, and the whole."""
    trainer.train_step()  # gradients and optimiser states exist from here on
    works = _works(trainer)
    flops = {name: _flops(work) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begin = timer()
            work()
            times[name].append(timer() - begin)
    medians = {name: statistics.median(x) for name, x in times.items()}
    parts_sum = sum(seconds for name, seconds in medians.items() if name != WHOLE)
    moved = {OPTIMISER: _moved_bytes(trainer)}
    parts = [
        Part(
            name,
            medians[name],
            flops[name],
            ceilings.floor_seconds(moved.get(name, 0), flops[name]),
        )
        for name in works
    ]
    whole = parts.pop()
    idle = _idle_seconds(trainer, whole.seconds)
    rest = Part(REST, whole.seconds - parts_sum - (idle or 0.0), 0, None)
    return [*parts, rest, *([] if idle is None else [Part(IDLE, idle, 0, None)]), whole]


def _moved_bytes(trainer: Trainer) -> int:
    """Return the least that the optimiser moves: parameters and states twice, gradients once."""
    parameters = sum(p.nbytes for p in trainer.model.parameters())
    states = sum(x.nbytes for x in trainer.optimizers.state_tensors().values())
    return 3 * parameters + 2 * states


def _idle_seconds(trainer: Trainer, whole: float) -> float | None:
    """Return the time of a step without a GPU kernel; None on a CPU, or where none was seen."""
    if trainer.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        trainer.train_step()
        torch.cuda.synchronize()
    busy = busy_seconds(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]
    return max(0.0, whole - busy) if busy else None


def busy_seconds(events: Iterable[Any]) -> float:
    """Return for how long at least one kernel or copy ran, from kineto's events without ranges."""
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    )
    busy = end = 0
    for begin, until in spans:
        busy += max(0, until - max(begin, end))
        end = max(end, until)
    return busy * 1e-9


def _works(trainer: Trainer) -> dict[str, Callable[[], None]]:
    """Return the work to time, by name: the model's parts in order, loss, optimiser, whole step."""
    model = trainer.model
    children = {name: child for name, child in model.named_children() if name != "embedding"}
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    last: list[Tensor] = []
    with _ArgumentRecorder(calls, [x for child in children.values() for x in child.modules()]):
        batch = trainer.windows.batch(0).to(trainer.device)
        with trainer.autocast(), torch.no_grad():
            last.append(
                model.hidden(batch.byte_ids, cu_seqlens=batch.cu_seqlens, patches=batch.patches)
            )

    def pooling() -> None:
        assert batch.patches is not None
        with trainer.autocast():
            ids, cu_seqlens = batch.byte_ids, batch.cu_seqlens
            ngrams = model.ngram_rows(ids, cu_seqlens)
            follows = follower_rows(model.matches, model.memory, ids, cu_seqlens, batch.followers)
            own = model.own_states(model.embedding.embed(ids), ngrams, follows)
            encoded = model.encode(own, batch.cu_seqlens).detach().requires_grad_()
            pooled = model.pool(batch.byte_ids, encoded, batch.patches, ngrams)
        torch.autograd.backward(pooled, [torch.ones_like(x) for x in pooled])

    def run_layers(group: list[nn.Module]) -> None:
        for layer in group:
            args, kwargs = calls[layer]
            with trainer.autocast():
                out = layer(*args, **kwargs)
            _backward(out)

    def loss() -> None:
        with trainer.autocast():
            out, _ = model.embedding.loss(last[0].requires_grad_(), batch.targets)
        out.backward()

    works: dict[str, Callable[[], None]] = {} if model.is_flat else {"pooling": pooling}
    for name, child in children.items():
        if called := list(_called(child, calls)):
            works[name] = lambda called=called: run_layers(called)  # type: ignore[misc]
    works["loss"] = loss
    works[OPTIMISER] = lambda: _optimise(trainer)
    works[WHOLE] = lambda: _discard(trainer.train_step())
    return works


def _called(module: nn.Module, calls: Container[nn.Module]) -> Iterator[nn.Module]:
    """Yield the module, or the largest modules within it that the model calls."""
    if module in calls:
        yield module
    else:
        for child in module.children():
            yield from _called(child, calls)


class _ArgumentRecorder:
    """Recorder of the arguments of each module's call, detached and requiring gradients."""

    def __init__(self, calls: dict[nn.Module, Any], modules: Sequence[nn.Module]) -> None:
        self._calls = calls
        self._hooks = [
            module.register_forward_pre_hook(self._note, with_kwargs=True) for module in modules
        ]

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def leaf(x: Any) -> Any:
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.detach().clone().requires_grad_() if floating else x

        self._calls[module] = (
            tuple(leaf(x) for x in args),
            {name: leaf(x) for name, x in kwargs.items()},
        )


def _backward(out: Any) -> None:
    for x in out if isinstance(out, tuple) else (out,):
        if isinstance(x, Tensor) and x.requires_grad:
            x.backward(torch.ones_like(x))


def _optimise(trainer: Trainer) -> None:
    """Step with a learning rate of zero, so that the next round finds the same model."""
    for parameter in trainer.model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimizers.step(0.0)


def _discard(_: object) -> None: ...


def _flops(work: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def table(name: str, parts: Sequence[Part]) -> list[str]:
    """Format a line for each part: ms, share of the step, GFLOP, and time over floor."""
    whole = parts[-1].seconds
    lines = [f"{name}: ms, share of the step, GFLOP, times its floor"]
    for part in parts:
        over = f"{part.seconds / part.floor_seconds:6.1f}x" if part.floor_seconds else f"{'-':>7}"
        lines.append(
            f"  {part.name:<12} {part.seconds * 1e3:9.2f} {part.seconds / whole:6.1%}"
            f" {part.flops / 1e9:9.2f} {over}"
        )
    return lines


def _config(name: str, context: int | None) -> ModelConfig:
    config = preset(name)
    return config if context is None else replace(config, context=context)


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.step", __doc__)
    parser.add_argument(
        "presets", nargs="*", default=["demo"], metavar="preset", help="(default: demo)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="windows in a step (default: 8)"
    )
    parser.add_argument(
        "--context", type=positive, help="bytes in a window (default: the preset's)"
    )
    parser.add_argument("--rounds", type=positive, default=9, help="timed rounds (default: 9)")
    parser.add_argument(
        "--precision", choices=sorted(PRECISIONS), help="default: bf16 where the device has it"
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    try:
        configs = {name: _config(name, options.context) for name in options.presets}
    except ValueError as error:
        parser.error(str(error))
    path = result_path(options.json, "step", parser)
    prepare_process()
    machine = Gpu() if torch.cuda.is_available() else Cpu()
    about, ceilings = environment.describe(machine.device, options.commit), machine.ceilings()
    print(environment.header(about, ceilings))
    corpus = load_corpus(None)
    rows: list[dict[str, Any]] = []
    summary: list[str] = []
    precision = options.precision or faster_precision().name
    for name in options.presets:
        # The rates never change here: a budget of many steps keeps the schedule at its peak.
        settings = TrainOptions(steps=1 << 30, batch_size=options.batch_size, precision=precision)
        config = configs[name]
        trainer = Trainer(config, corpus, settings)
        parts = budget(trainer, machine.timer(), options.rounds, ceilings)
        what = f"{name}, {options.batch_size} windows of {config.context}, {precision}"
        lines = table(what, parts)
        print(*lines, sep="\n", flush=True)
        rows += [{"preset": name, **asdict(part)} for part in parts]
        summary += lines
    command = command_line("bench.step", arguments)
    Result(command, about, rows, summary, {"precision": precision}).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
