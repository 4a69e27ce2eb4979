"""Jobs of whole training steps and generation, whose results are checked before they are timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stlm_models import STLM
from stlm_models.config import BYTES
from stlm_models.data.corpus import Corpus, load_corpus
from stlm_models.data.loader import Batch, Loader
from stlm_models.presets import preset
from stlm_models.training.trainer import Trainer, TrainOptions

from .baseline_ops import BASELINE_OPS, Ops, ops_replaced, with_impl
from .jobs import Task, relative_rms
from .timing import Cpu, Gpu

STEP, GENERATE = "model-step", "generate"
CONTEXT_ON_CPU = 1024


@dataclass(frozen=True)
class ModelEntry:
    """Model with one set of ops, or one way to generate with it.

    Args:
        name: what tables and test names call it.
        ops: in place of the library's; empty is the model as a user gets it.
        ours: not a peer.
        compiled: run through torch.compile.
    """

    name: str
    ops: Ops = field(default_factory=dict, hash=False)
    ours: bool = False
    compiled: bool = False


OURS = ModelEntry("ours", ours=True)
BASELINE = ModelEntry("baseline ops", BASELINE_OPS)
CACHED, RECOMPUTED = ModelEntry("ours, cached", ours=True), ModelEntry("whole text again")


@dataclass(frozen=True)
class ModelJob:
    """Line of the results: a preset's step, or texts of one length, in one of its entries."""

    family: str
    preset: str
    entry: ModelEntry
    sizes: tuple[tuple[str, int], ...]

    @property
    def case(self) -> str:
        return "-".join([self.preset, *(f"{name}{value}" for name, value in self.sizes)])

    @property
    def direction(self) -> str:
        return "step" if self.family == STEP else "greedy"

    @property
    def group(self) -> str:
        return f"{self.family}/{self.case}/{self.direction}"

    @property
    def id(self) -> str:
        return f"{self.group}/{self.entry.name}".replace("/", "-").replace(" ", "_")

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


def model_jobs(machine: Cpu | Gpu, rehearsal: bool, full: bool) -> list[ModelJob]:
    """Return jobs for steps of the presets that are short on this machine, and for short texts.

    Compiling takes a minute or more: of one preset on a GPU, of more with `full`.
    """
    on_gpu = isinstance(machine, Gpu)
    steps = ["demo", "10m", *(["50m", "100m"] if on_gpu else [])][: 1 if rehearsal else None]
    generator = "10m" if on_gpu else "demo"
    jobs = [
        ModelJob(STEP, name, entry, _step_sizes(name, on_gpu, rehearsal))
        for name in steps
        for entry in step_entries(on_gpu, full or rehearsal or (on_gpu and name == generator))
    ]
    prompt, new = (64, 32) if on_gpu else (32, 8)
    batches = (2,) if rehearsal else (1, 64)
    jobs += [
        ModelJob(GENERATE, generator, entry, (("batch", batch), ("prompt", prompt), ("new", new)))
        for batch in batches
        for entry in (CACHED, RECOMPUTED)
    ]
    return jobs


def _step_sizes(name: str, on_gpu: bool, rehearsal: bool) -> tuple[tuple[str, int], ...]:
    context = preset(name).context
    if not on_gpu:
        context = 64 if rehearsal else min(context, CONTEXT_ON_CPU)
    return ("batch", 8 if on_gpu else 1), ("context", context)


def step_entries(on_gpu: bool, with_compiled: bool) -> list[ModelEntry]:
    entries = [OURS, *([ModelEntry("torch", with_impl("torch"), ours=True)] if on_gpu else [])]
    entries.append(BASELINE)
    if with_compiled:
        entries += [replace(x, name=f"compiled {x.name}", compiled=True) for x in (OURS, BASELINE)]
    return entries


@dataclass
class ModelWork:
    """Checked task, and the facts of its line."""

    task: Task
    real_bytes: int
    facts: dict[str, Any]


class Models:
    """Shared state of the model jobs: the first entry's result, which the others must equal.

    Args:
        machine: where they run.
        backend: of torch.compile.
    """

    def __init__(self, machine: Cpu | Gpu, backend: str) -> None:
        self.machine, self.backend = machine, backend
        self._want: tuple[str, Any] = ("", None)
        self._flops = 0

    @contextmanager
    def checked(self, job: ModelJob) -> Iterator[ModelWork]:
        """Yield the job's work, its result checked against the first entry's of its case.

        Raises:
            AssertionError: another loss, other gradients or another text, or none that is finite.
        """
        with ops_replaced(job.entry.ops):
            yield self._step(job) if job.family == STEP else self._generation(job)

    def _step(self, job: ModelJob) -> ModelWork:
        trainer = trainer_of(job, self.machine)
        if job.entry.compiled:
            torch.compiler.reset()
            trainer.compute = torch.compile(trainer.compute, dynamic=False, backend=self.backend)  # type: ignore[assignment]
        got = loss_and_gradients(trainer)
        assert math.isfinite(got[0].item()), f"{job.id}: the loss is {got[0].item()}"
        if self._is_first(job, got):
            self._flops = _flops(trainer)
        eps = torch.finfo(self.machine.dtype).eps
        for name, x, want in zip(("loss", "gradient"), got, self._want[1], strict=True):
            # Half the digits, as for peers of the ops.
            error = relative_rms(x, want)
            assert error <= eps**0.5, f"{job.id}: {name}: relative error {error:.2e}"

        def rewind(trainer: Trainer) -> Trainer:
            trainer.step = 0  # the same learning rate each time
            return trainer

        task = Task([trainer], rewind, Trainer.train_step, capturable=False)
        ids = trainer.loader.batch(0).byte_ids
        facts = {"dtype": str(self.machine.dtype).removeprefix("torch."), "flops": self._flops}
        return ModelWork(task, int((ids < BYTES).sum()), facts)

    def _generation(self, job: ModelJob) -> ModelWork:
        model = model_of(job, self.machine)
        prompts = prompts_of(job)
        run = cached if job.entry == CACHED else recomputed
        got = run(model, prompts, job["new"])
        self._is_first(job, got)
        assert got == self._want[1], f"{job.id}: another text than {CACHED.name}"
        task = Task([prompts], lambda x: x, lambda x: run(model, x, job["new"]), capturable=False)
        facts = {"dtype": "float32", "flops": 0}
        return ModelWork(task, job["batch"] * job["new"], facts)

    def _is_first(self, job: ModelJob, got: Any) -> bool:
        first = self._want[0] != job.group
        if first:
            self._want = job.group, got
        return first

    def describe(self, job: ModelJob, work: ModelWork) -> dict[str, Any]:
        """Return `extra_info` of the line, before it is timed."""
        return work.facts | {
            "op": job.family,
            "case": job.case,
            "sizes": {"preset": job.preset, **dict(job.sizes)},
            "pass": job.direction,
            "entry": job.entry.name,
            "ours": job.entry.ours,
            "compiled": job.entry.compiled,
            "real_bytes": work.real_bytes,
            "peak_bytes": self.machine.peak_bytes(work.task),
        }


@functools.cache
def _corpus() -> Corpus:
    return load_corpus(None)


class SameBatch(Loader):
    """Loader of the first batch only: a trainer's own thread has it ready when a step begins."""

    def __init__(self, trainer: Trainer) -> None:
        self._batch = trainer.windows.batch(0).to(trainer.device)

    def batch(self, index: int) -> Batch:
        return self._batch


def trainer_of(job: ModelJob, machine: Cpu | Gpu) -> Trainer:
    """Make a trainer with the same parameters and the same batch for every entry."""
    precision = "bf16" if machine.dtype == torch.bfloat16 else "fp32"
    # So many steps that the learning rate never changes.
    options = TrainOptions(steps=1 << 30, batch_size=job["batch"], precision=precision)
    trainer = Trainer(replace(preset(job.preset), context=job["context"]), _corpus(), options)
    trainer.loader = SameBatch(trainer)
    fill_zeros(trainer.model)
    return trainer


@torch.no_grad()
def fill_zeros(model: STLM) -> None:
    """Fill what begins at zero: it would hide every other gradient, and make all texts the same."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def loss_and_gradients(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Return mean nats per byte of the batch, and all gradients concatenated."""
    batch = trainer.loader.batch(0)
    with trainer.autocast():
        loss_sum, n_valid = trainer.compute(
            batch.byte_ids, batch.targets, cu_seqlens=batch.cu_seqlens, patches=batch.patches
        )
    loss = loss_sum / n_valid
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    return loss.detach(), torch.cat([x.flatten() for x in gradients])


def _flops(trainer: Trainer) -> int:
    """Count the FLOPs of forward and backward, without the optimiser."""
    with FlopCounterMode(display=False) as counter:
        loss_and_gradients(trainer)
    return counter.get_total_flops()


def model_of(job: ModelJob, machine: Cpu | Gpu) -> STLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = STLM(preset(job.preset))
    fill_zeros(model)
    return model.to(machine.device)


def prompts_of(job: ModelJob) -> list[bytes]:
    """Return consecutive chunks of the corpus, all of one length."""
    text, length = b"".join(_corpus().train), job["prompt"]
    return [text[k * length : (k + 1) * length] for k in range(job["batch"])]


def cached(model: STLM, prompts: Sequence[bytes], new: int) -> list[bytes]:
    return model.generate_batch(prompts, max_new_bytes=new, temperature=0.0)


@torch.no_grad()
def recomputed(model: STLM, prompts: Sequence[bytes], new: int) -> list[bytes]:
    """Generate greedily, reading the whole text again for each byte; prompts of one length."""
    ids = torch.tensor(
        [[*prompt] for prompt in prompts], dtype=torch.int16, device=model.embedding.weight.device
    )
    for _ in range(new):
        hidden = model.hidden(ids)[:, -1]
        best = model.embedding.sample(hidden, temperature=0.0, valid_vocab=BYTES)
        ids = torch.cat([ids, best[:, None].to(ids)], dim=1)
    return [bytes(row) for row in ids[:, -new:].tolist()]
