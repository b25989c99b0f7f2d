"""Rules of the house that no linter knows: sizes, words, and what a machine leaves behind."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".inl")
FOLDERS = ("python", "triton_kernels", "csrc", "bench", "tests")
TEXTS = ("*.md", "Makefile", "pyproject.toml", "requirements-dev.txt", ".ci/run", "docs/*.md")

# A reader of the program's output sees these files; the others report through their results.
MAY_PRINT = ("demo", "bench", "doctor.py", "__main__.py", "setup.py", "tests")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|WIP|placeholder)\b")
ANCHOR = re.compile(r"#\d+|\bv?\d+\.\d+")
MACHINE = re.compile(
    r"(?<![\w.~-])/(?:home|Users|root|work|opt|tmp|mnt|scratch)/|\b(?:10|192\.168)(?:\.\d{1,3}){2,3}:\d"
)


def sources() -> list[Path]:
    """The files of code in this tree."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files = [path for path in found if path.suffix in SUFFIXES and path.is_file()]
    return [ROOT / "setup.py", *sorted(files)]


def texts() -> list[Path]:
    return [path for pattern in TEXTS for path in sorted(ROOT.glob(pattern))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def long_functions(source: str) -> dict[str, int]:
    """Lines of code of each function that has too many: signature and docstring do not count."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            first = body[0].lineno if body else node.end_lineno
            lengths[f"{node.name}:{node.lineno}"] = node.end_lineno - first + 1
    return {name: count for name, count in lengths.items() if count > MAX_FUNCTION_LINES}


def unanchored(text: str) -> list[str]:
    """Lines that leave something open without an issue or version that would close it."""
    return [
        line for line in text.splitlines() if UNFINISHED.search(line) and not ANCHOR.search(line)
    ]


def prints(source: str) -> list[int]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def machine_traces(text: str) -> list[str]:
    return [line for line in text.splitlines() if MACHINE.search(line)]


def test_there_is_something_to_guard():
    names = [name_of(path) for path in sources()]
    assert "python/trimtab/__init__.py" in names
    assert len(names) > 20


def offenders(paths: list[Path], find: Callable[[str], Any]) -> dict[str, Any]:
    """File -> what is wrong with it, for those where something is. This file names what it bans."""
    found = {name_of(path): find(path.read_text()) for path in paths if path != Path(__file__)}
    return {name: wrong for name, wrong in found.items() if wrong}


def python_sources() -> list[Path]:
    return [path for path in sources() if path.suffix == ".py"]


def test_files_are_short():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in sources()}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_fit_a_screen():
    assert offenders(python_sources(), long_functions) == {}


def test_only_programs_print():
    silent = [p for p in python_sources() if not set(MAY_PRINT) & set(p.relative_to(ROOT).parts)]
    assert offenders(silent, prints) == {}


def test_nothing_is_left_open():
    assert offenders([*sources(), *texts()], unanchored) == {}


def test_no_trace_of_a_machine():
    assert offenders([*sources(), *texts()], machine_traces) == {}


def test_built_files_are_not_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    built = (".so", ".o", ".pyc", "_build_info.json", ".egg-info")
    assert [name for name in listed.stdout.splitlines() if name.endswith(built)] == []


def test_the_guards_see_what_they_guard_against():
    function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions(function) == {}
    assert long_functions(function + "    x = 1\n") == {"f:1": MAX_FUNCTION_LINES + 1}
    assert unanchored("# TODO: later\n# TODO(#12): later") == ["# TODO: later"]
    assert prints("if True:\n    print(1)") == [2]
    assert machine_traces("data = '/home/me/data'\ndata = 'a/work/b'") == ["data = '/home/me/data'"]
