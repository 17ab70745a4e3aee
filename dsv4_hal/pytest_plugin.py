"""The contract's cases as tests of a vendor's own repository.

    # conftest.py
    pytest_plugins = ["dsv4_hal.pytest_plugin"]

    # test_contract.py
    def test_contract(conformance_outcome): ...

    pytest --dsv4-backend mychip --dsv4-op linear -n 2

A test that asks for `conformance_outcome` becomes one test per case, named after it. The case runs on the backend in a
process of its own, which a crash or a hang ends without ending the session. Where the case disagrees the test fails, or
is an expected failure if a waiver beside the backend covers it; where it agrees the test's body runs, and may look at
the `Outcome`. Cases larger than the backend affords are skipped, with that reason. A stale waiver fails the session,
and so does a backend of which nothing was judged. Works under pytest-xdist; nothing loads this module but who names it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dsv4_hal.backend import BackendError
from dsv4_hal.cli.conform import LONGEST, SHORTEST, chosen_jobs
from dsv4_hal.conformance.judging.results import DEFAULT_SIZE, GRAD, About, Extent, Job, Outcome, affordable
from dsv4_hal.conformance.judging.trace import short
from dsv4_hal.conformance.judging.verdict import judge
from dsv4_hal.conformance.judging.waivers import read_waivers
from dsv4_hal.conformance.judging.worker import LIMIT, Worker
from dsv4_hal.conformance.reports.report import Run
from dsv4_hal.numerics import MODES, mode_names
from dsv4_hal.ops import SIZES

_OUTCOME = pytest.StashKey[Outcome]()
_ABOUT = pytest.StashKey[About]()
_CARRIED = "dsv4_hal"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dsv4-hal", "cases of the dsv4-hal contract")
    group.addoption("--dsv4-backend", metavar="NAME", help="registered backend; default: dsv4_backend of the ini file")
    group.addoption("--dsv4-op", action="append", metavar="OP", help="only this op, or family of ops; repeatable")
    group.addoption("--dsv4-pattern", default="", metavar="TEXT", help="only cases whose id contains this")
    group.addoption("--dsv4-mode", choices=mode_names(), help="only this mode; default both")
    group.addoption("--dsv4-grad", action="store_true", help="gradients instead, in mode exact")
    group.addoption("--dsv4-size", choices=SIZES, default=DEFAULT_SIZE, help="cases up to this size class")
    group.addoption("--dsv4-limit", type=_seconds, default=LIMIT, metavar="SECONDS", help="that a case may take")
    parser.addini("dsv4_backend", "registered backend that the contract's cases run on")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST <= seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"must be {SHORTEST:g} to {LONGEST:g} seconds, got {text}")
    return seconds


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # under pytest-xdist reports of all processes come together in one
        config.pluginmanager.register(_Session(config), "dsv4-hal-session")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "conformance_outcome" not in metafunc.fixturenames:
        return
    _backend(metafunc.config)
    chosen = (metafunc.config.getoption(f"dsv4_{name}") for name in ("op", "pattern", "mode", "size", "grad"))
    try:
        work = chosen_jobs(*chosen)
    except ValueError as error:
        raise pytest.Collector.CollectError(f"dsv4-hal: {error}") from None
    metafunc.parametrize("conformance_outcome", work, ids=[job.id for job in work], indirect=True)


@pytest.fixture(scope="session")
def conformance_worker(pytestconfig: pytest.Config) -> Iterator[Worker]:
    """The process that runs the backend's cases."""
    try:
        modes = (GRAD,) if pytestconfig.getoption("dsv4_grad") else MODES
        worker = Worker(_backend(pytestconfig), modes)
        read_waivers(Path(worker.about.waivers))  # what is wrong with the file is said once
    except (BackendError, ValueError) as error:
        pytest.fail(str(error), pytrace=False)
    threads, processes = torch.get_num_threads(), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, threads // (2 * processes)))  # the backend's process needs the other half
    with worker:
        yield worker
    torch.set_num_threads(threads)


@pytest.fixture
def conformance_outcome(request: pytest.FixtureRequest, conformance_worker: Worker) -> Outcome:
    """What became of one case of the contract on the backend."""
    job: Job = request.param
    about = conformance_worker.about
    if not affordable([job], about):
        pytest.skip(f"a case of size {job.size}: the backend affords {about.affords} at most")
    made = conformance_worker.produce(job, request.config.getoption("dsv4_limit"))
    outcome = judge(conformance_worker.backend, job, made, about.numerics(job.mode))
    request.node.stash[_OUTCOME], request.node.stash[_ABOUT] = outcome, about
    return outcome


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    outcome = item.stash.get(_OUTCOME, None)
    if outcome is None or outcome.ok:
        return
    waiver = _run([outcome], item.stash[_ABOUT]).waiver(outcome)
    if waiver is not None:
        pytest.xfail(f"waived {waiver.date} ({waiver.reason}): {outcome.message}")
    again = f'dsv4-hal conform --backend {outcome.backend} -p "{outcome.id}"'
    told = [f"{outcome.verdict}: {outcome.message}", *short(outcome.trace), f"again: {again}"]
    pytest.fail("\n".join(told), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and _OUTCOME in item.stash:
        plain = asdict(item.stash[_OUTCOME]), asdict(item.stash[_ABOUT])
        setattr(report, _CARRIED, plain)  # pytest-xdist sends attributes of a report that are plain data
    return report


class _Session:
    """What the reports of all processes come to."""

    def __init__(self, config: pytest.Config) -> None:
        self.size: str = config.getoption("dsv4_size")
        self.outcomes: list[Outcome] = []
        self.about: About | None = None
        self.run: Run | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, _CARRIED):
            outcome, about = getattr(report, _CARRIED)
            self.outcomes.append(Outcome(**outcome))
            self.about = About(**about)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.about is None:
            return
        self.run = _run(self.outcomes, self.about, self.size)
        if session.exitstatus == pytest.ExitCode.OK and (self.run.stale or not self.run.judged):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.run is None:
            return
        terminalreporter.section("dsv4-hal")
        for waiver in self.run.stale:
            told = f"stale waiver: {waiver.case} of {waiver.date}: {waiver.why_stale}; see {self.run.about.waivers}"
            terminalreporter.line(told, red=True)
        for told in self.run.about.remarks:
            terminalreporter.line(f"remark: {told}")
        terminalreporter.line(self.run.headline)


def _run(outcomes: list[Outcome], about: About, size: str = DEFAULT_SIZE) -> Run:
    waivers = read_waivers(Path(about.waivers))
    return Run(outcomes[0].backend, outcomes, about, waivers, Extent(size, about.affords))


def _backend(config: pytest.Config) -> str:
    name = config.getoption("dsv4_backend") or config.getini("dsv4_backend")
    if not name:
        told = "dsv4-hal: name a backend: --dsv4-backend NAME, or dsv4_backend in the ini file"
        raise pytest.Collector.CollectError(told)
    return str(name)
