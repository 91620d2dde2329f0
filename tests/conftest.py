"""Guards that hold for every test."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

import kvferry
from kvferry.router.garbage import collect_rarely
from kvferry.tests.forks import Forks

# No test asserts a time: Hypothesis would fail an example that takes 200 ms, which a busy machine makes of any.
settings.register_profile("kvferry", deadline=None)
settings.load_profile("kvferry")

# Tests are more processes than there are cores. Threads of torch's OpenMP that wait for one another would spin for
# milliseconds on cores that others need. It is read as torch is imported; what tests start inherits it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

TESTS = Path(__file__).parent
# A client of HTTP reads the certificates of all authorities as it is made, which takes as long as many a request. No
# test speaks to a host that one of them vouches for: here are none.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(TESTS)
LONGEST = ("emulation", "e2e", "simulation", "benchmarks", "security", "simulator")


def pytest_configure() -> None:
    """Refuse to test another checkout, at which an editable install may point; and let SIGINT interrupt."""
    checkout = Path(__file__).resolve().parent.parent
    imported = Path(kvferry.__file__).resolve().parent
    assert imported == checkout, f"kvferry is {imported}, not this checkout ({checkout}): make install-dev"
    # A shell starts its background jobs with SIGINT ignored, and so would be what the tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the folders whose files take longest begin: at the end, processes that share the tests wait for one file."""

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(TESTS).parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """What is imported stays: collections need not go through it, which is a tenth of what the tests compute, and they
    are as rare as a router's."""
    collect_rarely()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests for a GPU ran on an emulated one (`emulation/test_gpu_tests.py`)."""
    properties = [each for report in terminalreporter.getreports("passed") for each in report.user_properties]
    if counts := [count for name, count in properties if name == "emulated_gpu_tests"]:
        terminalreporter.write_line(f"{sum(counts)} tests for a GPU passed on an emulated one")


@pytest.fixture(scope="session")
def rank_forks() -> Iterator[Forks]:
    """Other ranks as forks of one process: they import nothing anew."""
    forks = Forks("kvferry.engine.follower")
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """What a program sets up in the test's process goes with the test: its stream is closed then."""
    kept, hook, root = structlog.get_config(), sys.excepthook, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**kept)
    structlog.contextvars.clear_contextvars()
    sys.excepthook, root.handlers[:] = hook, handlers
    root.setLevel(level)
