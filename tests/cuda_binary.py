"""CUDA sources compiled as ``setup.py`` does, for GPUs that are not there, and what came out."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import setuptools
import torch

from cuda_on_cpu.cache import ROOT, build_once

BUILT = ROOT / "build" / "cuda"
ACCESSES = {
    "load": r"\bLDG\.\S*\b128\b",
    "store": r"\bSTG\.\S*\b128\b",
    "copy": r"\bLDGSTS\.\S*\b128\b|\bUBLKCP\b",
    "spilled": r"\b(?:LDL|STL)\b",
    "tensor products": r"\b(?:HMMA|HGMMA)\b",
    "cluster": r"\bUCGABAR_(?:ARV|WAIT)\b",
}
GLOBAL = r"\b(?:LDG|STG|LD|ST|LDGSTS|UBLKCP|ATOMG?|REDG?)\.\S"
WAIT_FOR_PREVIOUS_KERNEL = "ACQBULK"


@cache
def setup_functions() -> dict[str, Any]:
    """What setup.py defines, without running it."""
    with (
        mock.patch.object(setuptools, "setup"),
        mock.patch.object(sys, "argv", ["setup.py", "egg_info"]),
    ):
        return runpy.run_path(str(ROOT / "setup.py"))


@cache
def nvcc() -> tuple[str, str]:
    """Path and release."""
    build = setup_functions()
    try:
        return build["find_nvcc"]()
    except build["Unavailable"] as reason:
        pytest.skip(str(reason))


@cache
def cuobjdump() -> str:
    """It comes with the CUDA toolkit, and with Triton."""
    places = [str(Path(nvcc()[0]).with_name("cuobjdump")), "cuobjdump"]
    triton = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin"
    found = next(filter(None, map(shutil.which, [*places, str(triton / "cuobjdump")])), None)
    if found is None or shutil.which("c++filt") is None:
        pytest.skip("cuobjdump or c++filt, which read kernels, are not installed")
    return found


@cache
def compile_object(source: Path) -> Path:
    """The object file of a CUDA source, for every architecture that a wheel holds."""
    build = setup_functions()
    path, release = nvcc()
    try:
        compiler, version = build["find_compiler"]()
        gencode = build["gencode_flags"](build["DEFAULT_ARCHS"], release)
    except build["Unavailable"] as reason:
        pytest.skip(str(reason))
    command = build["nvcc_command"](path, compiler, gencode, build["find_torch"]()[0])
    command += build["own_nvcc_flags"](source)
    made_by = json.dumps([command, release, version, torch.__version__])

    def make(target: Path, listing: Path) -> None:
        tests = [f"-I{ROOT / 'tests'}"] if source.is_relative_to(ROOT / "tests") else []
        output = [*tests, "-MMD", "-MF", str(listing), "-c", str(source), "-o", str(target)]
        result = subprocess.run([*command, *output], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-5000:]
        assert "warning" not in result.stderr, result.stderr[-5000:]

    return build_once(BUILT, source.stem, made_by, ".o", make)


Measured = dict[str, dict[str, dict[str, int]]]  # kernel, architecture, what -> how much


@cache
def measure(path: Path) -> Measured:
    """Registers, memory and accesses of each kernel in an object file."""
    kernels: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for arch, name, body in functions(_dump(path, "-res-usage"), r"^ Function (\S+):\n"):
        if name == "architecture_probe":
            continue
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", body)}
        # From Hopper on each block has 1 KB that is the system's.
        system = 0 if arch.startswith("sm_8") else min(used["SHARED"], 1024)
        kernels[name][arch] = {
            "registers": used["REG"],
            "stack": used["STACK"] + used["LOCAL"],
            "static_shared": used["SHARED"] - system,
        }
    for arch, name, body in functions(_dump(path, "-sass"), r"^\s+Function : (\S+)\n"):
        if name in kernels:
            counts = {what: len(re.findall(code, body)) for what, code in ACCESSES.items()}
            before, waits, _ = body.partition(WAIT_FOR_PREVIOUS_KERNEL)
            counts["waits"] = len(waits) > 0
            counts["before the wait"] = len(re.findall(GLOBAL, before)) if waits else 0
            kernels[name][arch].update(counts)
    return dict(kernels)


def architectures(path: Path) -> dict[str, list[str]]:
    """Architectures of the machine code and of the PTX in a file."""
    return {
        kind: re.findall(rf"^{title} file .*\.(sm_\w+)\.", _dump(path, option), flags=re.M)
        for kind, title, option in (("code", "ELF", "-lelf"), ("ptx", "PTX", "-lptx"))
    }


def functions(listing: str, heading: str) -> list[tuple[str, str, str]]:
    """Architecture, readable name and text of each function in a listing of cuobjdump."""
    found = []
    for part in re.split(r"^arch = ", listing, flags=re.M)[1:]:
        arch = part.split(None, 1)[0].rstrip("f")
        pieces = re.split(heading, part, flags=re.M)
        found += [(arch, *pair) for pair in zip(pieces[1::2], pieces[2::2], strict=True)]
    mangled = "\n".join(name for _, name, _ in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True)
    readable = map(short_name, names.stdout.splitlines())
    return [(arch, name, text) for (arch, _, text), name in zip(found, readable, strict=True)]


def short_name(name: str) -> str:
    """Without namespaces, return type and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|trimtab::|\b\w+::(?=\w)", "", name)
    depth = 0
    for place in reversed(range(len(name))):
        depth += {")": 1, "(": -1}.get(name[place], 0)
        if depth == 0 and name[place] == "(":
            name = name[:place]
            break
    return re.sub(r"^void ", "", re.sub(r"\((?:bool|int|unsigned int)\)", "", name))


@cache
def _dump(path: Path, option: str) -> str:
    command = [cuobjdump(), option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
