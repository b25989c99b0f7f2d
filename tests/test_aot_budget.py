"""The kernels of the token loss, compiled for three GPUs: registers, spills, wide loads.

A child process compiles them all (this file, run as a script).
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import aot


class Variant(NamedTuple):
    """A kernel as one typical call specialises it."""

    kernel: str
    pointers: tuple[str, ...] = ()  # the optional arguments that are given
    softcap: bool = False
    smoothing: bool = False
    aligned: bool = True
    sixteens: bool = True  # sizes are multiples of 16, which Triton finds out from the arguments


ALL_WEIGHTS = ("coef_ptr", "class_weight_ptr", "grad_ptr")
ALL_UPSTREAM = ("grad_logp_ptr", "grad_entropy_ptr", "grad_lse_ptr", "inv_temperature_ptr")
VARIANTS = {
    "loss, no gradient": Variant("loss_kernel"),
    "loss": Variant("loss_kernel", ("coef_ptr", "grad_ptr")),
    "loss, stride of 8": Variant("loss_kernel", ("coef_ptr", "grad_ptr"), sixteens=False),
    "loss, odd stride": Variant(
        "loss_kernel", ("coef_ptr", "grad_ptr"), False, False, False, False
    ),
    "loss, all options": Variant("loss_kernel", ALL_WEIGHTS, softcap=True, smoothing=True),
    "logp, no gradient": Variant("logp_kernel", ("inv_temperature_ptr",)),
    "logp, all options": Variant("logp_kernel", ("inv_temperature_ptr", "grad_ptr"), softcap=True),
    "backward": Variant("logp_backward_kernel", ("grad_logp_ptr", "grad_ptr")),
    "backward, all options": Variant("logp_backward_kernel", (*ALL_UPSTREAM, "grad_ptr"), True),
}

# Registers of a thread in float32 and in the 16-bit types: the most over the three GPUs. Only up to
# 64 do 1,024 threads fit on a multiprocessor.
MEASURED_WITH = "3.9.0"
HEADROOM = 8
REGISTERS = {
    "loss, no gradient": (29, 40),
    "loss": (32, 63),
    "loss, stride of 8": (32, 63),
    "loss, odd stride": (31, 39),
    "loss, all options": (46, 79),
    "logp, no gradient": (32, 48),
    "logp, all options": (44, 74),
    "backward": (32, 63),
    "backward, all options": (34, 60),
}
# Other versions of Triton come with another ptxas: what all from 3.5 on were seen to keep to.
REGISTERS_ELSEWHERE = 80
SPILLED_ELSEWHERE = 16

OPTIONAL = {"coef_ptr", "class_weight_ptr", "grad_ptr", *ALL_UPSTREAM}


def compile_variant(name: str, dtype: torch.dtype, capability: int) -> Any:
    from trimtab.triton_kernels.token_loss import logp, loss

    variant = VARIANTS[name]
    shape = config().launch_config(
        aot.VOCAB,
        dtype,
        (capability // 10, 0),
        rereads="grad_ptr" in variant.pointers,
        aligned=variant.aligned,
    )
    constants = {
        "HAS_SOFTCAP": variant.softcap,
        "HAS_SMOOTHING": variant.smoothing,
        "STEPS": shape.steps,
        "LANES": shape.lanes,
        "VEC": shape.vec,
        **dict.fromkeys(OPTIONAL - set(variant.pointers)),
    }
    element = dict.fromkeys(("logits_ptr", "grad_ptr"), aot.DTYPES[dtype])
    element |= {"target_ptr": "i64", "predicted_ptr": "i64"}
    return aot.compile_kernel(
        getattr(loss if variant.kernel == "loss_kernel" else logp, variant.kernel),
        constants,
        element,
        ("ignore_index",),
        shape,
        capability,
        sixteens=variant.sixteens,
    )


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return aot.ask(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", aot.DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_budget(answer: dict[str, Any], name: str, dtype: torch.dtype):
    exact = answer["triton"] == MEASURED_WITH
    registers = REGISTERS[name][dtype.itemsize == 2] + HEADROOM if exact else REGISTERS_ELSEWHERE
    for capability, usage in aot.usages(answer, name, dtype):
        where = f"sm_{capability}: {usage}"
        assert usage["registers"] <= registers, where
        assert usage["spilled"] <= (0 if exact else SPILLED_ELSEWHERE), where
        # One float for each warp, for the reductions at a row's end: no tile changes its layout.
        assert usage["shared"] == 4 * usage["warps"], where
        assert usage["uses of a row"] == usage["uses of a row in 64 bits"] == 1, where
        assert usage["doubles"] == 0, where
        assert usage["exponentials"] > 0, where
        assert usage["slow exponentials"] == 0, where


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_loads_and_stores_are_16_bytes_wide(answer: dict[str, Any], name: str):
    """Two steps of each pass in the branch without masks, and in the other where V allows it."""
    variant = VARIANTS[name]
    each = 4 if variant.sixteens else 2
    for capability, usage in aot.usages(answer, name):
        if variant.aligned:
            written = each * ("grad_ptr" in variant.pointers)
            assert usage["wide loads"] >= each + written, f"sm_{capability}: {usage}"
            assert usage["wide stores"] >= written, f"sm_{capability}: {usage}"
        else:
            assert usage["wide loads"] == usage["wide stores"] == 0, f"sm_{capability}: {usage}"


def config() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("trimtab.triton_kernels.token_loss.config")


@pytest.mark.parametrize("dtype", aot.DTYPES, ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_launch_config(capability: tuple[int, int], dtype: torch.dtype):
    launch_config = config().launch_config
    for vocab in (1, 63, 1000, 32000, 50257, 128256, 256000, 10**6):
        for rereads in (False, True):
            wide = launch_config(vocab, dtype, capability, rereads=rereads, aligned=True)
            odd = launch_config(vocab, dtype, capability, rereads=rereads, aligned=False)
            assert wide.vec * dtype.itemsize == 16
            assert odd.vec == 1
            assert wide.num_warps == odd.num_warps
            for shape in (wide, odd):
                assert shape.lanes == 32 * shape.num_warps <= 1024
                assert shape.num_warps.bit_count() == 1
            # No warp without a load of its own, but for the one there must be.
            assert wide.num_warps == 1 or wide.lanes * wide.steps * wide.vec < 2 * vocab
    short, long = (
        launch_config(vocab, dtype, capability, rereads=True, aligned=True)
        for vocab in (4096, 256000)
    )
    assert short.num_warps < long.num_warps


@pytest.mark.parametrize("dtype", aot.DTYPES, ids=str)
def test_wide_loads_only_where_all_rows_are_aligned(dtype: torch.dtype):
    options, vec = config().options, 16 // dtype.itemsize
    room = torch.empty(4, 256, dtype=dtype)
    even, odd, late = room[:, :200], room.flatten()[: 4 * 255].view(4, 255)[:, :200], room[:, 1:201]
    assert options(even, None, 1.0, 0.0)["VEC"] == vec
    assert options(even, even, 1.0, 0.0)["VEC"] == vec
    for rows in (odd, late):
        assert options(rows, None, 1.0, 0.0)["VEC"] == 1
        assert options(even, rows, 1.0, 0.0)["VEC"] == 1


if __name__ == "__main__":
    aot.report(itertools.product(VARIANTS, aot.DTYPES, aot.CAPABILITIES), compile_variant)
