"""Collection, recording and summary of a benchmark run.

`--benchmark-disable` rehearses: each op's first smoke case and a step and a text of a few bytes,
each body once, compiled peers traced but not compiled.
"""

from __future__ import annotations

import datetime
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stlm_kernels.registry import OPS
from stlm_models.training.process import keep_freed_memory

from . import report, resources
from .harness import environment
from .harness.commandline import positive
from .harness.jobs import Job, left_out
from .harness.model_jobs import ModelJob
from .harness.session import Session
from .harness.timing import Cpu, Gpu

SESSION = pytest.StashKey[Session]()
ENDS = pytest.StashKey[float]()
NO_TIME = "no minutes are left"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--commit", help="what to record as the commit, where git is not there")
    parser.addoption("--full", action="store_true", help="every case, and every compiled peer")
    parser.addoption(
        "--threads", type=positive, help="threads of torch (default: torch's own choice)"
    )
    parser.addoption("--minutes", type=float, default=math.inf, help="then no line is begun")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ENDS] = time.monotonic() + 60 * config.getoption("--minutes")
    rehearsal = bool(config.getoption("benchmark_disable"))
    if config.getoption("--threads") is not None:
        torch.set_num_threads(config.getoption("--threads"))
    machine = Gpu() if torch.cuda.is_available() else Cpu()
    config.stash[SESSION] = Session(
        machine, rehearsal, config.getoption("--commit"), config.getoption("--full")
    )
    if not rehearsal:
        keep_freed_memory()
    config.option.benchmark_quiet = True  # its table has no memory, error or ratio: ours follows
    if not rehearsal and config.option.benchmark_json is None:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        config.option.benchmark_json = Path("out/bench") / f"{machine.tag}-{stamp}.json"
        config.option.benchmark_json.parent.mkdir(parents=True, exist_ok=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "job" in metafunc.fixturenames:
        found = metafunc.module.jobs_of(metafunc.config.stash[SESSION])
        metafunc.parametrize("job", found, ids=[job.id for job in found])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put ops first: models take longest, and minutes may be counted."""
    items.sort(key=lambda item: "bench_models" in item.nodeid)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture
def timer(request: pytest.FixtureRequest, session: Session, job: Job | ModelJob) -> Any:
    """Return the timer of a job; `benchmark`, which reads the mark, must come later."""
    if time.monotonic() > request.config.stash[ENDS]:
        pytest.skip(NO_TIME)
    timer = session.machine.timer()
    mark = pytest.mark.benchmark(group=job.group, timer=timer, disable_gc=True)
    request.node.add_marker(mark)
    return timer


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    session = config.stash[SESSION]
    ceilings = None if session.ceilings is None else vars(session.ceilings)
    machine_info["stlm"] = facts_of(session) | {"ceilings": ceilings}


def facts_of(session: Session) -> dict[str, Any]:
    """Return the facts of a run at its end, and the entries that it did not time."""
    return session.about | {
        "after": environment.describe(session.machine.device, session.about["commit"]),
        "not_timed": session.not_timed,
        "left_out": [*left_out(OPS.values(), session.tag)],
    }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = config.stash[SESSION]
    if not session.records and not session.not_timed:
        return
    terminalreporter.section("stlm: speed and memory")
    about = facts_of(session)
    terminalreporter.write_line(environment.header(about, session.ceilings))
    ops = {record["extra_info"]["op"] for record in session.records} & OPS.keys()
    if isinstance(session.machine, Cpu) and ops:
        terminalreporter.write_line(f"\n{resources.summary(ops)}")
    for table in report.tables(session.records, about):
        terminalreporter.write_line("")
        terminalreporter.write_line(table)
    if skipped := [
        x for x in terminalreporter.stats.get("skipped", ()) if NO_TIME in str(x.longrepr)
    ]:
        terminalreporter.write_line(f"\n{len(skipped)} lines were not measured: {NO_TIME}")
    terminalreporter.write_line(f"\nJSON: {config.option.benchmark_json}")
