"""Token loss over a vocabulary that several processes hold, against one process that holds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sharded_pool
from sharded_cases import logp_case, loss_case
from token_loss_cases import problem, term_magnitudes
from trimtab.testing import assert_same_bits, assert_within_budget, uneven

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

CLASSES, TOKENS = 63, 37
# Equal and unequal slices, one of a single class and an empty one.
SLICES = {2: [40, 23], 4: [21, 0, 41, 1]}
EVEN = {3: [21, 21, 21]}
CLASS_WEIGHT = torch.linspace(0.0, 2.0, CLASSES)
# Targets at both ends of the slices.
BORDERS = torch.tensor([0, 20, 21, 39, 40, 41, 61, 62])
OF_SLICE = ("weight.grad", "bias.grad")


@pytest.fixture(scope="module")
def pool():
    with sharded_pool.pool() as made:
        yield made


def whole(found: list[dict[str, Tensor]], counts: list[int] | None) -> dict[str, Tensor]:
    """What the ranks found as one process would have it; what they all have is the same."""
    results = {}
    for name, first in found[0].items():
        parts = [rank[name] for rank in found]
        tokens = counts is not None and (first.dim() > 0 and first.shape != (3,))
        if name in OF_SLICE:
            results[name] = torch.cat(parts)
        elif tokens:
            results[name] = torch.cat(parts, -1 if name in ("loss", "token_weight.grad") else 0)
        else:
            for part in parts[1:]:
                assert_same_bits(part, first, name=name)
            results[name] = first
    return results


def check(pool: Any, function: Any, spec: dict[str, Any], dtype: torch.dtype, ranks: int) -> None:
    """Every result of the ranks within the error budget of eager in ``dtype`` in one process."""
    impl = spec.get("options", {}).get("impl", "native")
    spec = {"sizes": {**SLICES, **EVEN}[ranks], **spec, "dtype": dtype}
    spec["problem"] = {"n": TOKENS, "v": CLASSES, "dtype": dtype, **spec.get("problem", {})}

    if "target" not in spec:
        spec["target"] = problem(**spec["problem"]).target
        spec["target"][torch.arange(8) + torch.arange(8) // 4 + 1] = BORDERS

    def alone(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        options = {**spec.get("options", {}), "impl": impl}
        return function(None, {**spec, "options": options, "dtype": dtype})

    truth, eager = alone("reference", torch.float64), alone("reference", dtype)
    spec["options"] = {**spec.get("options", {}), "impl": impl}
    actual = whole(pool.run(function, spec, ranks=ranks), spec.get("counts"))
    assert actual.keys() == truth.keys()
    scales = magnitudes(function, spec)
    # Rounding z moves its probability by eps * |z|; in 16 bits eager's own error covers that.
    amplified = 1.0 + scales["z"] if dtype == torch.float32 else 1.0
    for name, ours in actual.items():
        if name == "predicted":
            assert torch.equal(ours, eager[name])
            continue
        scale = scales.get(name, 0.0) * (amplified if name.endswith("grad") else 1.0)
        assert_within_budget(ours, eager[name], truth[name], name=name, scale=scale)


def magnitudes(function: Any, spec: dict[str, Any]) -> dict[str, float]:
    """Sums of the magnitudes of the terms behind each result."""
    given = problem(**spec["problem"])
    options = {k: v for k, v in spec.get("options", {}).items() if k != "impl"}
    if function is loss_case:
        if "class_weight" in options:
            options["weight"] = options.pop("class_weight")
        target = spec.get("target", given.target)
        given = given._replace(target=target)
        return term_magnitudes(given, spec.get("bias", True), spec.get("weighted", True), options)
    options.pop("temperature", None)
    logits = torch.nn.functional.linear(given.input, given.weight, given.bias)
    z = logits.abs().max() * abs(options.get("logit_scale", 1.0)) / 0.5
    pull = uneven(logits[:, 0])[:, None].abs() * (3 + z) * len(logits) ** 0
    spread = 2 * pull * torch.softmax(logits, -1) + 3 * pull / (1 + z)
    return {
        "z": float(z), "logp": float(2 * z), "lse": float(2 * z), "entropy": float(2 * z),
        "input.grad": float((spread @ given.weight.abs()).max()),
        "weight.grad": float((spread.T @ given.input.abs()).max()),
        "bias.grad": float(spread.sum(0).max()),
    }  # fmt: skip


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unweighted": {"weighted": False},
    "constant weights": {"weight_grad": False},
    "no bias": {"bias": False},
    "class weights": {"options": {"class_weight": CLASS_WEIGHT}},
    "smoothing": {"options": {"label_smoothing": 0.1}},
    "softcap": {"options": {"softcap": 3.0}},
    "scale": {"options": {"logit_scale": -0.25}},
    "z-loss": {"options": {"lse_square_scale": 1e-2}},
    "everything": {
        "options": {
            "class_weight": CLASS_WEIGHT, "label_smoothing": 0.2, "softcap": 5.0,
            "logit_scale": 1.5, "lse_square_scale": 1e-3,
        }
    },
    "sum": {"options": {"reduction": "sum"}},
    "none": {"options": {"reduction": "none"}},
    "none, everything": {
        "options": {
            "reduction": "none", "class_weight": CLASS_WEIGHT, "label_smoothing": 0.2,
            "softcap": 5.0, "lse_square_scale": 1e-3,
        }
    },
    "three weights": {"problem": {"weight_shape": (3,)}},
    "three weights, none": {"problem": {"weight_shape": (3,)}, "options": {"reduction": "none"}},
    "number": {"options": {"normalizer": 7.0}},
    "sum of weights": {"options": {"normalizer": "token_weight"}},
    "frozen": {"frozen": True},
    "frozen, none": {"frozen": True, "options": {"reduction": "none"}},
    "frozen input": {"input_grad": False},
    "frozen input, none": {"input_grad": False, "options": {"reduction": "none"}},
    "ignored class": {"options": {"ignore_index": 0}, "problem": {"ignored": False}},
}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(pool, name, dtype, ranks):
    check(pool, loss_case, {"chunk_size": 8, **LOSSES[name]}, dtype, ranks)


@pytest.mark.parametrize("name", ["plain", "everything", "none", "frozen, none"])
def test_losses_in_float16(pool, name):
    check(pool, loss_case, LOSSES[name], torch.float16, 3)


@pytest.mark.parametrize("name", ["everything", "three weights", "none"])
def test_losses_of_the_reference(pool, name):
    spec = {**LOSSES[name], "options": {**LOSSES[name].get("options", {}), "impl": "reference"}}
    check(pool, loss_case, spec, torch.float32, 4)


@pytest.mark.parametrize("name", ["z-loss", "everything", "frozen, none"])
def test_losses_in_triton(pool, name):
    spec = {**LOSSES[name], "options": {**LOSSES[name].get("options", {}), "impl": "triton"}}
    check(pool, loss_case, {"chunk_size": 20, **spec}, torch.float32, 2)


LOGPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logp": {"upstream": ("logp",)},
    "entropy": {"upstream": ("entropy",)},
    "temperatures": {"options": {"temperature": torch.linspace(0.5, 2.0, TOKENS)}},
    "softcap": {"options": {"softcap": 3.0, "logit_scale": 1.5}},
    "negative scale": {"options": {"logit_scale": -0.5}},
    # Many equal maxima in every slice.
    "saturated": {"options": {"softcap": 0.05}},
    "frozen": {"frozen": True},
    "frozen, logp": {"frozen": True, "upstream": ("logp",)},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOGPS)
def test_logps(pool, name, dtype, ranks):
    check(pool, logp_case, {"chunk_size": 8, **LOGPS[name]}, dtype, ranks)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["temperatures", "frozen, logp"])
def test_logps_of_other_implementations(pool, name, impl):
    spec = {**LOGPS[name], "options": {**LOGPS[name].get("options", {}), "impl": impl}}
    check(pool, logp_case, {"chunk_size": 20, **spec}, torch.float32, 2)


COUNTS = {"even": [10, 9, 9, 9], "none on one": [20, 0, 16, 1]}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    "name", ["everything", "none", "three weights", "three weights, none", "sum of weights",
             "frozen, none", "class weights"],
)  # fmt: skip
def test_losses_of_own_tokens(pool, name, counts):
    spec = {"chunk_size": 8, **LOSSES[name], "counts": COUNTS[counts]}
    check(pool, loss_case, spec, torch.float32, 4)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", ["plain", "temperatures", "frozen, logp"])
def test_logps_of_own_tokens(pool, name, counts):
    spec = {"chunk_size": 8, **LOGPS[name], "counts": COUNTS[counts]}
    check(pool, logp_case, spec, torch.float32, 4)


@pytest.mark.parametrize("function", [loss_case, logp_case])
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_own_tokens_of_which_some_ranks_have_none_that_count(pool, function, impl):
    target = problem(TOKENS, v=CLASSES).target
    target[:20] = -100
    spec = {"target": target, "counts": COUNTS["none on one"], "options": {"impl": impl}}
    check(pool, function, spec, torch.float32, 4)
