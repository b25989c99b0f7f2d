"""What is built, what goes into it, and that it works where it is installed."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "csrc", "python",
           "triton_kernels", "tests", "bench")  # fmt: skip
LEFT_BY_A_BUILD = shutil.ignore_patterns(
    "*.so", "*.pyc", "__pycache__", "_build_info.json", "*.egg-info"
)
SITE = Path(torch.__file__).parents[1]
HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++")))
LINUX = sys.platform == "linux"
needs_compiler = pytest.mark.skipif(not (HAS_COMPILER and LINUX), reason="no C++ compiler on Linux")


def copy_tree(target: Path) -> Path:
    """The project without what a build left in it."""
    target.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=LEFT_BY_A_BUILD)
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def run(command: list, cwd: Path, check: bool = True, **environment: str) -> str:
    """Output and errors of a command, with these variables on top of ours."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=280,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:]
    assert check or result.returncode != 0, result.stdout[-3000:]
    return result.stdout


def build_wheel(tree: Path, out: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", out, tree], tree, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def build_info(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("trimtab/_build_info.json"))


def doctor_of(wheel: Path, folder: Path) -> dict:
    """What ``trimtab doctor`` says of a wheel in an environment of its own, with our torch."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run([*pip, wheel], folder)
    doctor = [folder / "bin" / "trimtab", "doctor", "--json"]
    output = run(doctor, folder, PYTHONPATH=str(SITE))
    report = json.loads(output)
    assert Path(report["trimtab"]["folder"]).is_relative_to(folder.resolve())
    return report


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_tree(folder / "tree")
    # What an earlier build left must not travel.
    (tree / "python" / "trimtab" / "_cpu.so").write_text("stale")
    (tree / "python" / "trimtab" / "_build_info.json").write_text("stale")
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder], tree)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def python_wheel(unpacked, tmp_path_factory) -> Path:
    return build_wheel(unpacked, tmp_path_factory.mktemp("python"), TRIMTAB_BUILD="python")


@pytest.fixture(scope="module")
def native_wheel(unpacked, tmp_path_factory) -> Path:
    return build_wheel(unpacked, tmp_path_factory.mktemp("native"), TRIMTAB_BUILD="native")


def test_sdist_holds_every_source_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [
        p for folder in ("csrc", "python", "triton_kernels") for p in (ROOT / folder).rglob("*")
    ]
    sources = {
        str(path.relative_to(ROOT))
        for path in tracked
        if path.suffix in (".py", ".typed", ".h", ".inl", ".cpp", ".cu", ".cuh")
    }
    assert sources - names == set()
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"} <= names
    assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []
    assert "python/trimtab/_build_info.json" not in names


def test_a_python_wheel_is_pure_and_complete(python_wheel):
    names = names_in(python_wheel)
    assert python_wheel.name.endswith("-py3-none-any.whl")
    expected = {
        f"trimtab/{path.relative_to(ROOT / 'python' / 'trimtab')}"
        for path in (ROOT / "python" / "trimtab").rglob("*.py")
    }
    kernels = (ROOT / "triton_kernels").rglob("*.py")
    expected |= {f"trimtab/{path.relative_to(ROOT)}" for path in kernels}
    assert expected - set(names) == set()
    assert {"trimtab/py.typed", "trimtab/_build_info.json"} <= set(names)
    assert [name for name in names if name.endswith(".so")] == []


def test_a_wheel_installs_one_top_level_name(python_wheel):
    """``triton_kernels`` is the name of another package, and tests are nobody's business there."""
    tops = {name.partition("/")[0] for name in names_in(python_wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"trimtab"}
    assert [
        name for name in names_in(python_wheel) if re.search(r"(^|/)(tests/|test_|conftest)", name)
    ] == []


def test_a_python_wheel_works_and_its_doctor_says_what_is_missing(python_wheel, tmp_path):
    report = doctor_of(python_wheel, tmp_path / "venv")
    assert report["problems"] == []
    assert report["build"]["mode"] == "python"
    assert "TRIMTAB_BUILD=python" in report["libraries"]["_cpu.so"]["reason"]
    assert {choice["impl"] for choice in report["ops"].values()} <= {"reference", "triton"}
    assert report["checks"]


@needs_compiler
def test_a_native_wheel_serves_every_python(native_wheel):
    names = names_in(native_wheel)
    assert re.search(r"-py3-none-(linux|manylinux)_\w+\.whl$", native_wheel.name)
    assert "trimtab/_cpu.so" in names
    assert "trimtab/_cuda.so" not in names
    facts = build_info(native_wheel)["libraries"]
    assert facts["cpu"]["built"]
    assert facts["cuda"]["reason"] == "left out by TRIMTAB_BUILD=native"


@needs_compiler
def test_a_native_wheel_names_no_folder_of_its_builder(native_wheel, unpacked):
    folders = (str(unpacked), str(SITE))
    with zipfile.ZipFile(native_wheel) as archive:
        for name in ("trimtab/_cpu.so", "trimtab/_build_info.json"):
            content = archive.read(name)
            assert [folder for folder in folders if folder.encode() in content] == []


@needs_compiler
def test_a_native_wheel_loads_and_computes(native_wheel, tmp_path):
    report = doctor_of(native_wheel, tmp_path / "venv")
    assert report["problems"] == []
    assert report["libraries"]["_cpu.so"] == {
        **report["libraries"]["_cpu.so"], "present": True, "reason": None,
    }  # fmt: skip
    natives = [facts for name, facts in report["checks"].items() if ", native on cpu" in name]
    assert natives
    assert all(facts["passed"] for facts in natives)


def test_auto_without_a_compiler_is_pure_and_says_so(unpacked, tmp_path):
    environment = {"TRIMTAB_BUILD": "auto", "CXX": "no-such-compiler"}
    wheel = build_wheel(unpacked, tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no-such-compiler" in build_info(wheel)["libraries"]["cpu"]["reason"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TRIMTAB_BUILD": "native", "CXX": "no-such-compiler"}, "no C++ compiler found"),
        ({"TRIMTAB_BUILD": "native", "CXX": "false"}, "can't build a C++17 library"),
        ({"TRIMTAB_BUILD": "cuda", "CXX": "no-such-compiler"}, "must build _cpu.so"),
        ({"TRIMTAB_BUILD": "gpu"}, "TRIMTAB_BUILD must be one of"),
    ],
)
def test_what_was_asked_for_and_can_not_be_built_is_an_error(unpacked, environment, words):
    output = run([sys.executable, "setup.py", "build_ext"], unpacked, check=False, **environment)
    assert words in output.splitlines()[-1]


@needs_compiler
def test_cuda_asked_for_without_sources_is_an_error(tmp_path):
    tree = toy_tree(tmp_path / "toy")
    output = run([sys.executable, "setup.py", "build_ext"], tree, check=False, TRIMTAB_BUILD="cuda")
    assert "csrc/cuda holds no .cu file" in output.splitlines()[-1]


@pytest.fixture
def build(monkeypatch) -> dict:
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_architectures_become_flags(build):
    flags = build["gencode_flags"]("80;90a;100f;120f", "13.0")
    assert flags == [
        *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in ("80", "90a", "100f", "120f")),
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert "-gencode=arch=compute_90,code=compute_90" in build["gencode_flags"]("80 90", "12.8")


def test_cuda_architectures_that_can_not_be_are_refused(build):
    with pytest.raises(build["Unavailable"], match=r"12\.8 does not know family targets"):
        build["gencode_flags"]("100f", "12.8")
    for wrong in ("sm_90", "9.0", ""):
        with pytest.raises(SystemExit, match="TRIMTAB_CUDA_ARCHS must be like"):
            build["gencode_flags"](wrong, "13.0")


def toy_tree(tree: Path) -> Path:
    """The project's build around two small sources, both of which instantiate one template."""
    shutil.rmtree(copy_tree(tree) / "csrc")
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "shared.h").write_text(
        "template <class T> __attribute__((noinline)) T twice(const T* x, int n) {\n"
        "  T sum = 0;\n  for (int i = 0; i < n; ++i) sum += x[i] * x[i];\n  return sum;\n}\n"
    )
    source = '#include "shared.h"\nfloat {name}(const float* x, int n) {{ return twice(x, n); }}\n'
    for name in ("a_avx512", "b_avx2", "c"):
        (tree / "csrc" / "cpu" / f"{name}.cpp").write_text(source.format(name=name))
    (tree / "csrc" / "cpu" / "d.cpp").write_text("int d() { return 1; }\n")
    return tree


def build_in_place(tree: Path) -> list[str]:
    """Names of the files that a build in place compiled."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    output = run(command, tree, TRIMTAB_BUILD="native")
    return sorted(re.findall(r"^compiling csrc/cpu/(.+)$", output, flags=re.MULTILINE))


@needs_compiler
def test_only_what_changed_is_compiled_again(tmp_path):
    tree = toy_tree(tmp_path / "toy")
    everything = build_in_place(tree)
    assert {"c.cpp", "d.cpp"} <= set(everything)
    assert build_in_place(tree) == []
    os.utime(tree / "csrc" / "shared.h", (2**32, 2**32))
    assert build_in_place(tree) == [name for name in everything if name != "d.cpp"]


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump (binutils)")
@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="x86-64 instruction sets")
def test_code_that_files_share_runs_on_every_processor(tmp_path):
    """The linker keeps one copy of a shared template: not the one compiled for AVX-512."""
    tree = toy_tree(tmp_path / "toy")
    assert len(build_in_place(tree)) == 4
    library = tree / "python" / "trimtab" / "_cpu.so"
    code = run(["objdump", "--disassemble", "--demangle", library], tree)
    shared = re.search(r"<float twice<float>[^>]*>:\n((?:.+\n)+)", code)[1]
    assert "mulss" in shared
    assert re.findall(r"\t(v\w+)|%[yz]mm", shared) == []


def test_a_python_build_drops_the_library_of_an_earlier_one(tmp_path):
    tree = toy_tree(tmp_path / "toy")
    library = tree / "python" / "trimtab" / "_cpu.so"
    library.write_text("stale")
    run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, TRIMTAB_BUILD="python")
    assert not library.exists()
    info = json.loads((library.with_name("_build_info.json")).read_text())
    assert info["libraries"]["cpu"] == {
        "built": False,
        "reason": "left out by TRIMTAB_BUILD=python",
    }
