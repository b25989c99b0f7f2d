"""Tables and pictures of what was measured, from the rows of ``bench/results/``.

    python docs/measured.py [--check]

Between ``<!-- rows: op=OP modes=A,B -->`` and ``<!-- end -->`` of a page stands what the rows of
one operator say, and between ``<!-- targets: family=FAMILY -->`` and ``<!-- end -->`` which targets
are met. The pictures go to ``docs/figures/``. With ``--check`` nothing is written: the status is 1
where something is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "bench"))

from families import FAMILIES  # noqa: E402
from figures import at_one_shape, draw_op, measured, ours_first  # noqa: E402
from report import RESULTS, Results, target_lines  # noqa: E402
from targets import Row, verdicts  # noqa: E402

BLOCK = re.compile(r"(<!-- (rows|targets): (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


class Measured:
    """The rows of one operator on one machine, of some modes, each at one shape."""

    def __init__(self, path: Path, op: str, modes: Sequence[str]) -> None:
        self.op, self.machine, self.family = op, path.parent.name, path.stem
        results = Results.load(path)
        of_op = [row for row in results.rows if row["op"] == op]
        self.rows = [row for mode in modes for row in at_one_shape(of_op) if row["mode"] == mode]
        self.runs = [results.runs[name] for name in sorted({row["run"] for row in self.rows})]

    @property
    def picture(self) -> str:
        """Its name in ``docs/figures/``."""
        return f"{self.op}-{self.machine}.svg"

    def draw(self, folder: Path) -> Path:
        """Write the picture."""
        draw_op(self.rows, f"{self.op} on {self.machine}", folder / self.picture)
        return folder / self.picture

    def markdown(self, modes: Sequence[str]) -> Iterator[str]:
        """The machine, the picture and a table for each mode."""
        torch = ", ".join(dict.fromkeys(f"torch {run['torch']}" for run in self.runs))
        run = self.runs[0]
        rows = f"../../bench/results/{self.machine}/{self.family}.md"
        yield (
            f"On {run['gpu'] or run['cpu']} with {run['threads']} threads, {torch}; medians. "
            f"[All rows and the conditions]({rows})."
        )
        yield f"![Time and memory of {self.op}](../figures/{self.picture})"
        for mode in modes:
            yield from self._table(mode)

    def _table(self, mode: str) -> Iterator[str]:
        rows = [row for row in self.rows if row["mode"] == mode]
        if not rows:
            return
        family = FAMILIES[self.family]
        axes, sizes = family.axes_for(self.op), map(str, rows[0]["shape"])
        dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
        heads = [head for dtype in dtypes for head in (f"{dtype}, ms", "extra MiB")]
        by = {(row["provider"], row["dtype"]): row for row in rows}
        providers = dict.fromkeys(row["provider"] for row in sorted(rows, key=ours_first))
        lines = [f"| `{mode}` | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for provider in providers:
            cells = [cell for dtype in dtypes for cell in _cells(by.get((provider, dtype)))]
            lines.append(f"| {provider} | " + " | ".join(cells) + " |")
        yield f"`{mode}`: {family.modes.get(mode, mode)}; {' x '.join(axes)} = {' x '.join(sizes)}."
        yield "\n".join(lines)


def _cells(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return measured(row["p50_ms"]), "" if row["extra_mib"] is None else measured(row["extra_mib"])


def of_op(op: str, modes: Sequence[str], results: Path) -> list[Measured]:
    """What each machine's rows say of an operator, in the order of the machines' names."""
    found = [Measured(path, op, modes) for path in sorted(results.glob("*/*.json"))]
    return [measurement for measurement in found if measurement.rows]


def block(kind: str, options: str, results: Path = RESULTS) -> str:
    """What stands between two markers."""
    given = dict(option.split("=", 1) for option in options.split())
    if kind == "targets":
        parts = [part for path in sorted(results.glob(f"*/{given['family']}.json"))
                 for part in _targets(path)]  # fmt: skip
    else:
        modes = given["modes"].split(",")
        parts = [part for measurement in of_op(given["op"], modes, results)
                 for part in measurement.markdown(modes)]  # fmt: skip
    return "\n\n".join(parts or ["Not measured."]) + "\n"


def _targets(path: Path) -> Iterator[str]:
    machine, family = path.parent.name, path.stem
    found = [v for v in verdicts(Results.load(path).rows, machine) if v.target.family == family]
    yield f"Targets on [{machine}](../bench/results/{machine}/{family}.md):"
    yield "\n".join(target_lines(found))
    for picture in sorted(path.parent.glob(f"{family}-*.svg")):
        yield f"![{picture.stem} on {machine}](../bench/results/{machine}/{picture.name})"


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with its blocks made anew."""
    return BLOCK.sub(lambda m: m[1] + "\n" + block(m[2], m[3], results) + "\n" + m[5], text)


def pictures(text: str, results: Path = RESULTS) -> Iterator[Measured]:
    """The pictures that a page's blocks show."""
    for _, kind, options, _, _ in BLOCK.findall(text):
        if kind == "rows":
            given = dict(option.split("=", 1) for option in options.split())
            yield from of_op(given["op"], given["modes"].split(","), results)


def texts_of(picture: Path) -> list[str]:
    """The words and numbers in a picture; none where it is missing."""
    if not picture.exists():
        return []
    return re.findall(r"<text[^>]*>\s*(.*?)\s*</text>", picture.read_text(), flags=re.DOTALL)


def pages() -> list[Path]:
    """The pages of the site."""
    return sorted(DOCS.rglob("*.md"))


def refresh(page: Path, write: bool) -> Iterator[str]:
    """Names what is out of date of a page, and makes it anew if asked to.

    A picture is out of date when its words or numbers are: its curves differ in the last digit
    between machines.
    """
    text = page.read_text()
    wanted = filled(text)
    if text != wanted:
        yield page.name
        if write:
            page.write_text(wanted)
    for picture in pictures(wanted):
        with tempfile.TemporaryDirectory() as folder:
            drawn, kept = picture.draw(Path(folder)), DOCS / "figures" / picture.picture
            if texts_of(drawn) != texts_of(kept):
                yield picture.picture
                if write:
                    kept.parent.mkdir(exist_ok=True)
                    kept.write_text(drawn.read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    check = parser.parse_args(arguments).check
    stale = [name for page in pages() for name in refresh(page, write=not check)]
    if check and stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run python docs/measured.py\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
