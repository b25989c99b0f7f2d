"""Options, the header, and the races that the tests of one case share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import machine
import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trimtab benchmarks")
    group.addoption(
        "--quick", action="store_true", help="tiny shapes and two rounds: does it run at all?"
    )
    group.addoption(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS",
        help="begin no case later than this; those left are listed as not run",
    )  # fmt: skip
    group.addoption("--full", action="store_true", help="more rounds, and the peers that take long")


class Races:
    """Measures each case once, with the contenders whose tests were selected."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.full = session.config.getoption("--full")
        quick = session.config.getoption("--quick")
        usual = measure.GPU if torch.cuda.is_available() else measure.NORMAL
        self.effort = measure.QUICK if quick else measure.FULL if self.full else usual
        self._stop = time.perf_counter() + session.config.getoption("--stop-after")
        self.header = session.config.stash[HEADER]
        self._outcomes: dict[Any, dict[str, measure.Outcome]] = {}

    def too_late(self, case: Any) -> bool:
        """Whether the time to begin this case has passed."""
        return case not in self._outcomes and time.perf_counter() > self._stop

    def of(
        self,
        case: Any,
        run_race: Callable[..., dict[str, measure.Outcome]],
        takes_part: Callable[[Any], bool],
    ) -> dict[str, measure.Outcome]:
        """The outcomes of a case, by the provider's name."""
        if case not in self._outcomes:
            selected = [
                item.callspec.params for item in self.session.items if hasattr(item, "callspec")
            ]
            providers = [p["provider"] for p in selected if p.get("case") == case]
            start = time.perf_counter()
            self._outcomes[case] = run_race(case, list(filter(takes_part, providers)), self.effort)
            self._say(f"{case.id}: {time.perf_counter() - start:.1f} s")
        return self._outcomes[case]

    def _say(self, line: str) -> None:
        plugins = self.session.config.pluginmanager
        reporter = plugins.get_plugin("terminalreporter")
        capture = plugins.get_plugin("capturemanager")
        if reporter is not None and capture is not None:
            with capture.global_and_fixture_disabled():
                reporter.write_line(line)


HEADER: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
LEFT_OUT: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[HEADER] = {**machine.header(), "quick": config.getoption("--quick")}
    config.stash[LEFT_OUT] = []


def pytest_report_header(config: pytest.Config) -> list[str]:
    header = config.stash[HEADER]
    lines = [
        "{machine}: torch {torch}, trimtab {trimtab}, commit {commit}, {threads} threads".format(
            **header
        )
    ]
    if header["load"] > 0.25 * header["cores"]:
        lines.append(f"load {header['load']}: others work on this machine, its times mean little")
    return lines


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> Races:
    return Races(request.session)


@pytest.fixture
def leave_out(request: pytest.FixtureRequest) -> Callable[[Any, str, str, str], None]:
    """Notes who was not timed, and why, for the report."""
    noted = request.config.stash[LEFT_OUT]

    def note(case: Any, provider: str, status: str, reason: str) -> None:
        noted.append({**case.describe(), "provider": provider, "status": status, "reason": reason})

    return note


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return config.stash[HEADER]


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    output_json["left_out"] = config.stash[LEFT_OUT]
