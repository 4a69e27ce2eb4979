"""Shared state of a benchmark run: the machine, the current case's data, the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stlm_kernels.registry import OPS

from . import environment
from .jobs import CaseData, Job, Task, jobs, task_of
from .model_jobs import ModelJob, Models, model_jobs
from .timing import Ceilings, Cpu, Gpu


class Unchecked(Exception):
    """No reference result exists for a case, so no entry may be timed on it."""


class Session:
    """Shared state of the jobs of one run."""

    def __init__(
        self, machine: Cpu | Gpu, rehearsal: bool, commit: str | None = None, full: bool = False
    ) -> None:
        self.machine = machine
        self.rehearsal, self.full = rehearsal, full
        self.records: list[dict[str, Any]] = []
        self.not_timed: list[dict[str, str]] = []
        self.about = environment.describe(machine.device, commit)
        self.models = Models(machine, self.backend)
        self._ceilings: Ceilings | None = None
        self._data: CaseData | None = None
        self._without_reference: tuple[Any, str] = None, ""

    @property
    def ceilings(self) -> Ceilings | None:
        """Rates of the machine, measured when first needed; None in a rehearsal."""
        if self._ceilings is None and not self.rehearsal:
            self._ceilings = self.machine.ceilings()
        return self._ceilings

    @property
    def backend(self) -> str:
        """Backend of torch.compile: a rehearsal traces only."""
        return "eager" if self.rehearsal else "inductor"

    @property
    def tag(self) -> str:
        if self.rehearsal:
            return "smoke"
        return "bench_full" if self.full and self.machine.tag == "bench" else self.machine.tag

    def jobs(self) -> list[Job]:
        return list(jobs(OPS.values(), self.tag, self.machine.impls, not self.full))

    def model_jobs(self) -> list[ModelJob]:
        return model_jobs(self.machine, self.rehearsal, self.full)

    def attempt(self, job: Job | ModelJob, work: Callable[[], None]) -> str:
        """Run what measures a job; note and return the reason where it cannot run here.

        A peer may need more memory than there is, or a kernel that this device lacks. Ours may not,
        a wrong result is never excused, and a rehearsal is there to find errors.
        """
        try:
            work()
        except Exception as error:  # whatever a compiler, a launch or another library raises
            excused = isinstance(error, Unchecked) or not job.entry.ours
            if self.rehearsal or isinstance(error, AssertionError) or not excused:
                raise
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        else:
            return ""
        # Out here, since the error kept alive what filled the memory.
        self.machine.clear()
        op, case, direction = job.group.split("/")
        names = {"op": op, "case": case, "pass": direction, "entry": job.entry.name}
        self.not_timed.append(names | {"reason": reason})
        return reason

    def _case_data(self, job: Job) -> CaseData:
        """Return inputs and reference of the job's case, kept until another case comes."""
        if self._without_reference[0] is job.case:
            raise Unchecked(self._without_reference[1])
        data = self._data
        if data is None or data.spec is not job.spec or data.case is not job.case:
            self._data = data = None  # the old inputs go before the new ones come
            machine = self.machine
            try:
                data = CaseData(job.spec, job.case, machine.dtype, machine.device)
            except torch.OutOfMemoryError:
                self._without_reference = job.case, "inputs and reference do not fit in memory"
                raise Unchecked(self._without_reference[1]) from None
            self._data = data
        return data

    def checked_task(self, job: Job) -> tuple[Task, dict[str, float]]:
        """Return the task of a job whose results were checked, and their errors."""
        data = self._case_data(job)
        function = data.function_of(job.entry, self.backend)
        errors = data.errors_of(job.entry, function)
        samples = data.samples(self.machine.sample_count(data.sample_bytes()))
        return task_of(job, samples, function), errors

    def facts(self, job: Job, task: Task) -> dict[str, Any]:
        directions = ["fwd", "bwd"] if job.direction == "fwd+bwd" else [job.direction]
        directions = ["fwd" if x == "no-grad" else x for x in directions]
        return {
            "op": job.spec.name,
            "case": job.case.name,
            "sizes": dict(job.case.sizes),
            "pass": job.direction,
            "entry": job.entry.name,
            "ours": job.entry.ours,
            "compiled": job.entry.compiled,
            "dtype": str(self.machine.dtype).removeprefix("torch."),
            "bytes": sum(job.spec.bytes_moved(job.case, self.machine.dtype, x) for x in directions),
            "flops": sum(job.spec.flops(job.case, x) for x in directions),
            "peak_bytes": self.machine.peak_bytes(task),
        }

    def add_rates(self, job: Job, info: dict[str, Any], seconds: float) -> None:
        info["gb_per_s"] = info["bytes"] / seconds / 1e9
        info["tflop_per_s"] = info["flops"] / seconds / 1e12
        ceilings = self.ceilings
        if ceilings is not None:
            floor = ceilings.floor_seconds(info["bytes"], info["flops"])
            info["roofline_share"] = floor / seconds

    def add_model_rates(self, info: dict[str, Any], seconds: float) -> None:
        info["bytes_per_s"] = info["real_bytes"] / seconds
        if info["flops"] and self.ceilings is not None:
            info["tflop_per_s"] = info["flops"] / seconds / 1e12
            info["roofline_share"] = self.ceilings.floor_seconds(0, info["flops"]) / seconds
