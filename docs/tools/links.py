"""Hooks of the site: links that leave ``docs/`` for files of the tree lead to pages of the site.

The pages are read on a code host too, so they link to the tree. Reports and pictures of
``bench/results/`` become pages of the site; the project's own texts have theirs.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "bench/results/"
# File of the tree -> page of the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md",
         "CHANGELOG.md": "changelog.md"}  # fmt: skip
_LINK = re.compile(r"(\]\()((?!https?:|#|mailto:)[^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """The reports and pictures of the results join the site."""
    for path in results():
        files.append(
            File.generated(
                config, site_path(path), abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV
            )
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Relative links to files of the tree become links within the site."""
    if page.file.src_uri.startswith("results/"):
        return markdown
    return rewrite(markdown, page.file.src_uri)


def results() -> Iterator[Path]:
    """Reports and pictures of all machines."""
    folder = ROOT / RESULTS
    yield from sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".svg"))


def site_path(path: Path) -> str:
    """Where a file of the results stands in the site."""
    return "results/" + path.relative_to(ROOT / RESULTS).as_posix()


def rewrite(markdown: str, page: str) -> str:
    """``markdown`` of the page ``docs/<page>`` with its links out of ``docs/`` led back in."""
    folder = posixpath.dirname(page)

    def led_back(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[2]))
        if target.startswith("docs/"):
            return match[0]
        inside = PAGES.get(target) or target.replace(RESULTS, "results/", 1)
        return match[1] + posixpath.relpath(inside, folder or ".")

    return _LINK.sub(led_back, markdown)
