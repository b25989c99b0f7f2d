"""The doctor answers in every install, also in broken ones, and notices wrong numbers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trimtab
from trimtab import __main__, _choose, _native, doctor, ops
from trimtab.reference import token_loss

PACKAGE = Path(trimtab.__file__).parent
KERNELS = PACKAGE.parent.parent / "triton_kernels"
SECTIONS = {"trimtab", "system", "packages", "environment", "build", *doctor._PROBES}


@pytest.fixture
def install(tmp_path) -> Path:
    """A copy of the package, to be broken; first on the path of ``diagnose``."""
    copy = tmp_path / "install"
    shutil.copytree(PACKAGE, copy / "trimtab", ignore=shutil.ignore_patterns("__pycache__"))
    if KERNELS.exists():
        shutil.copytree(KERNELS, copy / "trimtab" / "triton_kernels", dirs_exist_ok=True)
    return copy


def diagnose(install: Path, **environment: str) -> tuple[int, dict]:
    """Exit status and report of the doctor in an install."""
    command = [sys.executable, "-m", "trimtab", "doctor", "--json"]
    # Without the interpreter, whose self-checks take seconds.
    ours = {"PYTHONPATH": str(install), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        command,
        env={**os.environ, **ours, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=install,
    )
    report = json.loads(result.stdout)
    assert Path(report["trimtab"]["folder"]) == install / "trimtab"
    assert set(report) == SECTIONS | {"problems"}
    return result.returncode, report


def replace_module(install: Path, name: str, source: str) -> None:
    """A module of this name before the real one."""
    (install / name).mkdir()
    (install / name / "__init__.py").write_text(source)


def without_library(install: Path) -> None:
    (install / "trimtab" / "_cpu.so").unlink(missing_ok=True)


def test_a_healthy_install(install):
    status, report = diagnose(install)
    assert (status, report["problems"]) == (0, [])
    assert report["torch"]["version"] == torch.__version__
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["torch"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_every_public_operator_is_explained_and_checked():
    report = doctor.diagnose()
    names = {name for family in ops._FAMILIES for name in family.CHOICES}
    assert names
    assert names == {key.split(" on ")[0] for key in report["ops"]}
    for name in names:
        for impl in _choose.IMPLS:
            available = _choose.why_not(impl, name, "cpu", torch.float32) is None
            assert (f"{name}, {impl} on cpu" in report["checks"]) == available


def test_without_torch(install):
    replace_module(install, "torch", "raise ImportError('libtorch is gone')")
    status, report = diagnose(install)
    assert status == 1
    assert "libtorch is gone" in report["torch"]["error"]
    assert any("libtorch is gone" in problem for problem in report["problems"])
    assert report["system"]["python"]


def test_with_a_broken_triton(install):
    without_library(install)
    replace_module(install, "triton", "raise ImportError('no triton here')")
    status, report = diagnose(install)
    assert (status, report["problems"]) == (0, [])
    assert {choice["impl"] for key, choice in report["ops"].items() if "cpu" in key} == {
        "reference"
    }


def test_a_corrupt_library_is_a_problem_and_the_reference_still_works(install):
    (install / "trimtab" / "_cpu.so").write_bytes(b"\x7fELF and nothing more")
    status, report = diagnose(install)
    assert status == 1
    assert report["libraries"]["_cpu.so"]["reason"].startswith("not loaded")
    assert [p for p in report["problems"] if p.startswith("libraries, _cpu.so: not loaded")]
    checks = {key: facts for key, facts in report["checks"].items() if ", reference on cpu" in key}
    assert checks
    assert all(facts["passed"] for facts in checks.values())


def test_a_library_that_was_not_built_is_no_problem(install):
    without_library(install)
    reason = "no C++ compiler found (looked for g++)"
    info = {"mode": "auto", "libraries": {"cpu": {"built": False, "reason": reason}}}
    (install / "trimtab" / "_build_info.json").write_text(json.dumps(info))
    status, report = diagnose(install)
    assert (status, report["problems"]) == (0, [])
    assert report["libraries"]["_cpu.so"]["reason"] == f"not built: {reason}"


@pytest.mark.parametrize(
    ("archs", "capability", "code"),
    [
        ("80;90a;100f;120f", (8, 0), "sm_80"),
        ("80;90a;100f;120f", (8, 9), "sm_80"),
        ("80;90a;100f;120f", (9, 0), "sm_90a"),
        ("80;90a;100f;120f", (10, 3), "sm_100f"),
        ("80;90a;100f;120f", (11, 0), "compute_80"),
        ("80;90a;100f;120f", (7, 5), None),
        ("80 75", (11, 0), "compute_80"),
        ("90a", (9, 1), None),
        ("100f", (9, 0), None),
        ("86", (8, 0), None),
    ],
)
def test_what_a_gpu_runs_of_a_library(archs, capability, code):
    assert doctor.gpu_code(archs, *capability) == code


@pytest.mark.parametrize(("capability", "problem"), [((9, 0), None), ((7, 5), "capability 7.5")])
def test_a_cuda_library_says_for_which_gpus_it_is(tmp_path, monkeypatch, capability, problem):
    (tmp_path / "_cuda.so").touch()
    built = {"built": True, "archs": "80;90a", "cuda": "13.0"}
    (tmp_path / "_build_info.json").write_text(json.dumps({"libraries": {"cuda": built}}))
    monkeypatch.setattr(doctor, "_FOLDER", tmp_path)
    monkeypatch.setitem(_native.REASONS, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    facts = doctor._libraries()["_cuda.so"]
    assert facts["built_with"] == {"archs": "80;90a", "cuda": "13.0"}
    assert facts["present"]
    words = doctor._library_in_words(facts)
    problems = list(doctor._problems({"libraries": {"_cuda.so": facts}}))
    if problem is None:
        assert "archs 80;90a" in words
        assert problems == []
    else:
        assert problem in words
        assert len(problems) == 1
        assert "TRIMTAB_CUDA_ARCHS=75" in problems[0]


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", '{"libraries": 3}', "\x00"])
def test_unreadable_build_facts_are_named(tmp_path, monkeypatch, content):
    (tmp_path / "_build_info.json").write_text(content)
    monkeypatch.setattr(doctor, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="must hold what setup"):
        doctor._build_info()


def test_unreadable_build_facts_are_a_problem(install):
    (install / "trimtab" / "_build_info.json").write_text('{"libraries": [')
    status, report = diagnose(install)
    assert status == 1
    assert len(report["problems"]) == 1
    assert report["problems"][0].startswith("build: ")
    assert report["checks"]


def test_a_crash_in_a_kernel_is_a_finding(install):
    """As a library for the wrong processor gives: the probing process dies, the doctor does not."""
    path = install / "trimtab" / "reference" / "token_loss.py"
    path.write_text(path.read_text() + "\nimport os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    status, report = diagnose(install)
    assert status == 1
    assert "SIGILL" in report["ops"]["error"]
    assert report["torch"]["version"] == torch.__version__


def test_a_bad_variable_is_named(install):
    status, report = diagnose(install, TRIMTAB_IMPL="fastest")
    assert status == 1
    assert report["environment"]["TRIMTAB_IMPL"] == "fastest"
    assert any("impl must be one of" in problem for problem in report["problems"])


def _too_large(loss):
    return loss * (1 + 1e-4)


def _not_a_number(loss):
    return loss * float("nan")


@pytest.mark.parametrize("damage", [_too_large, _not_a_number])
def test_the_self_check_notices_wrong_numbers(monkeypatch, damage):
    function = ops._FAMILIES[0].CHOICES["cross_entropy"][0]
    assert doctor.self_check(function, "reference", "cpu")["passed"]
    right = token_loss.token_loss

    def wrong(logits, *args, **kwargs):
        loss = right(logits, *args, **kwargs)
        return loss if logits.dtype == torch.float64 else damage(loss)

    monkeypatch.setattr(token_loss, "token_loss", wrong)
    assert not doctor.self_check(function, "reference", "cpu")["passed"]


def test_the_report_reads_as_text(capsys, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CHECK", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for words in (
        f"trimtab {trimtab.__version__}",
        "libraries",
        "PASS",
        "TRIMTAB_CHECK",
        "\nhealthy",
    ):
        assert words in text


def test_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda: {"problems": []})
    assert __main__.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"problems": []}
    with pytest.raises(SystemExit):
        __main__.main(["doctor", "--jsn"])
    with pytest.raises(SystemExit):
        __main__.main(["nothing"])


def test_the_demo_names_the_package_that_it_misses(capsys, monkeypatch):
    real = __import__

    def without_demo(name, *args, **kwargs):
        if name == "trimtab.demo":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", without_demo)
    assert __main__.main(["demo"]) == 2
    assert "trimtab demo needs matplotlib; pip install 'trimtab[demo]'" in capsys.readouterr().err
