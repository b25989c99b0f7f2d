"""Builds the compiled libraries of trimtab; all else about the package stands in pyproject.toml.

``trimtab/_cpu.so`` comes from ``csrc/cpu/*.cpp``, ``_cuda.so`` from ``csrc/cuda/*.cu``. They
use the LibTorch stable ABI and no Python symbol, so that one wheel serves every Python and every
torch since 2.10.

Environment:
    TRIMTAB_BUILD: ``auto`` (default) builds what this machine can, ``python`` nothing, ``native``
        must have the CPU library, ``cuda`` must have both.
    TRIMTAB_CUDA_ARCHS: default ``80;90a;100f;120f``; the newest one without a letter also as PTX.
    CXX, CUDA_HOME, MAX_JOBS: as usual.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCE_PACKAGE = ROOT / "python" / "trimtab"
OBJECTS = ROOT / "build" / "objects"
MODES = ("auto", "python", "native", "cuda")
DEFAULT_ARCHS = "80;90a;100f;120f"
MIN_TORCH = (2, 10)

# Under this macro torch headers outside the stable ABI are errors, and functions newer than 2.10
# are not declared.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fvisibility-inlines-hidden "
    f"-fno-math-errno -fno-trapping-math -Wall -Wextra {STABLE_ABI}"
).split()
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC before 13 warns of variables in its own AVX-512 header (GCC bug 105593).
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# The rounding of every operation is part of what these families promise.
EXACT_FAMILIES = ("contrast",)
EXACT = ["-ffp-contract=off"]
EXACT_NVCC = ["-fmad=false"]
# File name suffix -> flags. Linked in this order: of a function that several files instantiate the
# linker keeps the first, and that one must run on every processor that reaches it.
INSTRUCTION_SETS = {
    "": [],
    "_avx2": AVX2,
    "_avx512": [*AVX2, *AVX512, *QUIET],
    "_avx512bf16": [*AVX2, *AVX512, "-mavx512bf16", *QUIET],
}
NVCC_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -DUSE_CUDA --expt-relaxed-constexpr "
    f"-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra {STABLE_ABI}"
).split()


class Unavailable(Exception):
    """A library can't be built here; the text says why."""


@dataclass
class Unit:
    """One source file and the command that compiles it, without input and output."""

    source: Path
    command: list[str]


@dataclass
class Library:
    """What one compiled library is made of."""

    name: str
    units: list[Unit]
    link: list[str]
    info: dict[str, Any] = field(default_factory=dict)


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def find_torch() -> tuple[Path, dict[str, Any]]:
    """Folder and version facts of torch, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("torch is not installed here; install it, then use --no-build-isolation")
    folder = Path(spec.submodule_search_locations[0])
    facts = runpy.run_path(str(folder / "version.py"))
    version = tuple(int(part) for part in re.findall(r"\d+", facts["__version__"])[:2])
    if version < MIN_TORCH:
        raise Unavailable(f"torch {facts['__version__']} is too old; the stable ABI needs 2.10")
    return folder, facts


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler, tried on a C++17 program, and its version line."""
    if sys.platform != "linux":
        raise Unavailable(f"the compiled libraries are built on Linux only, this is {sys.platform}")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = [shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])]
    if not found:
        raise Unavailable(f"no C++ compiler found (looked for {', '.join(names)})")
    program = "#include <optional>\nint f() { return std::optional<int>(1).value(); }\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        output = str(source.with_suffix(".so"))
        try:
            run([*found[0], "-std=c++17", "-fPIC", "-shared", str(source), "-o", output])
        except (OSError, subprocess.CalledProcessError) as error:
            lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
            detail = lines[-1].replace(folder, ".")
            raise Unavailable(f"{found[0][0]} can't build a C++17 library: {detail}") from error
    return found[0], run([*found[0], "--version"]).splitlines()[0]


def torch_flags(folder: Path) -> tuple[list[str], list[str]]:
    """Include and link flags; only a library that it names as needed lends its symbols to ours."""
    # Error messages name source files: as they are in the project, not where it was built.
    maps = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={folder.parent}/="]
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(folder / "include"), *maps]
    return include, ["-L" + str(folder / "lib"), "-ltorch_cpu"]


def own_flags(source: Path, suffix: str) -> list[str]:
    """Flags of one file: those of its instruction set and of its family."""
    exact = EXACT if source.name.startswith(EXACT_FAMILIES) else []
    return [*INSTRUCTION_SETS[suffix], *exact]


def cpu_library() -> Library:
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    if not sources:
        raise Unavailable("csrc/cpu holds no .cpp file")
    compiler, version = find_compiler()
    folder, facts = find_torch()
    include, libraries = torch_flags(folder)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    groups: dict[str, list[Unit]] = {suffix: [] for suffix in INSTRUCTION_SETS}
    for source in sources:
        suffix = next((s for s in INSTRUCTION_SETS if s and source.stem.endswith(s)), "")
        if x86 or not suffix:
            flags = [*CXX_FLAGS, *own_flags(source, suffix), *include]
            groups[suffix].append(Unit(source, [*compiler, *flags]))
    info = {
        "torch": facts["__version__"],
        "compiler": version,
        "flags": CXX_FLAGS,
        "sources": {u.source.name: own_flags(u.source, s) for s in groups for u in groups[s]},
    }
    link = [*compiler, "-shared", "-Wl,--no-undefined", "-Wl,--no-as-needed", *libraries]
    return Library("cpu", [unit for units in groups.values() for unit in units], link, info)


def find_nvcc() -> tuple[str, str]:
    """Path and release of nvcc. torch's own CUDA_HOME is None in builds of torch without CUDA."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for name in candidates if (path := shutil.which(name))), None)
    if nvcc is None:
        raise Unavailable("nvcc not found; set CUDA_HOME to the CUDA toolkit")
    match = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
    if match is None:
        raise Unavailable(f"{nvcc} --version names no release")
    return nvcc, match[1]


def gencode_flags(archs: str, release: str) -> list[str]:
    """One ``-gencode`` per architecture; the newest plain one also as PTX, for later ones."""
    names = [name for name in re.split(r"[;,\s]+", archs.strip()) if name]
    wrong = [name for name in names if not re.fullmatch(r"\d{2,3}[af]?", name)]
    if wrong or not names:
        raise SystemExit(f"TRIMTAB_CUDA_ARCHS must be like {DEFAULT_ARCHS!r}, got {archs!r}")
    if any(name.endswith("f") for name in names) and tuple(map(int, release.split("."))) < (12, 9):
        raise Unavailable(
            f"nvcc {release} does not know family targets such as 100f, which need 12.9; "
            "set TRIMTAB_CUDA_ARCHS to what it knows, for example 80;90a"
        )
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    plain = [int(name) for name in names if name.isdigit()]
    if plain:
        flags.append(f"-gencode=arch=compute_{max(plain)},code=compute_{max(plain)}")
    return flags


def nvcc_command(nvcc: str, compiler: list[str], gencode: list[str], torch: Path) -> list[str]:
    """What compiles a .cu file, without input and output and `own_nvcc_flags`."""
    include, _ = torch_flags(torch)
    include = [f"-Xcompiler={flag}" if flag.startswith("-f") else flag for flag in include]
    return [nvcc, "-ccbin", compiler[0], *NVCC_FLAGS, *gencode, *include]


def own_nvcc_flags(source: Path) -> list[str]:
    return EXACT_NVCC if source.name.startswith(EXACT_FAMILIES) else []


def nvcc_link(nvcc: str, compiler: list[str]) -> list[str]:
    # The CUDA runtime is linked in: a shared one would tie the wheel to one major version of CUDA.
    link = [nvcc, "-ccbin", compiler[0], "-shared", "-cudart=static"]
    return [*link, "-Xlinker=--exclude-libs,ALL,--no-undefined,--no-as-needed"]


def nvcc_libraries(torch: Path) -> list[str]:
    return [*torch_flags(torch)[1], "-ltorch_cuda"]


def cuda_library() -> Library:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        raise Unavailable("csrc/cuda holds no .cu file, so there is nothing to build")
    compiler, version = find_compiler()
    folder, facts = find_torch()
    if not facts.get("cuda"):
        raise Unavailable(
            f"torch {facts['__version__']} is built without CUDA and has no libtorch_cuda.so to "
            "link to; install a torch that is built with it"
        )
    nvcc, release = find_nvcc()
    if release.split(".")[0] != facts["cuda"].split(".")[0]:
        raise Unavailable(f"nvcc is release {release}, torch is built with CUDA {facts['cuda']}")
    archs = os.environ.get("TRIMTAB_CUDA_ARCHS") or DEFAULT_ARCHS
    gencode = gencode_flags(archs, release)
    command = nvcc_command(nvcc, compiler, gencode, folder)
    info = {
        "torch": facts["__version__"],
        "compiler": version,
        "cuda": release,
        "archs": archs,
        "flags": NVCC_FLAGS + gencode,
        "sources": {source.name: own_nvcc_flags(source) for source in sources},
    }
    link = [*nvcc_link(nvcc, compiler), *nvcc_libraries(folder)]
    units = [Unit(source, [*command, *own_nvcc_flags(source)]) for source in sources]
    return Library("cuda", units, link, info)


def make_plan(mode: str) -> tuple[list[Library], dict[str, Any]]:
    """The libraries to build, and what goes into ``_build_info.json``."""
    if mode not in MODES:
        raise SystemExit(f"TRIMTAB_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    required = {"native": {"cpu"}, "cuda": {"cpu", "cuda"}}.get(mode, set())
    libraries = []
    info: dict[str, Any] = {"mode": mode, "libraries": {}}
    for name, make in (("cpu", cpu_library), ("cuda", cuda_library)):
        try:
            if mode == "python" or (mode == "native" and name == "cuda"):
                raise Unavailable(f"left out by TRIMTAB_BUILD={mode}")
            library = make()
        except Unavailable as reason:
            if name in required:
                raise SystemExit(
                    f"trimtab: TRIMTAB_BUILD={mode} must build _{name}.so, but {reason}"
                ) from None
            info["libraries"][name] = {"built": False, "reason": str(reason)}
        else:
            libraries.append(library)
            info["libraries"][name] = {"built": True, **library.info}
    return libraries, info


def out_of_date(target: Path, dependencies: list[Path]) -> bool:
    if not target.exists():
        return True
    made = target.stat().st_mtime
    return any(not path.exists() or path.stat().st_mtime > made for path in dependencies)


def read_dependencies(path: Path) -> list[Path]:
    """What a compiler's ``-MMD`` file lists after the colon."""
    if not path.exists():
        return [path]
    text = path.read_text().replace("\\\n", " ").partition(": ")[2]
    return [Path(name.replace("\\ ", " ")) for name in re.findall(r"(?:\\ |\S)+", text)]


def compile_unit(unit: Unit, info: dict[str, Any]) -> Path:
    """Compiles one file, unless an object of this command, newer than all it includes, is there."""
    # Torch's headers are system headers here, which the list of dependencies leaves out.
    command = json.dumps([unit.command, info["torch"], info["compiler"]])
    key = hashlib.sha256(command.encode()).hexdigest()[:12]
    target = OBJECTS / f"{unit.source.parent.name}-{unit.source.stem}-{key}.o"
    depends = target.with_suffix(".d")
    if out_of_date(target, read_dependencies(depends)):
        sys.stdout.write(f"compiling {unit.source.relative_to(ROOT)}\n")
        arguments = ["-MMD", "-MF", str(depends), "-c", str(unit.source), "-o", str(target)]
        result = subprocess.run([*unit.command, *arguments], capture_output=True, text=True)
        sys.stderr.write(result.stderr)
        if result.returncode != 0:
            target.unlink(missing_ok=True)
            raise SystemExit(
                f"trimtab: {unit.source.relative_to(ROOT)} does not compile with "
                f"{unit.command[0]}; TRIMTAB_BUILD=python installs without compiled libraries"
            )
    return target


def build_library(library: Library, target: Path) -> None:
    OBJECTS.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda unit: compile_unit(unit, library.info), library.units))
    cut = library.link.index("-shared") + 1
    command = [*library.link[:cut], *map(str, objects), *library.link[cut:], "-o", str(target)]
    # Never written over: another process may have the old file mapped.
    target.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(result.stderr)
    if result.returncode != 0:
        raise SystemExit(f"trimtab: {target.name} does not link")


def record(package: Path) -> None:
    """Writes the build facts into a package folder; drops libraries of an earlier plan from it."""
    for name, facts in INFO["libraries"].items():
        if not facts["built"]:
            Path(package, f"_{name}.so").unlink(missing_ok=True)
            print(f"trimtab: without _{name}.so: {facts['reason']}")
    package.mkdir(parents=True, exist_ok=True)
    Path(package, "_build_info.json").write_text(json.dumps(INFO, indent=2) + "\n")


class BuildExt(build_ext):
    """Compiles each file with the flags of its name, only where something changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        super().run()
        if self.inplace:
            record(SOURCE_PACKAGE)

    def build_extension(self, ext: Extension) -> None:
        library = next(library for library in LIBRARIES if ext.name == f"trimtab._{library.name}")
        build_library(library, Path(self.get_ext_fullpath(ext.name)))


class BuildPy(build_py):
    """Adds the build facts to the package."""

    def run(self) -> None:
        super().run()
        record(SOURCE_PACKAGE if self.editable_mode else Path(self.build_lib, "trimtab"))


class BdistWheel(bdist_wheel):
    """No Python symbol inside: a compiled wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


# Commands that only describe the package must not need a compiler.
DESCRIBING = bool({"egg_info", "dist_info", "sdist"} & set(sys.argv[1:]))
LIBRARIES, INFO = make_plan("python" if DESCRIBING else os.environ.get("TRIMTAB_BUILD") or "auto")

setup(
    ext_modules=[Extension(f"trimtab._{library.name}", sources=[]) for library in LIBRARIES],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel},
)
