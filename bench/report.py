"""Turns pytest-benchmark's JSON into rows, tables and pictures under ``bench/results/<machine>/``.

    python bench/report.py build/bench-token_loss.json [more.json ...] [--out FOLDER]

Rows are kept from run to run: a new row replaces the one of the same case, provider and number of
threads. Rows of a ``--quick`` run are shown and not kept.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from families import FAMILIES, Rate
from targets import Row, Verdict, verdicts

RESULTS = Path(__file__).resolve().parent / "results"
KEY = ("family", "op", "mode", "dtype", "shape", "device", "provider", "threads")
# Of the extra_info, what says where and when: the same for all rows of a run.
RUN_FIELDS = (
    "machine", "cpu", "cores", "threads", "cpu_capability", "gpu", "driver", "cuda", "python",
    "torch", "triton", "trimtab", "peers", "commit", "time", "load", "quick",
)  # fmt: skip


class Results:
    """The kept rows of one machine and family."""

    def __init__(self, runs: dict[str, Row], rows: list[Row], left_out: list[Row]) -> None:
        self.runs, self.rows, self.left_out = runs, rows, left_out

    @classmethod
    def load(cls, path: Path) -> Results:
        """What a file holds; nothing if there is none."""
        if not path.exists():
            return cls({}, [], [])
        kept = json.loads(path.read_text())
        return cls(kept["runs"], kept["rows"], kept["left_out"])

    def merge(self, newer: Results) -> Results:
        """Both, the newer where both have something about a provider in a case."""
        told = {_key(row) for row in [*newer.rows, *newer.left_out]}
        rows = [*(row for row in self.rows if _key(row) not in told), *newer.rows]
        left_out = [*(row for row in self.left_out if _key(row) not in told), *newer.left_out]
        runs = self.runs | newer.runs
        used = {row["run"] for row in [*rows, *left_out]}
        return Results(
            {name: runs[name] for name in sorted(used)},
            sorted(rows, key=_order),
            sorted(left_out, key=_order),
        )

    def dump(self) -> str:
        """JSON with one line per run and row, so that differences can be read."""

        def block(lines: Iterable[str]) -> str:
            return ",\n".join(f"  {line}" for line in lines)

        runs = block(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in self.runs.items())
        rows, left_out = block(map(json.dumps, self.rows)), block(map(json.dumps, self.left_out))
        return f'{{"runs": {{\n{runs}\n}},\n"rows": [\n{rows}\n],\n"left_out": [\n{left_out}\n]}}\n'


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[field]) for field in KEY)


def _order(row: Row) -> tuple[Any, ...]:
    return (row["family"], row["op"], row["mode"], row["dtype"], row["shape"], row["threads"],
            row.get("p50_ms", 0.0), row["provider"])  # fmt: skip


def read(path: Path) -> dict[tuple[str, str], Results]:
    """The rows of one pytest-benchmark file, by machine and family."""
    raw = json.loads(path.read_text())
    run = {field: raw["machine_info"].get(field) for field in RUN_FIELDS}
    rows: dict[str, list[Row]] = defaultdict(list)
    left_out: dict[str, list[Row]] = defaultdict(list)
    for benchmark in raw["benchmarks"]:
        info = benchmark["extra_info"]
        row = {k: v for k, v in info.items() if k not in RUN_FIELDS or k == "threads"}
        rows[info["family"]].append(row | {"run": run["time"]})
    for row in raw.get("left_out", []):
        left_out[row["family"]].append(row | {"threads": run["threads"], "run": run["time"]})
    return {
        (run["machine"], family): Results({run["time"]: run}, rows[family], left_out[family])
        for family in sorted({*rows, *left_out})
    }


def markdown(machine: str, family: str, results: Results, pictures: Sequence[str]) -> str:
    """The report as text."""
    parts = [
        f"# {family} on {machine}",
        "\n".join(_runs(results.runs)),
        FAMILIES[family].about,
        "## Targets\n\n" + "\n".join(target_lines(verdicts(results.rows, machine))),
        *(f"![{name}]({name})" for name in pictures),
        *_tables(results.rows, len(results.runs) > 1),
        "## Not timed\n\n" + "\n".join(_left_out(results.left_out)),
    ]
    return "\n\n".join(parts) + "\n"


def _runs(runs: dict[str, Row]) -> Iterator[str]:
    for name, run in runs.items():
        peers = ", ".join(f"{peer} {version}" for peer, version in (run["peers"] or {}).items())
        gpu = f"{run['gpu']}, driver {run['driver']}, CUDA {run['cuda']}; " if run["gpu"] else ""
        yield (
            f"- Run {name}: {gpu}{run['cpu']}, {run['cores']} cores, {run['threads']} threads, "
            f"{run['cpu_capability']}, load before {run['load']}; torch {run['torch']}, "
            f"Triton {run['triton']}, trimtab {run['trimtab']} at {run['commit']}; "
            f"{peers or 'no peers'}."
        )


def target_lines(found: Sequence[Verdict]) -> Iterator[str]:
    """One table row per target and a last line that counts them."""
    if not found:
        yield "No target is set for this machine."
        return
    yield "| case | quantity | must be at most | measured | |"
    yield "|---|---|---|---|---|"
    for target, provider, value in found:
        shape = "x".join(map(str, target.shape))
        met = {True: "met", False: "**not met**", None: "not measured"}[
            Verdict(target, provider, value).met
        ]
        by = f" ({provider})" if provider else ""
        shown = "" if value is None else f"{value:.3g}"
        yield (
            f"| {target.op} {target.mode} {target.dtype} {shape}{by} | {target.quantity} "
            f"| {target.limit:.3g} | {shown} | {met} |"
        )
    count = [verdict.met for verdict in found].count
    yield ""
    yield f"{count(True)} met, {count(False)} not met, {count(None)} not measured."


def _tables(rows: Sequence[Row], several_runs: bool) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["op"], row["mode"], row["dtype"]].append(row)
    for (op, mode, dtype), group in groups.items():
        family = FAMILIES[group[0]["family"]]
        rate = family.rate_for(op)
        columns = [
            " x ".join(family.axes_for(op)), "provider", "ms (p20 to p80)", "x floor",
            rate.heading, "extra MiB", "error", "rounds", *(["run"] if several_runs else []),
        ]  # fmt: skip
        words = family.modes.get(mode, mode)
        lines = [
            f"## {op}, {mode}, {dtype}\n\n{words[:1].upper()}{words[1:]}.\n",
            "| " + " | ".join(columns) + " |",
            "|---" * len(columns) + "|",
        ]
        lines += [_line(row, rate) + (f" {row['run']} |" if several_runs else "") for row in group]
        notes = [f"- {row['provider']}, {_shape(row)}: {row['note']}" for row in group
                 if row.get("note")]  # fmt: skip
        yield "\n".join(lines + (["", *notes] if notes else []))


def _shape(row: Row) -> str:
    return " x ".join(map(str, row["shape"]))


def _line(row: Row, rate: Rate) -> str:
    ms = f"{row['p50_ms']:.4g} ({row['p20_ms']:.4g} to {row['p80_ms']:.4g})"
    cells = [
        _shape(row), row["provider"], ms, _number(row["over_floor"], ".2f"),
        _number(row.get(rate.field) or None, rate.how), _number(row["extra_mib"], ".1f"),
        _number(row["max_err"], ".1e"), f"{row['rounds']} ({row['timing']})",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _left_out(rows: Sequence[Row]) -> Iterator[str]:
    """Provider, reason and the modes it holds for."""
    if not rows:
        yield "Everybody took part everywhere."
    groups: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in rows:
        groups[row["provider"], row["status"], row["reason"]].add(f"{row['mode']} {row['dtype']}")
    for (provider, status, reason), cases in sorted(groups.items()):
        yield f"- {provider}, {status}: {reason} ({', '.join(sorted(cases))})"


def write(folder: Path, machine: str, family: str, newer: Results) -> str:
    """Merge with what is there, write rows, report and pictures; returns the report."""
    import figures

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family}.json"
    results = Results.load(path).merge(newer)
    path.write_text(results.dump())
    pictures = figures.draw(results.rows, folder, family, machine)
    text = markdown(machine, family, results, [picture.name for picture in pictures])
    (folder / f"{family}.md").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    for path in options.files:
        for (machine, family), results in read(path).items():
            quick = any(run["quick"] for run in results.runs.values())
            if quick:
                print(*_tables(results.rows, False), sep="\n\n")
                print(
                    "", *_left_out(results.left_out), "", "A quick run: nothing is kept.", sep="\n"
                )
                continue
            write(options.out / machine, machine, family, results)
            print(f"# {family} on {machine}\n")
            print("\n".join(target_lines(verdicts(results.rows, machine))))
            print(f"\nrows, tables and pictures: {_shown(options.out / machine)}/{family}.*")
    return 0


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    raise SystemExit(main())
