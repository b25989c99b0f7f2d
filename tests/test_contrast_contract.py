"""Contrast: arguments that do not fit, what a call runs on, and what it leaves alone."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import trimtab
from contrast_cases import rows
from trimtab.testing import assert_same_bits

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

P, N, Y = torch.zeros(3, 5), torch.ones(3, 5), torch.zeros(3, dtype=torch.int64)
H, W = torch.zeros(3, 4), torch.zeros(5, 4)
OPS = [
    "contrastive_logits",
    "contrastive_logp",
    "contrastive_sample",
    "linear_contrastive_logp",
    "linear_contrastive_sample",
]
NAN, INF = math.nan, math.inf


def call(op: str, **changed):
    """The operator on arguments that fit, but for those that are changed."""
    linear = op.startswith("linear")
    given = {"positive": H if linear else P, "negative": H if linear else N, "alpha": 0.5}
    given |= {"linear_weight": W} if linear else {}
    given |= {"target": Y} if op.endswith("logp") else {}
    return getattr(trimtab, op)(**{**given, **changed})


def takes(op: str, names: dict) -> bool:
    return set(names) - {"impl"} <= set(inspect.signature(getattr(trimtab, op)).parameters)


def column(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


ERRORS = [
    (TypeError, "positive must be float32", {"positive": P.long()}),
    (ValueError, "positive must be of shape", {"positive": torch.tensor(1.0)}),
    (ValueError, "alpha must be finite", {"alpha": NAN}),
    (ValueError, "alpha must be finite", {"alpha": -INF}),
    (ValueError, "alpha must be finite", {"alpha": column(0.5, INF, 1.0)}),
    (TypeError, "alpha must be a number", {"alpha": "0.5"}),
    (TypeError, "alpha must be a number", {"alpha": None}),
    (TypeError, "alpha must be a number", {"alpha": [0.5, 0.5, 0.5]}),
    (ValueError, "alpha must be a number or of shape", {"alpha": torch.zeros(4)}),
    (ValueError, "alpha must be a number or of shape", {"alpha": torch.zeros(3, 1)}),
    (ValueError, "alpha must be without gradient", {"alpha": torch.zeros(3, requires_grad=True)}),
    (ValueError, "alpha must be on cpu", {"alpha": torch.zeros(3, device="meta")}),
    (ValueError, "anchor must be of shape", {"anchor": P[:2]}),
    (TypeError, "anchor must be torch.float32", {"anchor": P.double()}),
    (ValueError, "anchor must be on cpu", {"anchor": P.to("meta")}),
    (ValueError, r"plausibility must be in \(0, 1\]", {"plausibility": 0.0}),
    (ValueError, r"plausibility must be in \(0, 1\]", {"plausibility": 1.5}),
    (ValueError, r"plausibility must be in \(0, 1\]", {"plausibility": NAN}),
    (ValueError, r"plausibility must be in \(0, 1\]", {"plausibility": column(1.0, 0.5, 0.0)}),
    (TypeError, "plausibility must be a number", {"plausibility": True}),
    (ValueError, "temperature must be", {"temperature": -1.0}),
    (ValueError, "temperature must be", {"temperature": NAN}),
    (ValueError, "temperature must be", {"temperature": INF}),
    (ValueError, "temperature must be", {"temperature": column(1.0, -1.0, 1.0)}),
    (ValueError, "temperature must be", {"temperature": torch.ones(4)}),
    (TypeError, "temperature must be a number", {"temperature": "hot"}),
    (ValueError, "top_k must be", {"top_k": -1}),
    (ValueError, "top_k must be", {"top_k": column(1, -1, 1, dtype=torch.int64)}),
    (TypeError, "top_k must be an integer", {"top_k": 2.0}),
    (TypeError, "top_k must be an integer", {"top_k": True}),
    (TypeError, "top_k must be an integer", {"top_k": torch.ones(3)}),
    (ValueError, r"top_p must be in \[0, 1\]", {"top_p": 1.1}),
    (ValueError, r"top_p must be in \[0, 1\]", {"top_p": -0.1}),
    (ValueError, r"top_p must be in \[0, 1\]", {"top_p": column(0.5, NAN, 0.5)}),
    (ValueError, r"min_p must be in \[0, 1\]", {"min_p": 1.1}),
    (ValueError, r"min_p must be in \[0, 1\]", {"min_p": -0.1}),
    (ValueError, "min_p must be a number or of shape", {"min_p": torch.zeros(2)}),
    (TypeError, "seed must be an integer", {"seed": 0.5}),
    (TypeError, "seed must be an integer", {"seed": torch.zeros(3)}),
    (TypeError, "seed must be an integer", {"seed": None}),
    (ValueError, "seed must be", {"seed": 2**63}),
    (ValueError, "position must be", {"position": -(2**63) - 1}),
    (ValueError, "position must be a number or of shape", {"position": Y[:2]}),
    (TypeError, "position must be an integer", {"position": False}),
    (TypeError, "positive_rows must be int64", {"positive_rows": torch.zeros(3)}),
    (TypeError, "negative_rows must be int64", {"negative_rows": Y == 0}),
    (ValueError, "positive_rows must be of shape", {"positive_rows": Y[None]}),
    (ValueError, r"positive_rows must be in \[0, 3\)", {"positive_rows": Y + 3}),
    (ValueError, r"negative_rows must be in \[0, 3\)", {"negative_rows": Y - 1}),
    (ValueError, r"anchor_rows must be in \[0, 2\)", {"anchor": P[:2], "anchor_rows": Y + 2}),
    (ValueError, "anchor must be", {"anchor_rows": Y}),
    (ValueError, "negative_rows must be on cpu", {"negative_rows": Y.to("meta")}),
    (ValueError, "negative_rows must be of length", {"positive_rows": Y, "negative_rows": Y[:2]}),
    (ValueError, "negative must be of length", {"positive_rows": Y[:2]}),
    (TypeError, "target must be int64", {"target": Y.int()}),
    (ValueError, "target must be of shape", {"target": Y[:2]}),
    (ValueError, "target must be on cpu", {"target": Y.to("meta")}),
    (IndexError, "target must be in", {"target": Y + 5}),
    (IndexError, "target must be in", {"target": Y - 100}),
    (ValueError, "linear_weight must be of shape", {"linear_weight": W[0]}),
    (TypeError, "linear_weight must be torch.float32", {"linear_weight": W.bfloat16()}),
    (ValueError, "linear_weight must be on cpu", {"linear_weight": W.to("meta")}),
    (ValueError, "linear_bias must be of shape", {"linear_bias": torch.zeros(4)}),
    (TypeError, "linear_bias must be torch.float32", {"linear_bias": torch.zeros(5).double()}),
    (ValueError, "logit_scale must be", {"logit_scale": NAN}),
    (ValueError, "impl must be one of", {"impl": "cuda"}),
]
CASES = [
    pytest.param(op, *error, id=f"{op}-{i}-{error[1]}")
    for op in OPS
    for i, error in enumerate(ERRORS)
    if takes(op, error[2])
]


@pytest.mark.parametrize(("op", "error", "text", "changed"), CASES)
def test_errors_name_the_argument_and_the_remedy(op, error, text, changed):
    with pytest.raises(error, match=f"^{text}.*, got .*; ") as caught:
        call(op, **changed)
    assert str(caught.value)[-1] not in ".;"


@pytest.mark.parametrize("op", OPS)
def test_negative_fits_positive(op):
    like = H if op.startswith("linear") else P
    for error, text, negative in [
        (ValueError, "negative must be of shape", like[:2]),
        (ValueError, "negative must be of shape", like[0]),
        (ValueError, "negative must be of shape", torch.zeros(3, 6)),
        (TypeError, "negative must be torch.float32", like.bfloat16()),
        (ValueError, "negative must be on cpu", like.to("meta")),
    ]:
        with pytest.raises(error, match=f"^{text}.*, got .*; "):
            call(op, negative=negative)


def test_other_errors():
    with pytest.raises(ValueError, match=r"^temperature must be positive.*, got "):
        call("contrastive_logp", temperature=0.0)
    with pytest.raises(ValueError, match=r"^temperature must be positive.*, got "):
        call("linear_contrastive_logp", temperature=0.0)
    for op in ("contrastive_sample", "linear_contrastive_sample"):
        with pytest.raises(ValueError, match=r"^positive must be of shape \(B, .\), got "):
            call(op, positive=torch.zeros(2, 3, 4), negative=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"^logit_scale must be positive, got "):
        call("linear_contrastive_sample", logit_scale=-1.0)
    with pytest.raises(ValueError, match=r"^linear_weight must be non-empty, got "):
        call("linear_contrastive_sample", linear_weight=torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"^negative must be of shape \(rows, 5\), got "):
        call("contrastive_sample", positive_rows=Y, negative=torch.zeros(3, 6))


@pytest.mark.parametrize("op", OPS)
def test_a_negative_row_is_needed(op):
    """Without one alpha would be ignored in silence."""
    with pytest.raises((TypeError, ValueError), match=r"^negative must be .*, got .*; "):
        call(op, negative=None)


@pytest.mark.parametrize("op", OPS)
def test_impl_that_cannot_take_the_call(op):
    double = {"positive": (H if op.startswith("linear") else P).double()}
    double["negative"] = double["positive"]
    if op.startswith("linear"):
        double["linear_weight"] = W.double()
    with pytest.raises(TypeError, match=r"^impl must be available .*, got 'triton': dtype "):
        call(op, impl="triton", **double)


@pytest.mark.parametrize("op", OPS)
def test_explain(op, monkeypatch):
    arguments = {"positive": H if op.startswith("linear") else P, "alpha": 0.5}
    arguments["negative"] = arguments["positive"]
    if op.startswith("linear"):
        arguments["linear_weight"] = W
    if op.endswith("logp"):
        arguments["target"] = Y
    assert trimtab.explain(op, **arguments).impl == "native"
    assert trimtab.explain(op, **arguments, impl="reference") == ("reference", "asked for")
    monkeypatch.setenv("TRIMTAB_IMPL", "reference")
    assert trimtab.explain(op, **arguments).impl == "reference"
    monkeypatch.setenv("TRIMTAB_IMPL", "fastest")
    with pytest.raises(ValueError, match="impl must be one of"):
        call(op)


ROW_OPERATOR = {
    "contrastive_logits": "contrastive_logits_rows",
    "contrastive_logp": "contrastive_logp_rows",
    "contrastive_sample": "contrastive_sample_rows",
    "linear_contrastive_sample": "contrastive_sample_rows",
}


@pytest.mark.parametrize("op", ROW_OPERATOR)
@pytest.mark.parametrize("impl", [None, "native"])
def test_the_native_path_is_taken(op, impl, monkeypatch):
    calls = []
    original = getattr(torch.ops.trimtab, ROW_OPERATOR[op])
    monkeypatch.setattr(
        torch.ops.trimtab, ROW_OPERATOR[op], lambda *args: calls.append(1) or original(*args)
    )
    call(op, impl=impl)
    assert calls


@pytest.mark.op("contrastive_sample")
def test_the_implementation_named_is_the_one_that_runs(case, monkeypatch):
    """No option sends a call to the oracle in secret."""
    if case.impl == "reference":
        pytest.skip("it is the oracle")
    from trimtab.ops import contrast

    def forbidden(*args, **kwargs):
        raise AssertionError("the oracle was called")

    for name in ("contrastive_logits", "contrastive_logp", "contrastive_sample"):
        monkeypatch.setattr(contrast.reference, name, forbidden)
    p, n = (t.to(case.device) for t in (P, N))
    given = {"alpha": torch.ones(3, device=case.device), "impl": case.impl}
    trimtab.contrastive_logits(p, n, plausibility=0.5, anchor=n, **given)
    trimtab.contrastive_logp(p, n, Y.to(case.device), temperature=0.5, anchor=n, **given)
    filters = {"plausibility": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "temperature": 0.5}
    trimtab.contrastive_sample(p, n, anchor=n, **filters, **given)
    for name in filters:
        trimtab.contrastive_sample(p, n, **{name: filters[name]}, **given)


@pytest.mark.op("contrastive_sample")
def test_inputs_are_left_alone(case):
    given = rows(5, 63, device=case.device)
    p, n, a = given.logits(torch.float32)
    device = case.device
    options = {
        "alpha": torch.ones(5, device=device),
        "plausibility": torch.full((5,), 0.01, device=device),
        "temperature": torch.linspace(0.0, 1.0, 5, device=device),
        "top_k": torch.arange(5, device=device),
        "top_p": torch.linspace(0.5, 1.0, 5, device=device),
        "min_p": torch.linspace(0.0, 0.2, 5, device=device),
        "seed": torch.arange(5, device=device),
        "position": torch.arange(5, device=device),
    }
    maps = {f"{name}_rows": torch.arange(5, device=device).flip(0) for name in ("positive",)}
    everything = [p, n, a, *options.values(), *maps.values(), given.target]
    before = [tensor.clone() for tensor in everything]
    trimtab.contrastive_sample(p, n, anchor=a, **options, **maps, impl=case.impl)
    more = {"alpha": options["alpha"], "anchor": a, "impl": case.impl}
    trimtab.contrastive_logits(p, n, plausibility=options["plausibility"], **more)
    leaves = [tensor.requires_grad_() for tensor in (p, n)]
    trimtab.contrastive_logp(*leaves, given.target, **more).sum().backward()
    for tensor, value in zip(everything, before, strict=True):
        assert_same_bits(tensor.detach(), value)


@pytest.mark.op("contrastive_logp")
def test_second_backward_through_a_retained_graph(case):
    given = rows(5, 31, device=case.device)
    leaves = [tensor.requires_grad_() for tensor in given.logits(torch.float32)]
    logp = trimtab.contrastive_logp(
        *leaves[:2], given.target, alpha=0.5, anchor=leaves[2], impl=case.impl
    )
    upstream = torch.rand_like(logp)
    first = torch.autograd.grad(logp, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(-3.0)
    second = torch.autograd.grad(logp, leaves, 2 * upstream, retain_graph=True)
    third = torch.autograd.grad(logp, leaves, upstream)
    for a, b, c in zip(kept, second, third, strict=True):
        torch.testing.assert_close(2 * a, b)
        assert_same_bits(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logp, leaves, upstream)


@pytest.mark.parametrize("op", OPS)
def test_the_signature_is_the_contracts(op):
    """Order and defaults of what others call; more keyword arguments may follow."""
    parameters = inspect.signature(getattr(trimtab, op)).parameters
    names = ["positive", "negative"]
    names += ["linear_weight"] if op.startswith("linear") else []
    names += ["target"] if op.endswith("logp") else []
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == names
    defaults = {
        "anchor": None, "plausibility": None, "temperature": 1.0, "top_k": None, "top_p": None,
        "min_p": None, "seed": 0, "position": 0, "positive_rows": None, "negative_rows": None,
        "anchor_rows": None, "linear_bias": None, "impl": None,
    }  # fmt: skip
    assert parameters["alpha"].default is inspect.Parameter.empty
    for name, parameter in parameters.items():
        if name in defaults:
            assert parameter.default == defaults[name]
            assert parameter.kind is parameter.KEYWORD_ONLY
    if op.endswith("sample"):
        assert trimtab.Sampled._fields == ("token", "logp", "kept")


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 1e39), ("temperature", 1e-46), ("alpha", 1e39)]
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_parameters_fit_the_dtype_that_computes(name, value, as_tensor):
    """In float32 these are infinite, or 0, which for a temperature would mean greedy."""
    given = torch.full((len(P),), value, dtype=torch.float64) if as_tensor else value
    for op in (trimtab.contrastive_logp, trimtab.contrastive_sample):
        target = (Y,) if op is trimtab.contrastive_logp else ()
        with pytest.raises(ValueError, match=f"^{name} must be "):
            op(P, P, *target, **{"alpha": 0.5, name: given})


def test_the_contrasted_rows_may_be_changed_in_place():
    rows = P.clone().requires_grad_()
    z = trimtab.contrastive_logits(rows, P, alpha=1.0)
    z /= 2
    z.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))
