"""Benchmarks of every op: checked, then timed. One test is one line of the results."""

from __future__ import annotations

from typing import Any

import pytest

from .harness.jobs import Job
from .harness.session import Session


def jobs_of(session: Session) -> list[Job]:
    return session.jobs()


def test_speed(job: Job, session: Session, timer: Any, benchmark: Any) -> None:
    def measure() -> None:
        task, errors = session.checked_task(job)
        plan = session.machine.plan(task, timer)
        benchmark.extra_info |= session.facts(job, task) | plan.info | {"rms_errors": errors}
        benchmark.pedantic(plan.target, setup=plan.setup, rounds=plan.rounds)

    if reason := session.attempt(job, measure):
        pytest.skip(reason)
    if benchmark.stats is not None:
        session.add_rates(job, benchmark.extra_info, benchmark.stats.stats.median)
        session.records.append(benchmark.stats.as_dict(include_data=False))
