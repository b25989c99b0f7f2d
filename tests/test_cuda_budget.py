"""The CUDA kernels compiled for every GPU that a wheel serves: registers, spills, wide accesses.

The table of limits is ``cuda_budgets.py``. Run as a script, this file prints what was measured.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cuda_binary
import test_abi
from cuda_binary import ROOT
from cuda_budgets import BUDGETS, HEADROOM, MEASURED_WITH, Budget

SOURCES = {path.stem: path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}
CHECKS = ROOT / "tests" / "cuda_on_cpu" / "checks.cu"
ARCHITECTURES = {"code": ["sm_80", "sm_90a", "sm_100", "sm_120"], "ptx": ["sm_80"]}

pytestmark = pytest.mark.slow
families = pytest.mark.parametrize("family", SOURCES)


def measured(family: str) -> cuda_binary.Measured:
    return cuda_binary.measure(cuda_binary.compile_object(SOURCES[family]))


def row_of(family: str, kernel: str) -> str:
    """The first row of the table that fits."""
    fits = [row for row in BUDGETS.get(family, {}) if fnmatch.fnmatchcase(kernel, row)]
    assert fits, f"cuda_budgets.py has no row for {kernel} of {family}: {measured(family)[kernel]}"
    return fits[0]


def budget_of(family: str, kernel: str) -> Budget:
    row = row_of(family, kernel)
    return BUDGETS[family][row]


@families
def test_registers_and_memory(family: str):
    exact = cuda_binary.nvcc()[1] == MEASURED_WITH
    for kernel, usages in measured(family).items():
        budget = budget_of(family, kernel)
        for arch, usage in usages.items():
            where = f"{kernel} on {arch}: {usage}"
            assert usage["stack"] <= budget.stack, where
            assert usage["spilled"] == 0 or budget.stack > 0, where
            assert usage["static_shared"] <= budget.static_shared, where
            # Other releases come with another ptxas.
            assert not exact or usage["registers"] <= budget.registers + HEADROOM, where


@families
def test_rows_are_read_and_written_in_16_bytes(family: str):
    for kernel, usages in measured(family).items():
        for access in budget_of(family, kernel).wide.split():
            for arch, usage in usages.items():
                assert usage[access] > 0, f"{kernel} on {arch}: {access}, {usage}"


@families
def test_no_access_comes_before_the_wait_for_the_previous_kernel(family: str):
    """Of kernels that may start early, which are all of orthogonality."""
    for kernel, usages in measured(family).items():
        for arch, usage in usages.items():
            if family == "orthogonal" and arch != "sm_80":
                assert usage["waits"], f"{kernel} on {arch}"
            assert usage["before the wait"] == 0, f"{kernel} on {arch}"


@families
def test_the_table_is_as_tight_as_what_was_measured(family: str):
    """No row without a kernel, and no register that none of its kernels takes."""
    if cuda_binary.nvcc()[1] != MEASURED_WITH:
        pytest.skip(f"the table was measured with nvcc {MEASURED_WITH}")
    most = dict.fromkeys(BUDGETS.get(family, {}), 0)
    for kernel, usages in measured(family).items():
        row = row_of(family, kernel)
        most[row] = max(most[row], *(usage["registers"] for usage in usages.values()))
    loose = {
        row: (BUDGETS[family][row].registers, used)
        for row, used in most.items()
        if used < BUDGETS[family][row].registers - HEADROOM
    }
    assert loose == {}


@pytest.mark.parametrize("source", [*SOURCES.values(), CHECKS], ids=lambda path: path.stem)
def test_every_architecture_is_inside(source: Path):
    assert cuda_binary.architectures(cuda_binary.compile_object(source)) == ARCHITECTURES


def test_the_instructions_are_what_they_are_called():
    """Of ``instructions.cuh``, which the CPU has another file for."""
    kernels = cuda_binary.measure(cuda_binary.compile_object(CHECKS))
    for arch in ("sm_80", "sm_90a", "sm_100", "sm_120"):
        for width, element in ((4, "float"), (8, "BFloat16")):
            usage = kernels[f"vectors<{width}, {element}>"][arch]
            # The common and the streaming form of each.
            assert usage["load"] >= 2, usage
            assert usage["store"] >= 2, usage
        assert kernels["vectors<2, float>"][arch]["load"] == 0
        assert kernels["pipeline"][arch]["copy"] > 0
        assert kernels["product16<BFloat16, true>"][arch]["tensor products"] > 0
        assert kernels["product16<Float16, false>"][arch]["tensor products"] > 0
        assert kernels["product_tf32"][arch]["tensor products"] > 0
        assert (kernels["cluster_sums"][arch]["cluster"] > 0) == (arch != "sm_80")
        spilling = {kernel for kernel, usage in kernels.items() if usage[arch]["spilled"]}
        assert spilling == {kernel for kernel, usage in kernels.items() if usage[arch]["stack"]}
        assert spilling == {"local_array"}


LOAD = """
import ctypes, sys, torch
from trimtab import _schemas
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
kernels = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
print(*[name for name in kernels if name.startswith("trimtab::")])
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="the real libtorch_cuda.so is here")
@pytest.mark.skipif(not SOURCES, reason="csrc/cuda holds no .cu file")
def test_the_library_links_loads_and_registers(tmp_path: Path):
    """Against a ``libtorch_cuda.so`` that has the one function which ours takes from it."""
    build = cuda_binary.setup_functions()
    stand_in = tmp_path / "libtorch_cuda.so"
    function = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"
    (tmp_path / "stand_in.c").write_text(function)
    run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{stand_in.name}", tmp_path / "stand_in.c", "-o",
        stand_in)  # fmt: skip
    nvcc = cuda_binary.nvcc()[0]
    link = build["nvcc_link"](nvcc, build["find_compiler"]()[0])
    objects = list(map(cuda_binary.compile_object, SOURCES.values()))
    library = tmp_path / "_cuda.so"
    run(*link, *objects, f"-L{tmp_path}", *build["nvcc_libraries"](build["find_torch"]()[0]), "-o",
        library)  # fmt: skip
    registered = run(sys.executable, "-c", LOAD, stand_in, library).split()
    assert registered
    # test_abi.py sees an installed library only.
    test_abi.test_torch_enters_through_the_stable_abi_alone(library)
    test_abi.test_no_python_symbol(library)
    test_abi.test_needs_torch_and_the_system_alone(library)
    test_abi.test_exports_no_name_that_could_meet_another_library(library)


def run(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_a_torch_without_cuda_is_a_reason_not_to_build(tmp_path: Path, monkeypatch):
    build = cuda_binary.setup_functions()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "kernels.cu").touch()
    monkeypatch.setitem(build["cuda_library"].__globals__, "ROOT", tmp_path)
    with pytest.raises(build["Unavailable"], match="built without CUDA and has no libtorch_cuda"):
        build["cuda_library"]()


def test_the_guards_see_what_they_guard_against(monkeypatch):
    monkeypatch.setitem(SOURCES, "toy", CHECKS)
    row_by_row = {"local_array": Budget(255, stack=256), "*": Budget(48)}
    monkeypatch.setitem(BUDGETS, "toy", row_by_row)
    test_registers_and_memory("toy")
    test_rows_are_read_and_written_in_16_bytes("toy")
    if cuda_binary.nvcc()[1] == MEASURED_WITH:
        with pytest.raises(AssertionError, match="local_array"):
            test_the_table_is_as_tight_as_what_was_measured("toy")
        monkeypatch.setitem(BUDGETS, "toy", {**row_by_row, "*": Budget(16)})
        with pytest.raises(AssertionError, match=r"product16.* on sm_80"):
            test_registers_and_memory("toy")
    monkeypatch.setitem(BUDGETS, "toy", {"*": Budget(255)})
    with pytest.raises(AssertionError, match="local_array on sm_80"):
        test_registers_and_memory("toy")
    for access in ("load", "store", "copy"):
        monkeypatch.setitem(BUDGETS, "toy", {"*": Budget(255, access, stack=256)})
        with pytest.raises(AssertionError, match=f"on sm_80: {access}"):
            test_rows_are_read_and_written_in_16_bytes("toy")
    monkeypatch.setitem(BUDGETS, "toy", {"product*": Budget(255)})
    with pytest.raises(AssertionError, match=r"cuda_budgets\.py has no row for"):
        test_registers_and_memory("toy")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("void trimtab::(anonymous namespace)::loss<trimtab::BFloat16, (bool)1>(int, float*)",
         "loss<BFloat16, 1>"),
        ("trimtab::(anonymous namespace)::places(trimtab::Numbers, long*)", "places"),
        ("void trimtab::reduce<double, trimtab::Add>(void (*)(int))", "reduce<double, Add>"),
    ],
)  # fmt: skip
def test_short_names(given: str, name: str):
    assert cuda_binary.short_name(given) == name


def test_a_row_fits_as_the_table_says(monkeypatch):
    table = {"loss<float, *>": Budget(1), "loss<*>": Budget(2), "*": Budget(3)}
    monkeypatch.setitem(BUDGETS, "toy", table)
    assert [row_of("toy", k) for k in ("loss<float, 1>", "loss<Half, 1>", "logp")] == list(table)


def report() -> Iterator[str]:
    """Every kernel: registers on each architecture, and what else it uses."""
    for family, source in SOURCES.items():
        yield family
        for kernel, usages in cuda_binary.measure(cuda_binary.compile_object(source)).items():
            keys = next(iter(usages.values()))
            most = {key: max(usage[key] for usage in usages.values()) for key in keys}
            used = ", ".join(f"{key} {most[key]}" for key in most if most[key])
            registers = " ".join(f"{usage['registers']:>4}" for usage in usages.values())
            yield f"{registers}  {kernel}: {used}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in report())
