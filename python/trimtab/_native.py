"""Loads the compiled libraries, each on its own, and keeps the reason when one can't be had."""

from __future__ import annotations

from pathlib import Path

import torch

from trimtab import _schemas  # noqa: F401  (the kernels register against these schemas)

_FOLDER = Path(__file__).parent


def _load(name: str, how_to_build: str) -> str | None:
    path = _FOLDER / name
    if not path.exists():
        return f"not built: this install has no {name}; {how_to_build}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = error.__cause__ or error
        return f"not loaded: {name} does not load with torch {torch.__version__}: {cause}"
    return None


REASONS: dict[str, str | None] = {
    "cpu": _load("_cpu.so", "with g++ present, `pip install --no-build-isolation .` builds it"),
    "cuda": _load("_cuda.so", "with nvcc and a CUDA torch, `TRIMTAB_BUILD=cuda pip install "
                  "--no-build-isolation .` builds it"),
}  # fmt: skip
"""Device type -> why its library is missing, or None when it is loaded."""
