"""``make gpu``: the order of its steps, its clock, its memory of what has passed, a rehearsal."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    gpu, gpu_small = (importlib.import_module(name) for name in ("gpu", "gpu_small"))
finally:
    sys.path.remove(str(ROOT / "bench"))


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Any:
    """A run of made-up steps in a folder of its own, as ``fake(steps) -> exit status``."""
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "fingerprint", lambda: "sources")

    def run(*steps: Any, minutes: float = 1.0) -> int:
        monkeypatch.setattr(gpu, "steps", lambda *_, **__: iter(steps))
        return gpu.main(["--dry-run", f"--minutes={minutes}"])

    return run


def python(name: str, program: str, seconds: float = 30.0) -> Any:
    return gpu.Step(name, [sys.executable, "-c", program], seconds)


def test_what_has_passed_is_not_run_again(fake, tmp_path, monkeypatch, capsys):
    count = f"p = r'{tmp_path}/count'; open(p, 'a').write('x')"
    broken = python("second", "raise SystemExit('out of memory')")
    assert fake(python("first", count), broken) == 1
    assert "failed (1)" in capsys.readouterr().out
    assert (tmp_path / "second.log").read_text().endswith("out of memory\n")
    assert fake(python("first", count), python("second", "print('well')")) == 0
    assert (tmp_path / "count").read_text() == "x"
    assert capsys.readouterr().out.splitlines()[0].endswith("well")
    monkeypatch.setattr(gpu, "fingerprint", lambda: "other sources")
    assert fake(python("first", count)) == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_no_step_takes_more_than_its_time_or_what_is_left(fake, tmp_path, capsys):
    forever = "import time; time.sleep(60)"
    assert fake(python("slow", forever, seconds=0.5), python("next", "")) == 1
    steps = json.loads((tmp_path / "dry.json").read_text())["steps"]
    assert steps["slow"]["status"].startswith("broken off")
    assert steps["next"]["status"] == "passed"
    assert fake(python("slow", forever), python("late", ""), minutes=6 / 60) == 1
    steps = json.loads((tmp_path / "dry.json").read_text())["steps"]
    assert steps["late"]["status"] == "not run: no time left"


def test_without_a_build_nothing_is_run(fake, tmp_path):
    assert fake(python("build", "raise SystemExit(3)"), python("next", "")) == 1
    assert "next" not in json.loads((tmp_path / "dry.json").read_text())["steps"]


def test_a_missing_tool_is_named(fake, capsys):
    assert fake(gpu.Step("memcheck", ["no-such-tool-here"], 5.0)) == 1
    assert "not run: no no-such-tool-here here" in capsys.readouterr().out


def test_the_steps_fit_the_time_and_name_what_exists():
    found = list(gpu.steps(gpu.FAMILIES, dry=False, remaining=528))
    assert len({step.name for step in found}) == len(found)
    for step in found:
        files = [word for word in step.command if word.endswith(".py")]
        assert all((ROOT / name).is_file() for name in files), step.name
    for family in gpu.FAMILIES:
        names = [step.name for step in found if step.name.endswith(family)]
        kinds = [name.removesuffix(f"-{family}") for name in names]
        assert kinds == ["small", "test", "bench", "report", "memcheck", "racecheck"]
    one = list(gpu.steps(["contrast"], dry=False, remaining=528))
    assert {step.name.partition("-")[2] for step in one} == {"", "contrast"}


def test_it_says_what_it_needs(tmp_path):
    command = [sys.executable, "bench/gpu.py"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=hidden)
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stdout
    done = subprocess.run([*command, "speed"], cwd=ROOT, capture_output=True, text=True)
    assert "FAMILY must be of token_loss, contrast, orthogonal, got speed" in done.stderr


@pytest.mark.timeout(300)
def test_a_rehearsal_of_one_family(monkeypatch, tmp_path):
    """Every step on the CPU, but for the build, which takes the installed package's place."""
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    every = gpu.steps
    monkeypatch.setattr(
        gpu, "steps", lambda *a, **k: (s for s in every(*a, **k) if s.name != "build")
    )
    status = gpu.main(["contrast", "--dry-run", "--minutes=5"])
    logs = {path.stem: path.read_text()[-2000:] for path in tmp_path.glob("*.log")}
    assert status == 0, logs
    assert "agree with the oracle" in logs["memcheck-contrast"]
    assert "A quick run" in logs["report-contrast"]


@pytest.mark.parametrize("family", gpu_small.FAMILIES)
def test_a_result_that_is_not_written_is_noticed(family, monkeypatch):
    name, run = next(iter(gpu_small.FAMILIES[family]()))
    expected = run("reference")
    wrong = [t.clone() for t in expected]
    wrong[-1].fill_(float("nan") if wrong[-1].dtype.is_floating_point else -7)
    with pytest.raises((SystemExit, AssertionError), match=f"result {len(wrong) - 1}"):
        gpu_small.compare(name, wrong, expected)
    gpu_small.compare(name, run("native"), expected)


def test_a_suite_begins_no_case_when_its_time_is_over():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_orthogonal.py", "--quick", "-k", "l1-float32",
         "-p", "no:cacheprovider", "--stop-after=0", "-rs"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "no time was left (--stop-after)" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
