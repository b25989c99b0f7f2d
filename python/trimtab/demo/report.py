"""One page with everything in it: `report.html`, its pictures inside, its numbers beside it."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.demo.section import (
    Block,
    Figure,
    Heading,
    Paragraph,
    Result,
    Section,
    Snippet,
    Table,
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6678; --line: #dfe4ec; --page: #ffffff;
  --card: #f6f8fb; --accent: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #9aa6b8; --line: #323a47;
  --page: #14181f; --card: #1c222c; --accent: #f0955a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .8rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { max-width: 46rem; margin: .6rem 0; }
.lead { color: var(--soft); margin-bottom: 1.4rem; }
nav { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1.2rem; margin: 1.4rem 0; }
nav ol { margin: 0; padding-left: 1.2rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.verdict { border-left: 4px solid var(--accent); background: var(--card); padding: .5rem 1.1rem;
  border-radius: 0 .6rem .6rem 0; margin: 1rem 0 1.4rem; }
.verdict p:first-child { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 .4rem; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; color: var(--soft); font-size: .9rem; padding: .4rem 0;
  max-width: 46rem; }
caption { caption-side: bottom; }
th, td { padding: .32rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; }
th.label, td.label { text-align: left; }
tbody tr:hover { background: var(--card); }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: .5rem; padding: .4rem;
  border: 1px solid var(--line); }
figure .text > div { padding: .8rem 1rem; border-radius: .5rem; border: 1px solid var(--line);
  font-size: .85rem; line-height: 1.55; overflow-x: auto; }
summary { color: var(--soft); font-size: .85rem; cursor: pointer; }
"""


def machine() -> dict[str, str]:
    """What ran this: processor, threads, versions."""
    versions = {}
    for name in ("transformers", "tokenizers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    example = torch.zeros(1, 1)
    chosen = trimtab.explain("linear_cross_entropy", example, example, torch.zeros(1).long())
    return {
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "trimtab": f"{trimtab.__version__}, linear_cross_entropy runs on {chosen.impl}",
        **versions,
    }


def write_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """Writes the numbers as JSON; what is not finite becomes null."""
    path.write_text(json.dumps(_plain(numbers), indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_page(
    path: Path,
    results: Sequence[tuple[Section, Result]],
    header: dict[str, str],
    seconds: dict[str, float],
) -> None:
    """Writes the report."""
    contents = "".join(
        f'<li><a href="#{section.key}">{html.escape(section.title)}</a></li>'
        for section, _ in results
    )
    times = [[name, f"{value:.0f}"] for name, value in seconds.items()]
    body = [
        "<h1>trimtab, tried on this machine</h1>",
        '<p class="lead">Real text, namely the documentation and the source code of the Python '
        "that ran this. Nothing was downloaded; every number on this page was measured in this "
        "run, and stands in <code>numbers.json</code> beside it.</p>",
        f'<nav aria-label="Contents"><ol>{contents}<li><a href="#machine">The machine</a></li>'
        "</ol></nav>",
        *(_section(section, result) for section, result in results),
        '<h2 id="machine">The machine</h2>',
        _table(Table("", ["", ""], [[k, v] for k, v in header.items()], labels=2)),
        _table(Table("Where the time went.", ["part", "seconds"], times)),
    ]
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>trimtab demo</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n",
        "utf-8",
    )


def as_text(table: Table) -> str:
    """The table for a terminal."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]

    def line(cells: list[str]) -> str:
        parts = (
            cell.ljust(width) if i < table.labels else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  " + "   ".join(parts).rstrip()

    rule = "  " + "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([line(table.header), rule, *map(line, table.rows)])


def _section(section: Section, result: Result) -> str:
    verdict = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in result.verdict)
    parts = [
        f'<section>\n<h2 id="{section.key}">{html.escape(section.title)}</h2>',
        f'<div class="verdict">{verdict}</div>',
        _table(result.table),
        *map(_block, result.blocks),
        "</section>",
    ]
    return "\n".join(parts)


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Heading(text):
            return f"<h3>{html.escape(text)}</h3>"
        case Table():
            return _table(block)
        case Figure(path, caption):
            return f"<figure>{_image(path)}{_caption(caption)}</figure>"
        case Snippet(snippet, caption, picture):
            folded = f"<details><summary>as a picture</summary>{_image(picture)}</details>"
            text = f'<div class="text">{snippet}</div>'
            return f"<figure>{text}{_caption(caption)}{folded}</figure>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>"


def _table(table: Table) -> str:
    head = _row("th", table.header, table.labels) if any(table.header) else ""
    rows = "".join(_row("td", row, table.labels) for row in table.rows)
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead>{head}</thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _row(tag: str, cells: Iterable[str], labels: int) -> str:
    kinds = (' class="label"' if i < labels else "" for i in count())
    parts = (
        f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
        for kind, cell in zip(kinds, cells, strict=False)
    )
    return f"<tr>{''.join(parts)}</tr>"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
