"""Token loss on inputs that nobody chose: shapes, layouts, dtypes and every option together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import trimtab
from hypothesis_settings import examples
from token_loss_cases import LOW_PRECISION, check_linear_cross_entropy, problem
from trimtab.testing import assert_within_budget, values_and_grads

SIZES = st.sampled_from([1, 2, 3, 7, 16, 33, 65])
CLASSES = st.sampled_from([1, 2, 5, 31, 64, 127, 300])


@st.composite
def calls(draw, dtypes: tuple) -> tuple:
    """Inputs, dtype and options of one call of ``linear_cross_entropy``."""
    dtype, v = draw(st.sampled_from(dtypes)), draw(CLASSES)
    count = draw(st.sampled_from([None, None, 1, 3]))
    shape = () if count is None else (count,)
    given = problem(draw(SIZES), draw(SIZES), v, dtype, ignored=draw(st.booleans()),
                    weight_shape=shape)  # fmt: skip
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    options = {
        "reduction": reduction, "bias": draw(st.booleans()),
        "weighted": count is not None or draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.25, -0.5])),
        "lse_square_scale": draw(st.sampled_from([0.0, 0.0, 1e-2])),
        "options": trimtab.TokenLossOptions(chunk_size=draw(st.sampled_from([None, 1, 4, 16]))),
    }  # fmt: skip
    if draw(st.booleans()):
        options["weight"] = torch.linspace(0.25, 2.0, v)
    if reduction == "mean" and draw(st.booleans()):
        options["normalizer"] = 7.0
    return given, dtype, options


def test_loss_and_gradients_are_within_the_budget(case):
    dtypes = (torch.float32, torch.float16) if case.interpreted else LOW_PRECISION

    @examples(15 if case.interpreted else 100)
    @given(calls(dtypes))
    def run(drawn):
        given, dtype, options = drawn
        device = {k: v.to(case.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        moved = type(given)(*(tensor.to(case.device) for tensor in given))
        check_linear_cross_entropy(case, moved, dtype, **device)

    run()


def contiguous(x: Tensor) -> Tensor:
    return x


def apart(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]]


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def same_row(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


LAYOUTS = st.sampled_from([contiguous, apart, transposed, same_row])


def test_logp_is_within_the_budget_in_every_layout(case):
    @examples(10 if case.interpreted else 60)
    @given(SIZES, SIZES, CLASSES, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([None, 4.0]),
           LAYOUTS, LAYOUTS)  # fmt: skip
    def run(n, d, v, temperature, softcap, of_input, of_weight):
        given = problem(n, d, v)

        def outputs(impl: str, dtype: torch.dtype) -> list[Tensor]:
            def call(input: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
                return trimtab.linear_logp(
                    of_input(input), of_weight(weight), given.target.to(case.device),
                    linear_bias=bias, temperature=temperature, softcap=softcap, ignore_index=-100,
                    impl=impl,
                )[:3]  # fmt: skip

            tensors = [t.to(case.device) for t in given.tensors(dtype)[:3]]
            return values_and_grads(call, tensors)

        truth = outputs("reference", torch.float64)
        eager = outputs("reference", torch.float32)
        terms = float((given.input.abs() @ given.weight.abs().T).max()) + 3.0
        scale = terms / min(temperature, 1.0)
        for ours, theirs, true in zip(outputs(case.impl, torch.float32), eager, truth, strict=True):
            assert_within_budget(ours, theirs, true, scale=scale * n)

    run()
