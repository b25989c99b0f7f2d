"""What ``make gpu`` runs: build, tests, benchmarks and a memory checker on a CUDA device.

    python bench/gpu.py [FAMILY ...] [--minutes 9] [--dry-run]

One step after the other, the ones that decide most first, none beyond the time. What each prints
goes to ``build/gpu/<step>.log``; rows of a family are in ``bench/results/`` as soon as its suite
has ended. A step that has passed with these very sources is not run again, so that a run that was
broken off goes on. ``--dry-run`` takes every step on a CPU, with little of each.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
PACKAGE = FOLDER / "package"
FAMILIES = ("token_loss", "contrast", "orthogonal")
SOURCES = ("csrc", "python", "triton_kernels", "bench", "tests", "setup.py", "pyproject.toml")


class Step(NamedTuple):
    """One command, and the most seconds it may take."""

    name: str
    command: list[str]
    seconds: float
    variables: Mapping[str, str] = MappingProxyType({})


def steps(families: Sequence[str], *, dry: bool, remaining: float) -> Iterator[Step]:
    """The steps in their order: a family's tests before its rows, the memory checker last."""
    python = sys.executable
    build = [python, "-m", "pip", "install", "-qq", "--upgrade", "--no-deps",
             "--no-build-isolation", "--target", str(PACKAGE), "."]  # fmt: skip
    yield Step("build", build, 240, {"TRIMTAB_BUILD": "native" if dry else "cuda"})
    for family in families:
        yield Step(f"small-{family}", [python, "bench/gpu_small.py", family], 60)
    for family in families:
        yield Step(f"test-{family}", [python, *_tests(family, dry)], 120)
    share = max(60.0, 0.4 * remaining / max(1, len(families)))
    for family in families:
        rows = str(FOLDER / f"{family}.json")
        bench = [
            python, "-m", "pytest", "--timeout=0", f"bench/bench_{family}.py",
            f"--benchmark-json={rows}", "--benchmark-quiet", f"--stop-after={0.8 * share:.0f}",
        ]  # fmt: skip
        if dry:
            bench += ["--quick", "-k", _QUICK[family]]
        yield Step(f"bench-{family}", bench, share)
        yield Step(f"report-{family}", [python, "bench/report.py", rows], 60)
    checker = [] if dry else ["compute-sanitizer", "--error-exitcode=9", "--print-limit=20"]
    for family in families:
        for tool in ("memcheck", "racecheck"):
            chosen = [*checker, *([] if dry else [f"--tool={tool}"])]
            small = [python, "bench/gpu_small.py", family, "--impl=native"]
            # Through torch's cache an access beyond a tensor hits another one and goes unnoticed.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            yield Step(f"{tool}-{family}", [*chosen, *small], 60, alone)


_QUICK = {
    "token_loss": "weighted-float32",
    "contrast": "greedy-float32",
    "orthogonal": "l1-float32",
}


def _tests(family: str, dry: bool) -> list[str]:
    if dry:
        return ["-m", "pytest", "-q", "--maxfail=1", "-k", "native", f"tests/test_{family}.py"]
    files = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob(f"test_*{family}*")
    )
    chosen = [f for f in files if "bench" not in f and "aot" not in f and "cuda" not in f]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return ["-m", "pytest", "-q", "-m", "gpu", "--maxfail=40", *parallel, *chosen]


def fingerprint() -> str:
    """A hash of all files that the steps depend on, and of what runs them."""
    found = hashlib.sha256(sys.version.encode())
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".toml"):
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Record:
    """Which steps have passed, kept in a file."""

    def __init__(self, path: Path, sources: str) -> None:
        self.path, self.sources = path, sources
        self.steps: dict[str, dict[str, object]] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["sources"] == sources:
                self.steps = kept["steps"]

    def passed(self, name: str) -> bool:
        """Whether there is nothing left to do."""
        return self.steps.get(name, {}).get("status") == "passed"

    def note(self, name: str, status: str, seconds: float) -> None:
        """Written at once: the next step may be the one that is broken off."""
        self.steps[name] = {"status": status, "seconds": round(seconds, 1)}
        self.path.write_text(json.dumps({"sources": self.sources, "steps": self.steps}, indent=1))


def run(step: Step, seconds: float) -> str:
    """Runs a step and says how it ended."""
    found = shutil.which(step.command[0])
    if found is None:
        return f"not run: no {step.command[0]} here"
    paths = [str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **step.variables}
    with (FOLDER / f"{step.name}.log").open("w") as log:
        log.write(" ".join(step.command) + "\n")
        log.flush()
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"broken off after {seconds:.0f} s"
    return "passed" if done.returncode == 0 else f"failed ({done.returncode})"


def last_line(name: str) -> str:
    """What a step said in the end."""
    lines = (FOLDER / f"{name}.log").read_text(errors="replace").split("\n")
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is left to do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--minutes", type=float, default=8.8, help="the time for all (default 8.8)")
    parser.add_argument("--dry-run", action="store_true", help="a little of every step, on a CPU")
    options = parser.parse_args(arguments)
    families = options.families or list(FAMILIES)
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"FAMILY must be of {', '.join(FAMILIES)}, got {', '.join(sorted(unknown))}")
    if not options.dry_run and not _sees_cuda():
        print("make gpu needs a CUDA device and a torch that sees it; --dry-run works without")
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = Record(FOLDER / ("dry.json" if options.dry_run else "steps.json"), fingerprint())
    end = time.perf_counter() + 60 * options.minutes
    wrong = 0
    for step in steps(families, dry=options.dry_run, remaining=60 * options.minutes):
        if record.passed(step.name):
            continue
        left = end - time.perf_counter()
        start = time.perf_counter()
        status = run(step, min(step.seconds, left)) if left > 5 else "not run: no time left"
        taken = time.perf_counter() - start
        record.note(step.name, status, taken)
        wrong += status != "passed"
        said = last_line(step.name) if not status.startswith("not run") else ""
        print(f"{step.name:22} {status:24} {taken:6.1f} s  {said}", flush=True)
        if step.name == "build" and status != "passed":
            break
    print(f"{wrong} steps wait" if wrong else "all steps passed", "; logs in build/gpu/", sep="")
    return 1 if wrong else 0


def _sees_cuda() -> bool:
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
