"""Every Python snippet of the README runs, each by itself, as a reader would paste it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def snippets(text: str) -> list[tuple[int, str]]:
    """Line and source of each block marked ``python``."""
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n") + 1, block[1]) for block in blocks]


def run_snippet(line: int, source: str, folder: Path) -> subprocess.CompletedProcess:
    # Empty lines before it, so that a traceback names the README's line.
    path = folder / "README.md"
    path.write_text("\n" * (line - 1) + source)
    return subprocess.run(
        [sys.executable, str(path)], cwd=folder, capture_output=True, text=True, timeout=240
    )


def readme_snippets() -> list:
    if not README.exists():
        return [pytest.param(0, "", marks=pytest.mark.skip(reason="there is no README.md yet"))]
    return [pytest.param(*block, id=f"line-{block[0]}") for block in snippets(README.read_text())]


@pytest.mark.parametrize(("line", "source"), readme_snippets())
def test_a_snippet_runs(line, source, tmp_path):
    result = run_snippet(line, source, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_readme_has_snippets():
    if not README.exists():
        pytest.skip("there is no README.md yet")
    assert snippets(README.read_text())


def test_snippets_are_found_and_a_broken_one_fails(tmp_path):
    text = "# Title\n```python\nx = 1\n```\ntext\n```bash\nfalse\n```\n```python\nprint(x)\n```\n"
    found = snippets(text)
    assert found == [(3, "x = 1\n"), (10, "print(x)\n")]
    assert run_snippet(*found[0], tmp_path).returncode == 0
    broken = run_snippet(*found[1], tmp_path)
    assert broken.returncode != 0
    assert "line 10" in broken.stderr
