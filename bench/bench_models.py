"""Benchmarks of whole training steps and of generation: checked to be equal, then timed."""

from __future__ import annotations

from typing import Any

import pytest

from .harness.model_jobs import ModelJob
from .harness.session import Session


def jobs_of(session: Session) -> list[ModelJob]:
    return session.model_jobs()


def test_model_speed(job: ModelJob, session: Session, timer: Any, benchmark: Any) -> None:
    def measure() -> None:
        with session.models.checked(job) as work:
            plan = session.machine.plan(work.task, timer)
            benchmark.extra_info |= session.models.describe(job, work) | plan.info
            benchmark.pedantic(plan.target, setup=plan.setup, rounds=plan.rounds)

    if reason := session.attempt(job, measure):
        pytest.skip(reason)
    if benchmark.stats is not None:
        session.add_model_rates(benchmark.extra_info, benchmark.stats.stats.median)
        session.records.append(benchmark.stats.as_dict(include_data=False))
