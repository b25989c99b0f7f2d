"""The kernels of the orthogonal family, compiled for three GPUs: registers, spills, tensor cores.

A child process compiles them all (this file, run as a script), with what the launchers pass.
"""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import aot


class Variant(NamedTuple):
    """A launch of a call."""

    kernel: str
    rank: int = 8
    squared: bool = False
    layout: str = "plain"
    back: bool = False  # the gradient of the previous rows
    projects: bool = False


VARIANTS = {
    "overlap": Variant("overlap"),
    "overlap, many ranks": Variant("overlap", rank=64),
    "overlap, transposed": Variant("overlap", layout="transposed"),
    "overlap, odd stride": Variant("overlap", layout="odd stride"),
    "overlap, every other column": Variant("overlap", layout="every other column"),
    "reduce": Variant("reduce"),
    "combine signs": Variant("combine"),
    "combine": Variant("combine", squared=True),
    "combine, many ranks": Variant("combine", rank=64, squared=True),
    "combine, transposed": Variant("combine", squared=True, layout="transposed"),
    "combine, odd stride": Variant("combine", squared=True, layout="odd stride"),
    "combine, every other column": Variant("combine", squared=True, layout="every other column"),
    "to previous": Variant("combine", squared=True, back=True),
    "project": Variant("combine", squared=True, projects=True),
    "project, many rows": Variant("combine", rank=64, squared=True, projects=True),
}
LAYOUTS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "odd stride": lambda t: t.new_empty(t.shape[0], t.shape[1] + 1)[:, :-1],
    "every other column": lambda t: t.new_empty(t.shape[0], 2 * t.shape[1])[:, ::2],
}
DTYPES = (torch.float32, torch.bfloat16)

# Registers of a thread in float32 and bfloat16, the most over the GPUs.
MEASURED_WITH = "3.7.1"
HEADROOM = 8
REGISTERS = {
    "overlap": (143, 80),
    "overlap, many ranks": (168, 100),
    "overlap, transposed": (127, 128),
    "overlap, odd stride": (128, 124),
    "overlap, every other column": (148, 170),
    "reduce": (48,),
    "combine signs": (161, 112),
    "combine": (161, 133),
    "combine, many ranks": (166, 255),
    "combine, transposed": (166, 128),
    "combine, odd stride": (167, 108),
    "combine, every other column": (170, 149),
    "to previous": (166, 180),
    "project": (162, 137),
    "project, many rows": (170, 182),
}
# Programs that a multiprocessor of an H100 or H200 takes at once, by `config`.
PROGRAMS = {"overlap": (3, 4), "combine signs": (4, 7), "combine": (4, 7)}
# Other versions of Triton come with another ptxas.
SPILLED_ELSEWHERE = 128

TARGETS: list[aot.Target] = [
    (name, dtype, capability)
    for name, registers in REGISTERS.items()
    for dtype, _ in zip(DTYPES, registers, strict=False)
    for capability in aot.CAPABILITIES
]


class Recorded(Exception):
    """Carries the arguments of a launch, which does not take place."""


class Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        raise Recorded(dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs)


def load(name: str) -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module(f"trimtab.triton_kernels.orthogonal.{name}")


def arguments(variant: Variant, dtype: torch.dtype) -> dict[str, Any]:
    """Of the variant's launch, for two modules with a width of 4096 and rows of 14 tasks."""
    launch, plan, table = load("launch"), load("plan"), load("table")

    def tensors(count: int, rows: int) -> list[Tensor]:
        return [LAYOUTS[variant.layout](torch.empty(rows, 4096, dtype=dtype)) for _ in range(count)]

    previous, current = tensors(28, 8), tensors(2, variant.rank)
    outs = [torch.empty(t.shape, dtype=dtype) for t in current] if variant.projects else None
    made = plan.make_plan(
        table._places(previous),
        [14, 14],
        table._places(current),
        None if outs is None else table._places(outs),
        (dtype, dtype),
        signs=not variant.squared,
        to_previous=variant.back,
        compiled=True,
    )
    parts, weight, value = (torch.empty(n) for n in (made.parts, 2, ()))
    name = f"{variant.kernel}_kernel"
    kernel = getattr(launch, name)
    setattr(launch, name, Recorder(kernel))
    try:
        if variant.kernel == "overlap":
            launch.overlap(made, previous, current, parts)
        elif variant.kernel == "reduce":
            launch.reduce(made, parts, variant.squared, weight, parts)
        elif variant.projects:
            launch.combine(made, made.to_current, previous, made.previous, parts, outs[0],
                           minuend=current[0])  # fmt: skip
        elif variant.back:
            launch.combine(made, made.to_previous, current, made.current, parts, parts,
                           factor=2.0, weight=weight, transposed=True)  # fmt: skip
        else:
            launch.combine(made, made.to_current, previous, made.previous, parts, parts,
                           factor=2.0, weight=weight, values=parts, value=value)  # fmt: skip
    except Recorded as launched:
        return launched.args[0]
    finally:
        setattr(launch, name, kernel)
    raise AssertionError(f"{name} was not launched")


def compile_variant(name: str, dtype: torch.dtype, capability: int) -> Any:
    kernel = getattr(load("products"), f"{VARIANTS[name].kernel}_kernel")
    given = arguments(VARIANTS[name], dtype)
    options = {"num_warps", "num_stages", "enable_fp_fusion"}
    pointers = {
        key: "i64" if isinstance(value, np.ndarray) else aot.DTYPES[value.dtype]
        for key, value in given.items()
        if isinstance(value, np.ndarray | Tensor)
    }
    numbers = {"factor", "n_values"}
    return aot.compile_kernel(
        kernel,
        {key: value for key, value in given.items() if key not in {*options, *pointers, *numbers}},
        pointers,
        ("n_values",),
        SimpleNamespace(**{"num_stages": 1, **{key: given.get(key, 1) for key in options}}),
        capability,
    )


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return aot.ask(__file__, tmp_path_factory.mktemp("triton"))


CASES = [(name, d) for name, registers in REGISTERS.items() for d, _ in enumerate(registers)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "d"), CASES)
def test_budget(answer: dict[str, Any], name: str, d: int):
    exact = answer["triton"] == MEASURED_WITH
    for capability, usage in aot.usages(answer, name, DTYPES[d]):
        where = f"sm_{capability}: {usage}"
        assert usage["registers"] <= (REGISTERS[name][d] + HEADROOM if exact else 255), where
        assert usage["spilled"] <= (0 if exact else SPILLED_ELSEWHERE), where
        # Two programs fit on an A100, three on what came later.
        assert usage["shared"] <= 80 * 1024, where
        assert usage["uses of a row"] == usage["uses of a row in 64 bits"] == 1, where
        assert usage["doubles"] == usage["fused"] == 0, where


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PROGRAMS)
def test_enough_programs_at_once(answer: dict[str, Any], name: str):
    if answer["triton"] != MEASURED_WITH:
        pytest.skip(f"registers of Triton {answer['triton']} were not measured")
    for dtype, programs in zip(DTYPES, PROGRAMS[name], strict=True):
        usage = dict(aot.usages(answer, name, dtype))[90]
        each = -(-usage["registers"] // 8) * 8 * 32 * usage["warps"]
        assert programs * each <= 65536, usage
        assert programs * (usage["shared"] + 1024) <= 228 * 1024, usage


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", VARIANTS)
def test_products_are_made_by_tensor_cores(answer: dict[str, Any], name: str):
    for _, usage in aot.usages(answer, name):
        assert (usage["tensor products"] > 0) == (VARIANTS[name].kernel != "reduce"), usage


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_no_sign_is_multiplied_in_three_terms(answer: dict[str, Any]):
    """Beside bfloat16; two are enough for a result that is rounded to it."""
    counts = [
        [usage["tensor products"] for _, usage in aot.usages(answer, name, torch.bfloat16)]
        for name in ("combine signs", "combine", "project")
    ]
    for signs, all_of_it, rounded in zip(*counts, strict=True):
        assert (all_of_it, rounded) == (3 * signs, 2 * signs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", VARIANTS)
def test_memory_is_read_and_written_by_16_bytes(answer: dict[str, Any], name: str):
    """Where rows, or the same column of rows in turn, allow it; S and results do in any case."""
    variant = VARIANTS[name]
    wide = variant.layout in ("plain", "transposed")
    for dtype in DTYPES[: len(REGISTERS[name])]:
        for capability, usage in aot.usages(answer, name, dtype):
            where = f"sm_{capability}: {usage}"
            if variant.kernel == "overlap":
                assert (usage["wide copies"] > 0) == wide, where
            elif variant.kernel == "reduce":
                assert usage["wide loads"] >= 8, where
            else:
                tile = arguments(variant, dtype)
                threads = 32 * usage["warps"]
                elements = tile["ROWS"] * (
                    tile["COLUMNS"] * wide * dtype.itemsize + tile["RANK"] * 4
                )
                assert usage["wide loads"] >= elements // threads // 16, where
                assert usage["wide stores"] > 0, where


def test_what_products_are_made_in():
    config, tl = load("config"), importlib.import_module("triton.language")
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    for pair, expected in {
        (half, half): (tl.float16, "tf32", 1),
        (brain, brain): (tl.bfloat16, "tf32", 1),
        (half, brain): (tl.float32, "tf32", 1),
        (brain, single): (tl.float32, "tf32x3", 1),
        (single, half): (tl.float32, "tf32x3", 1),
        (single, single): (tl.float32, "tf32x3", 1),
    }.items():
        assert config.overlap_arithmetic(*pair, compiled=True) == expected
    for (dtype, signs), expected in {
        (brain, True): (tl.bfloat16, "tf32", 1),
        (brain, False): (tl.bfloat16, "tf32", 3),
        (half, True): (tl.float16, "tf32", 1),
        (half, False): (tl.float32, "tf32x3", 1),
        (single, True): (tl.float32, "tf32x3", 1),
    }.items():
        assert config.combine_arithmetic(dtype, signs=signs, terms=3, compiled=True) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices(dtype: torch.dtype):
    """Many for few rows, one where blocks of rows are programs enough; their parts are small."""
    config = load("config")
    made_in = config.overlap_arithmetic(dtype, dtype, compiled=True)
    rows, ranks, widths = np.array(
        [(112, 8, 4096), (8, 8, 4096), (112, 8, 11008), (960, 64, 4096), (128, 4096, 4096),
         (1, 1, 1), (0, 3, 5), (3, 0, 5), (3, 5, 0)]
    ).T  # fmt: skip
    tile = config.overlap_tile(int(ranks.max()), made_in, wide=True)
    columns = config.slice_widths(rows, ranks, widths, dtype.itemsize, tile)
    assert (columns % tile.columns == 0).all()
    counts = -(-widths // np.maximum(columns, 1))
    assert counts[:2].tolist() == [16 if dtype.itemsize == 2 else 32] * 2
    assert counts[2] > counts[0]
    assert counts[4:].tolist() == [1, 1, 1, 1, 0]
    full = counts > 1
    parts, read = 4 * np.minimum(ranks, 64), columns * dtype.itemsize
    assert (16 * parts <= read)[full].all()


if __name__ == "__main__":
    aot.report(TARGETS, compile_variant)
