"""Builds the wheel of this machine and tries it in new environments, each with another torch.

    python tests/try_wheel.py torch==2.10.0 torch==2.14.1

A wheel with CUDA kernels comes out where torch and nvcc are for CUDA; see setup.py. The tests run
against the installed package, from a folder that has no other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST, ROOMS = ROOT / "dist", ROOT / "build" / "wheel"
# Those that need nothing but torch; what needs a compiler is another's job.
FILES = (
    "token_loss", "token_loss_contract", "token_loss_torch", "contrast", "contrast_filters",
    "contrast_sampling", "contrast_torch", "philox", "orthogonal", "orthogonal_contract",
    "project_out", "doctor",
)  # fmt: skip
NEEDED = ("numpy", "expecttest", "hypothesis", "pytest", "pytest-timeout")


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def build() -> Path:
    shutil.rmtree(DIST, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", DIST, ROOT)
    (wheel,) = DIST.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    print(f"{wheel.name}: {', '.join(libraries) or 'no compiled library'}")
    return wheel


def pins() -> list[str]:
    """What the tests need, at the project's pins."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in NEEDED]


def environment(wheel: Path, torch: str) -> Path:
    """A folder with an environment of its own and the tests, without the sources."""
    room = ROOMS / torch.replace("==", "-")
    shutil.rmtree(room, ignore_errors=True)
    run(sys.executable, "-m", "venv", room / "venv")
    run(room / "venv" / "bin" / "pip", "install", "-qq", torch, *pins(), wheel)
    shutil.copytree(ROOT / "tests", room / "tests")
    shutil.copy(ROOT / "pyproject.toml", room)
    return room


def try_out(wheel: Path, torch: str) -> None:
    room = environment(wheel, torch)
    python = room / "venv" / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = "import torch, trimtab; print(torch.__version__, trimtab.__file__)"
    run(python, "-c", where, cwd=room, env=clean)
    run(python, "-m", "trimtab", "doctor", cwd=room, env=clean, stdout=subprocess.DEVNULL)
    tests = [f"tests/test_{name}.py" for name in FILES]
    run(python, "-m", "pytest", "-k", "not triton and not cuda_on_cpu", *tests, cwd=room, env=clean)


if __name__ == "__main__":
    made = build()
    for asked in sys.argv[1:]:
        try_out(made, asked)
