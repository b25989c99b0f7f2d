"""Contrast on inputs that nobody chose: shapes, layouts, dtypes, ties, infinities and options."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import trimtab
from contrast_cases import (
    NUCLEUS,
    assert_sampled,
    check_logp,
    few,
    oracle_logits,
    oracle_sample,
    rows,
)
from hypothesis_settings import examples
from trimtab.testing import assert_same_bits

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT64 = st.integers(-(2**63), 2**63 - 1)
INF = math.inf


@st.composite
def logits(draw, b: int, v: int, dtype: torch.dtype) -> Tensor:
    """Rows with any spread and layout, few or many ties, tokens masked, seldom a NaN."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = draw(st.sampled_from([0.0, 0.3, 3.0, 30.0])) * torch.randn(b, v, generator=generator)
    step = draw(st.sampled_from([0.0, 0.0, 0.25, 2.0]))
    z = (z / step).round() * step if step else z
    z = z.to(dtype)
    masked = draw(st.sampled_from([0.0, 0.0, 0.2, 0.9]))
    z[torch.rand(b, v, generator=generator) < masked] = -INF
    for value in draw(st.lists(st.sampled_from([math.nan, INF]), max_size=1)):
        if b and v:
            z[draw(st.integers(0, b - 1)), draw(st.integers(0, v - 1))] = value
    return draw(st.sampled_from([plain, apart, transposed]))(z)


def plain(z: Tensor) -> Tensor:
    return z


def apart(z: Tensor) -> Tensor:
    return torch.cat([z, torch.full_like(z, math.nan)], 1)[:, : z.shape[1]]


def transposed(z: Tensor) -> Tensor:
    return z.t().contiguous().t()


@st.composite
def parameter(draw, b: int, values, dtype: torch.dtype):
    """A number, or a tensor with one per row."""
    if draw(st.booleans()):
        return draw(values)
    return torch.tensor([draw(values) for _ in range(b)], dtype=dtype)


def real(*values: float):
    """Numbers that float32 holds, so that a number and a tensor are the same."""
    return st.sampled_from([torch.tensor(value, dtype=torch.float32).item() for value in values])


@st.composite
def problem(draw, dtypes: list) -> tuple:
    dtype = draw(st.sampled_from(dtypes))
    b, v = draw(st.integers(0, 5)), draw(st.sampled_from([1, 2, 3, 7, 16, 33, 64, 100]))
    tensors = [draw(logits(b, v, dtype)) for _ in range(3)]
    if draw(st.booleans()):
        tensors[2] = None
    alpha = draw(parameter(b, real(0.0, 0.5, -0.5, 1.5, 8.0), torch.float32))
    beta = draw(st.none() | parameter(b, real(1.0, 0.5, 0.1, 1e-6), torch.float32))
    return dtype, tensors, {"alpha": alpha, "plausibility": beta}


@st.composite
def sampling(draw, dtypes: list) -> tuple:
    _, (p, n, a), options = draw(problem(dtypes))
    b = p.shape[0]
    options["temperature"] = draw(parameter(b, real(0.0, 0.3, 1.0, 1.0, 2.5), torch.float32))
    options["top_k"] = draw(st.none() | parameter(b, st.integers(0, 110), torch.int64))
    options["top_p"] = draw(st.none() | parameter(b, real(0.0, 0.3, 0.9, 0.99, 1.0), torch.float32))
    options["min_p"] = draw(st.none() | parameter(b, real(0.0, 0.05, 0.5, 1.0), torch.float32))
    options["seed"] = draw(parameter(b, INT64, torch.int64))
    options["position"] = draw(parameter(b, INT64, torch.int64))
    if a is not None:
        options["anchor"] = a
    if b and draw(st.booleans()):
        options["positive_rows"] = torch.tensor([draw(st.integers(0, b - 1)) for _ in range(b)])
    return p, n, options


def to_device(value, device: str):
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.op("contrastive_sample")
def test_sample_is_the_oracles(case):
    @examples(few(case, 200, 8))
    @given(sampling(DTYPES if case.for_gpus else [*DTYPES, torch.float64]))
    def run(drawn):
        p, n, options = drawn
        truth = oracle_sample(p, n, **{k: v for k, v in options.items() if v is not None})
        got = trimtab.contrastive_sample(
            p.to(case.device), n.to(case.device), impl=case.impl,
            **{name: to_device(value, case.device) for name, value in options.items()},
        )  # fmt: skip
        decided = [i for i, row in enumerate(truth) if row.margin > NUCLEUS]
        kind = torch.float64 if p.dtype == torch.float64 else torch.float32
        assert_sampled([field[decided] for field in got], [truth[i] for i in decided], kind)
        assert ((got.kept > 0) == (got.token >= 0)).all()

    run()


@pytest.mark.op("contrastive_logits")
def test_logits_are_the_oracles_to_the_bit(case):
    @examples(few(case, 100, 8))
    @given(problem(DTYPES))
    def run(drawn):
        _, (p, n, a), options = drawn
        b = p.shape[0]
        got = trimtab.contrastive_logits(
            *(to_device(t, case.device) for t in (p, n)), anchor=to_device(a, case.device),
            impl=case.impl, **{k: to_device(v, case.device) for k, v in options.items()},
        )  # fmt: skip
        beta = options["plausibility"]
        betas = beta.tolist() if isinstance(beta, Tensor) else [beta] * b
        alpha = options["alpha"]
        alphas = alpha.tolist() if isinstance(alpha, Tensor) else [alpha] * b
        for i in range(b):
            anchor = None if a is None else a[i : i + 1]
            truth = oracle_logits(p[i : i + 1], n[i : i + 1], anchor, alphas[i], betas[i])
            assert_same_bits(got[i : i + 1].cpu(), truth)

    run()


@pytest.mark.op("contrastive_logp")
def test_logp_is_within_the_budget(case):
    dtypes = [torch.float32, torch.float16] if case.interpreted else DTYPES

    @examples(few(case, 60, 8))
    @given(
        st.integers(1, 9), st.integers(1, 200), st.sampled_from(dtypes), st.booleans(),
        st.sampled_from([0.1, 3.0, 20.0]), st.sampled_from([0.0, 0.5, -1.0, 4.0]),
        st.sampled_from([0.3, 1.0, 3.0]), st.integers(0, 1000),
    )  # fmt: skip
    def run(b, v, dtype, anchored, spread, alpha, temperature, seed):
        values = rows(b, v, dtype, spread=spread, seed=seed, device=case.device)
        options = {"alpha": alpha, "temperature": temperature, "anchored": anchored}
        check_logp(case, values, dtype, **options)

    run()


@pytest.mark.op("contrastive_sample")
def test_a_token_does_not_depend_on_its_batch(case):
    """Any selection of the rows, in any order, draws what the whole batch draws."""

    @examples(few(case, 60, 8))
    @given(sampling(DTYPES), st.data())
    def run(drawn, data):
        p, n, options = drawn
        options.pop("positive_rows", None)
        b = p.shape[0]
        index = torch.tensor(
            data.draw(st.lists(st.integers(0, b - 1), max_size=6)) if b else [], dtype=torch.int64
        )

        def select(name, value):
            return value[index] if isinstance(value, Tensor) else value

        whole = trimtab.contrastive_sample(
            *(t.to(case.device) for t in (p, n)), impl=case.impl,
            **{name: to_device(value, case.device) for name, value in options.items()},
        )  # fmt: skip
        part = trimtab.contrastive_sample(
            *(t[index].to(case.device) for t in (p, n)), impl=case.impl,
            **{k: to_device(select(k, v), case.device) for k, v in options.items()},
        )  # fmt: skip
        for ours, theirs in zip(part, whole, strict=True):
            assert_same_bits(ours.cpu(), theirs.cpu()[index])

    run()
