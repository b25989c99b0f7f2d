"""The kernels of the contrast family, compiled for three GPUs: registers, spills, exactness.

A child process compiles them all (this file, run as a script).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import aot


class Variant(NamedTuple):
    """A kernel as one typical call specialises it."""

    kernel: str
    pointers: tuple[str, ...] = ("negative_ptr",)  # the optional arguments that are given
    mask: bool = False
    aligned: bool = True
    sixteens: bool = True  # sizes are multiples of 16, which Triton finds out from the arguments


ROW_MAPS = ("positive_rows_ptr", "negative_rows_ptr", "anchor_rows_ptr")
INTEGER_ROWS = (*ROW_MAPS, "top_k_rows_ptr", "seed_rows_ptr", "position_rows_ptr")
REAL_ROWS = tuple(
    f"{name}_rows_ptr" for name in ("alpha", "log_beta", "temperature", "tail", "log_min_p")
)
GRADS = ("grad_positive_ptr", "grad_negative_ptr", "grad_anchor_ptr")
EVERYTHING = ("negative_ptr", "anchor_ptr", *INTEGER_ROWS, *REAL_ROWS, *GRADS)
INTEGERS = (
    "ignore_index", "top_k", "positive_count", "negative_count", "anchor_count",
    "seed_low", "seed_high", "position_low", "position_high",
)  # fmt: skip
VARIANTS = {
    "logits": Variant("logits_kernel"),
    "logits, all options": Variant("logits_kernel", EVERYTHING, mask=True),
    "logits, odd stride": Variant("logits_kernel", aligned=False, sixteens=False),
    "logp": Variant("logp_kernel"),
    "logp, all options": Variant("logp_kernel", EVERYTHING),
    "backward": Variant("logp_backward_kernel", ("negative_ptr", *GRADS[:2])),
    "backward, all options": Variant("logp_backward_kernel", EVERYTHING),
    "backward, odd stride": Variant(
        "logp_backward_kernel", ("negative_ptr", *GRADS[:2]), aligned=False, sixteens=False
    ),
    "sample, one row": Variant("sample_kernel", ()),
    "sample": Variant("sample_kernel"),
    "sample, all options": Variant("sample_kernel", EVERYTHING),
    "sample, odd stride": Variant("sample_kernel", aligned=False, sixteens=False),
}

# Registers of a thread: the most over the GPUs and dtypes. Up to 64, two programs of 512 threads
# share a multiprocessor; beyond, it has one. Sampling takes the 128 that one program can have.
MEASURED_WITH = "3.7.1"
HEADROOM = 8
REGISTERS = {
    "logits": 32,
    "logits, all options": 32,
    "logits, odd stride": 40,
    "logp": 57,
    "logp, all options": 53,
    "backward": 60,
    "backward, all options": 58,
    "backward, odd stride": 76,
    "sample, one row": 128,
    "sample": 128,
    "sample, all options": 128,
    "sample, odd stride": 128,
}
# Bytes: what of a row's scalars waits in memory for another sweep, and a little more where elements
# are loaded one by one.
SPILLED = {"sample": 24, "sample, all options": 8, "sample, odd stride": 120}
# Other versions of Triton come with another ptxas.
REGISTERS_ELSEWHERE = 128
SPILLED_ELSEWHERE = 160

TARGETS: list[aot.Target] = [
    (name, dtype, capability)
    for name, variant in VARIANTS.items()
    for dtype in (torch.bfloat16, torch.float32)
    for capability in aot.CAPABILITIES
    # It takes seconds to compile: each variant once, one of them for every GPU and dtype.
    if variant.kernel != "sample_kernel"
    or name == "sample"
    or (dtype, capability) == (torch.bfloat16, 90)
]


def config() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("trimtab.triton_kernels.contrast.config")


def compile_variant(name: str, dtype: torch.dtype, capability: int) -> Any:
    from trimtab.triton_kernels.contrast import combine, logp, sample

    variant = VARIANTS[name]
    home = {"logits_kernel": combine, "sample_kernel": sample}.get(variant.kernel, logp)
    widest = torch.float32 if variant.kernel == "logits_kernel" else dtype
    shape = config().launch_config(aot.VOCAB, widest, aligned=variant.aligned)
    constants = {
        "ALIGNMENT": shape.vec if variant.aligned else 1,
        "STEPS": shape.steps,
        "LANES": shape.lanes,
        "VEC": shape.vec,
        "LIST": shape.candidates,
        "HAS_MASK": variant.mask,
        **dict.fromkeys(set(EVERYTHING) - set(variant.pointers)),
    }
    logits = ("positive_ptr", "negative_ptr", "anchor_ptr", *GRADS)
    element = dict.fromkeys(logits, aot.DTYPES[dtype])
    element |= dict.fromkeys((*INTEGER_ROWS, "target_ptr", "token_ptr", "kept_ptr"), "i64")
    element["list_index_ptr"] = "i32"
    return aot.compile_kernel(
        getattr(home, variant.kernel),
        constants,
        element,
        INTEGERS,
        shape,
        capability,
        sixteens=variant.sixteens,
    )


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return aot.ask(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", VARIANTS)
def test_budget(answer: dict[str, Any], name: str):
    exact = answer["triton"] == MEASURED_WITH
    registers = REGISTERS[name] + HEADROOM if exact else REGISTERS_ELSEWHERE
    spilled = SPILLED.get(name, 0) if exact else SPILLED_ELSEWHERE
    for capability, usage in aot.usages(answer, name):
        where = f"sm_{capability}: {usage}"
        assert usage["registers"] <= min(registers, 128), where
        assert usage["spilled"] <= spilled, where
        # The list of candidates is written through it; elsewhere a float for each warp.
        sampling = VARIANTS[name].kernel == "sample_kernel"
        assert usage["shared"] <= (32768 if sampling else 4 * usage["warps"]), where
        assert usage["uses of a row"] == usage["uses of a row in 64 bits"] == 1, where
        assert usage["doubles"] == usage["slow exponentials"] == 0, where


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", VARIANTS)
def test_roundings_are_those_of_the_other_implementations(answer: dict[str, Any], name: str):
    """No product is fused but where the kernels say so, and s = z / T is rounded once."""
    kernel = VARIANTS[name].kernel
    for capability, usage in aot.usages(answer, name):
        where = f"sm_{capability}: {usage}"
        assert usage["flushed"] == 0, where
        assert (usage["rounded divisions"] > 0) == (kernel != "logits_kernel"), where
        if kernel == "sample_kernel":
            # Three in each weight of the sums.
            assert usage["fused"] <= 3 * usage["exponentials"], where
            assert usage["divisions"] == 0, where
        elif kernel == "logp_kernel":
            assert usage["fused"] == 4, where  # one log1p
        else:
            assert usage["fused"] == 0, where


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", VARIANTS)
def test_loads_and_stores_are_16_bytes_wide(answer: dict[str, Any], name: str):
    """In each sweep, of each row that it reads; 16-bit rows of the logits kernel come by 8."""
    variant = VARIANTS[name]
    rows = 1 + len({"negative_ptr", "anchor_ptr"} & set(variant.pointers))
    written = {"logits_kernel": 1, "logp_backward_kernel": rows}.get(variant.kernel, 0)
    sweeps = {"logits_kernel": 0, "logp_kernel": 1, "logp_backward_kernel": 2}
    for capability, usage in aot.usages(answer, name):
        where = f"sm_{capability}: {usage}"
        if variant.aligned:
            assert usage["wide loads"] >= rows * sweeps.get(variant.kernel, 5), where
            assert usage["wide stores"] >= written, where
        else:
            assert usage["wide loads"] == usage["wide stores"] == 0, where


if __name__ == "__main__":
    aot.report(TARGETS, compile_variant)
