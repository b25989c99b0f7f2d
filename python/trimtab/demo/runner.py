"""Runs sections one after the other and writes the folder."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from trimtab.demo.report import as_text, machine, write_numbers, write_page
from trimtab.demo.section import FULL, QUICK, Context, Result, Section


def run(
    out: Path, sections: Sequence[Section], *, seed: int, threads: int | None, quick: bool
) -> None:
    """Runs the sections on one context; prints progress, verdicts and tables.

    Args:
        out: folder of the report, the figures and the numbers; made if it isn't there.
        sections: what to run.
        seed: of the text's split, the models and the tasks.
        threads: of torch; None leaves them as they are.
        quick: the small run.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        context = Context(out, seed, QUICK if quick else FULL)
        start = time.perf_counter()
        results = [(section, section.run(context)) for section in sections]
        context.seconds["everything"] = time.perf_counter() - start
        header = machine() | {"seed": str(seed), "size": "quick" if quick else "full"}
    finally:
        torch.set_num_threads(before)
    page = out / "report.html"
    write_page(page, results, header, context.seconds)
    write_numbers(
        out / "numbers.json",
        {
            "machine": header,
            "seconds": context.seconds,
            "sections": {section.key: result.numbers for section, result in results},
        },
    )
    for section, result in results:
        _show(section, result)
    print(f"\n{context.seconds['everything']:.0f} seconds. The report, with pictures: {page}")


def _show(section: Section, result: Result) -> None:
    print(f"\n{section.title}\n{'=' * len(section.title)}\n")
    print(as_text(result.table))
    print()
    for sentence in result.verdict:
        print(textwrap.fill(sentence, 96))
