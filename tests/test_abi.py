"""What the compiled libraries ask of the machine that loads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import trimtab
from trimtab import _native

LIBRARIES = {
    "_cpu.so": {"libtorch_cpu.so"},
    "_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so"},
}
# The stable ABI has C functions alone; whatever of torch has a namespace is not in it.
UNSTABLE = re.compile(r"(?<![\w:])(at|c10|caffe2|torch)::")
PYTHON = re.compile(r"^_?Py[A-Z_]")
# Everything else comes with each Linux that torch itself runs on.
SYSTEM = re.compile(r"^(lib(stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so|ld-linux)")


def symbols(path: Path, *selection: str) -> list[tuple[str, str]]:
    """Kind and readable name of the dynamic symbols of a library."""
    command = ["nm", "--dynamic", "--demangle", *selection, str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"^[0-9a-f ]*([A-Za-z]) (.+)$", text, flags=re.MULTILINE)


def undefined_symbols(path: Path) -> list[str]:
    """Names that the loader must find elsewhere."""
    return [name for _, name in symbols(path, "--undefined-only")]


def needed_libraries(path: Path) -> list[str]:
    command = ["readelf", "--dynamic", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


@pytest.fixture(params=LIBRARIES)
def library(request) -> Path:
    path = Path(trimtab.__file__).with_name(request.param)
    if not path.exists():
        device = request.param.removeprefix("_").removesuffix(".so")
        pytest.skip(f"{request.param}: {_native.REASONS[device]}")
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("nm and readelf (binutils) are not installed")
    return path


def test_torch_enters_through_the_stable_abi_alone(library):
    names = undefined_symbols(library)
    assert [name for name in names if UNSTABLE.search(name)] == []
    assert any(name.startswith("aoti_torch_") for name in names)


def test_no_python_symbol(library):
    assert [name for name in undefined_symbols(library) if PYTHON.search(name)] == []


def test_needs_torch_and_the_system_alone(library):
    """A library that does not name torch's as needed would not find its symbols at load time."""
    needed = {name for name in needed_libraries(library) if not SYSTEM.search(name)}
    assert needed == LIBRARIES[library.name]


def test_exports_no_name_that_could_meet_another_library(library):
    linker = {"__bss_start", "_edata", "_end"}
    exported = [name for kind, name in symbols(library, "--defined-only") if kind in "TDBR"]
    assert set(exported) <= linker


def test_the_guard_sees_what_torchs_own_extension_asks_for():
    """libtorch_python.so is made of what ours must not contain."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    if shutil.which("nm") is None or not path.exists():
        pytest.skip("no nm, or no libtorch_python.so")
    names = undefined_symbols(path)
    for namespace in ("at::", "c10::", "torch::"):
        assert any(name.startswith(namespace) and UNSTABLE.search(name) for name in names)
    assert any(PYTHON.search(name) for name in names)


def test_the_guard_lets_the_stable_names_pass():
    assert not UNSTABLE.search("aoti_torch_get_data_ptr")
    assert not UNSTABLE.search("std::runtime_error::runtime_error(std::string const&)@GLIBCXX_3.4")
    assert not PYTHON.search("torch_library_impl")
