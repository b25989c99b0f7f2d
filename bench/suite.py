"""What the suites of all families share: who takes part, and how a case becomes rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

import trimtab
from measure import Contender, Effort, Outcome, ReplayClock, Step, against_floor, summary

RunRace = Callable[[Any, "list[Provider]", Effort], dict[str, Outcome]]


def always(case: Any) -> None:
    """No reason against anything."""
    return


class Provider(NamedTuple):
    """One column of the comparison."""

    name: str
    step: Callable[[Any], Step]
    why_not: Callable[[Any], str | None]
    impl: str | None = None  # of ours
    checked: bool = True
    compiles: bool = False
    capturable: bool = True  # False: its time is mostly the host's, which no graph replays
    # On a CPU only with --full, for this reason.
    costly: Callable[[Any], str | None] = always
    concerns: Callable[[Any], bool] = lambda case: True  # whether it is about such cases at all
    probe: Callable[[Any], Step] | None = None
    units: Callable[[Any], int] = lambda case: 1
    note: Callable[[Any], str | None] = always

    def reason(self, case: Any, full: bool) -> str | None:
        """Why it does not take part in this case, or None."""
        problem = self.why_not(case)
        if problem is None and not full and case.device == "cpu":
            problem = self.costly(case)
            problem = problem and f"only with --full: {problem}"
        return problem

    def contender(self, case: Any) -> Contender:
        """What ``measure.race`` takes."""
        return Contender(
            self.name, self.step(case), self.checked, self.compiles,
            case.capturable and self.capturable,
            None if self.probe is None else self.probe(case), self.units(case),
        )  # fmt: skip


def not_here(op: str, device: str, impl: str, *args: Any, **kwargs: Any) -> str | None:
    """The package's own reason why ``impl`` can't take these arguments, or None."""
    if impl == "triton" and device == "cpu":
        return "needs a GPU; the Triton interpreter is for tests and is never timed"
    try:
        trimtab.explain(op, *args, **kwargs, impl=impl)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return None


def parametrize(
    metafunc: pytest.Metafunc, cases: Sequence[Any], providers: Sequence[Provider]
) -> None:
    """One test per case and provider that the case concerns."""
    pairs = [
        (case, provider) for case in cases for provider in providers if provider.concerns(case)
    ]
    ids = [f"{case.id}-{provider.name.replace(' ', '_')}" for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


def record(
    benchmark: Any,
    clock: ReplayClock,
    case: Any,
    provider: Provider,
    races: Any,
    leave_out: Callable[[Any, str, str, str], None],
    run_race: RunRace,
    floor: str,
) -> None:
    """The body of a suite's test: run the case's race if need be, and hand over this row."""
    reason = provider.reason(case, races.full)
    if reason is None and races.too_late(case):
        reason = "no time was left (--stop-after)"
    if reason is not None:
        leave_out(case, provider.name, "not run", reason)
        pytest.skip(reason)
    outcomes = races.of(case, run_race, lambda other: other.reason(case, races.full) is None)
    outcome = outcomes[provider.name]
    if outcome.status != "timed":
        leave_out(case, provider.name, outcome.status, outcome.reason)
        # A wrong peer is a result; a wrong kernel of ours is a bug.
        verdict = pytest.fail if provider.impl else pytest.xfail
        verdict(f"{outcome.status}: {outcome.reason}")
    row = {**case.describe(), "provider": provider.name, "impl": provider.impl, **summary(outcome)}
    timed = outcomes[floor].status == "timed"
    floor_ms = summary(outcomes[floor])["p50_ms"] if timed else None
    row |= against_floor(row, floor_ms, case.flop, case.bytes)
    note = provider.note(case)
    benchmark.extra_info.update(row, **races.header, **({"note": note} if note else {}))
    benchmark.group = case.id
    clock.load(outcome.seconds)
    benchmark.pedantic(clock.spend, rounds=len(outcome.seconds))
