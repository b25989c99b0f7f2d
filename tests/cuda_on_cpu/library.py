"""The files of ``csrc/cuda`` compiled for the CPU, where every CUDA thread is a fibre.

``load("token_loss")`` gives the row operators of a family, checks and launches included, for CPU
tensors. What a GPU would only do wrong raises here and names kernel, block and thread: see
``machine.h``. What depends on the order of threads shows when ``schedule`` changes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cuda_on_cpu.cache import ROOT, build_once
from trimtab import _schemas  # noqa: F401  (the operators whose schemas are taken over)

BUILT = ROOT / "build" / "cuda_on_cpu"
TORCH = Path(torch.__file__).parent
NAMESPACE = "trimtab_cuda_on_cpu"
ORDERS = ("forward", "reverse", "shuffled")
# In the order of `cudaDeviceAttr` in host.h.
H200 = {
    "multiprocessors": 132,
    "shared_per_block": 227 << 10,
    "shared_per_multiprocessor": 228 << 10,
    "l2_bytes": 50 << 20,
    "major": 9,
    "minor": 0,
    "compiled_for": 90,
}
# Libraries must not share inline variables: each has a machine of its own.
COMMON = (
    "-std=c++17 -g1 -fPIC -shared -fvisibility=hidden -fno-gnu-unique -ffp-contract=off "
    "-fno-math-errno -Wall -Wextra -Wno-unknown-pragmas -DTRIMTAB_CUDA_ON_CPU "
    "-DTORCH_TARGET_VERSION=0x020a000000000000"
)
OPTIMIZE = "-O2"
SANITIZE = (
    "-O1 -fno-omit-frame-pointer -fsanitize=address -fsanitize-recover=address "
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow"
)
# The module of each family that asks for its row operators, and the files that have them.
ASKS = {"token_loss": "_chunks", "contrast": "_functions", "orthogonal": "_functions"}
FILES = {
    "token_loss": ("token_loss",),
    "contrast": ("contrast", "contrast_sample"),
    "orthogonal": ("orthogonal",),
}

_loaded: list[ctypes.CDLL] = []
_settings: dict[str, Any] = {"schedule": ("forward", 0), "device": {}}


def load(family: str, sanitize: bool = False) -> SimpleNamespace:
    """The row operators of a file.

    Args:
        family: name of a ``.cu`` file.
        sanitize: the build for AddressSanitizer, for programs of ``run_sanitized``.
    """
    return load_file(ROOT / "csrc" / "cuda" / f"{family}.cu", sanitize)


def public(family: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A family's row operators, on which its public functions run too, with ``impl="native"``."""
    files = [load(file) for file in FILES[family]]
    rows = SimpleNamespace(**{name: value for file in files for name, value in vars(file).items()})
    rows.launches = lambda: sum(file.launches() for file in files)
    module = importlib.import_module(f"trimtab.ops.{family}.{ASKS[family]}")
    before = module.row_kernels

    def row_kernels(impl: str) -> Any:
        return rows if impl == "native" else before(impl)

    monkeypatch.setattr(module, "row_kernels", row_kernels)
    return rows


def schedule(order: str, seed: int = 0) -> contextlib.AbstractContextManager[None]:
    """Inside, threads and blocks run in this order, each as far as it gets without the others."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    return _set("schedule", (order, seed))


def device(**facts: int) -> contextlib.AbstractContextManager[None]:
    """Inside, ``device_of`` describes this device: an H200 but for the facts given."""
    unknown = sorted(set(facts) - set(H200))
    if unknown:
        raise ValueError(f"a device has {', '.join(H200)}, got {', '.join(unknown)}")
    return _set("device", facts)


def run_sanitized(program: str | Path, *arguments: str, timeout: float = 250) -> str:
    """Output of a Python program in which libraries of ``sanitize=True`` can be loaded.

    An access out of bounds raises from the launch, like other errors. What the undefined behaviour
    sanitiser finds (misaligned pointers, overflow) fails here.
    """
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizers(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.run(
        [sys.executable, str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-6000:]
    assert "runtime error:" not in child.stderr, child.stderr[-6000:]
    return child.stdout


def sanitizers() -> str:
    """The runtimes that a process must have loaded before it loads a library built with them."""
    # They look for C++'s throw when they start, before Python has loaded C++.
    return " ".join(map(_compilers_own, ("libasan.so", "libubsan.so", "libstdc++.so")))


@functools.cache
def load_file(source: Path, sanitize: bool = False) -> SimpleNamespace:
    """Builds and loads one file; gives its operators, ``launches()`` and ``last_launch()``."""
    definitions()
    path = build(source, sanitize)
    before = _registered()
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    _loaded.append(library)
    _apply(library)
    ours = getattr(torch.ops, NAMESPACE)
    operators = {name: getattr(ours, name) for name in _registered() - before}
    library.cuda_on_cpu_launches.restype = ctypes.c_uint64
    return SimpleNamespace(
        **operators,
        launches=library.cuda_on_cpu_launches,
        last_launch=functools.partial(_last_launch, library),
    )


def _last_launch(library: ctypes.CDLL) -> dict[str, int]:
    """How the library's latest kernel was launched."""
    numbers = (ctypes.c_int64 * 4)()
    library.cuda_on_cpu_last_launch(numbers)
    return dict(zip(("blocks", "threads", "cluster", "shared_bytes"), numbers, strict=True))


@functools.cache
def definitions() -> torch.library.Library:
    """The schemas of all row operators, in a namespace of our own."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("trimtab::"):
            schema = torch._C._get_schema(name, "")
            if not schema.returns:
                library.define(str(schema).partition("::")[2])
    return library


def _registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ours = [name for name in names if name.startswith(f"{NAMESPACE}::")]
    return {name.partition("::")[2] for name in ours if has_kernel(name, "CPU")}


@contextlib.contextmanager
def _set(name: str, value: Any) -> Iterator[None]:
    before = _settings[name]
    _settings[name] = value
    try:
        for library in _loaded:
            _apply(library)
        yield
    finally:
        _settings[name] = before
        for library in _loaded:
            _apply(library)


def _apply(library: ctypes.CDLL) -> None:
    values = list({**H200, **_settings["device"]}.values())
    library.cuda_on_cpu_set_device((ctypes.c_int * len(values))(*values))
    order, seed = _settings["schedule"]
    library.cuda_on_cpu_set_schedule(ORDERS.index(order), ctypes.c_uint64(seed))


def build(source: Path, sanitize: bool = False) -> Path:
    """The library of a source file, compiled where a file that it includes has changed."""
    flags = f"{COMMON} {SANITIZE if sanitize else OPTIMIZE}".split()
    made_by = json.dumps([flags, _compiler_version(), torch.__version__])
    name = f"{source.stem}-asan" if sanitize else source.stem

    def make(target: Path, listing: Path) -> None:
        _compile(source, flags, target, listing)

    return build_once(BUILT, name, made_by, ".so", make)


def _compile(source: Path, flags: list[str], target: Path, listing: Path) -> None:
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-isystem", str(TORCH / "include")]
    command = [*_compiler(), *flags, *include, "-MMD", "-MF", str(listing), "-x", "c++"]
    command += [str(source), "-x", "none", "-o", str(target)]
    command += [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ldl", "-lpthread"]
    result = _run(command)
    if result.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for the CPU:\n{result.stderr}")
    sys.stderr.write(result.stderr)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Without the sanitiser that this process may run under."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]}, which compiles CUDA kernels for the CPU, is not installed")
    return command


@functools.cache
def _compiler_version() -> str:
    return _run([*_compiler(), "--version"]).stdout


def _compilers_own(name: str) -> str:
    path = _run([*_compiler(), f"-print-file-name={name}"]).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler comes without {name}")
    return path
