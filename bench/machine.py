"""What a measurement was made on, without the names of hosts or folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PEERS = (
    "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "transformers", "flashinfer-python", "vllm",
)  # fmt: skip
_NOISE = re.compile(
    r"\((r|tm|c)\)|@.*|\b(nvidia|geforce|intel|amd|cpu|processor|\d+-core|with .*)\b", re.IGNORECASE
)


def slug(name: str) -> str:
    """A model's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", _NOISE.sub(" ", name.lower())).strip("-") or "unknown"


def machine_name(cpu_model: str, cores: int, flags: set[str], gpu: str | None) -> str:
    """The GPU's name, or the CPU's with what decides its speed: ``xeon-2core-avx512-amx``."""
    if gpu is not None:
        return slug(gpu)
    vector = next((isa for flag, isa in _VECTOR.items() if flag in flags), None)
    matrix = "amx" if "amx_tile" in flags else None
    return "-".join(part for part in (slug(cpu_model), f"{cores}core", vector, matrix) if part)


_VECTOR = {"avx512f": "avx512", "avx2": "avx2", "sve": "sve", "asimd": "neon"}


def header() -> dict[str, Any]:
    """Machine, software, commit and time of this run."""
    model, flags = _cpu()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "machine": machine_name(model, cores, flags, gpu),
        "cpu": model,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "trimtab": version("trimtab"),
        "peers": {name: version(name) for name in PEERS if version(name)},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load": round(os.getloadavg()[0], 2),
    }


def version(package: str) -> str | None:
    """The installed version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash, ``+dirty`` if anything but results differs; "unknown" outside a checkout.

    ``TRIMTAB_COMMIT`` says it for a copy of a checkout.
    """
    if said := os.environ.get("TRIMTAB_COMMIT"):
        return said
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return head + ("+dirty" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        model.group(1).strip() if model else platform.machine(),
        set(flags.group(1).split()) if flags else set(),
    )


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
