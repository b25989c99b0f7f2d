"""Token loss inside torch: its operator samples, torch.compile, opcheck, fakes, error messages."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

import trimtab
from token_loss_cases import problem
from trimtab.testing import assert_same_bits

SAMPLED = {
    op.name: op for op in op_db if op.name.endswith((".cross_entropy", ".linear_cross_entropy"))
}


def index_samples(name, dtype):
    """Torch's own samples for an operator, those with class probabilities for targets left out."""
    if f"nn.functional.{name}" not in SAMPLED:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    for sample in SAMPLED[f"nn.functional.{name}"].sample_inputs("cpu", dtype, requires_grad=True):
        target = sample.args[-1] if sample.args else sample.kwargs["target"]
        if target.dtype == torch.int64:
            yield sample


@pytest.mark.op("cross_entropy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_torchs_operator_samples(case, name, dtype):
    case.skip_unless_taken(dtype)
    count = 0
    for sample in index_samples(name, dtype):
        kwargs = {key: value for key, value in sample.kwargs.items() if key != "options"}
        head = sample.args[:-1]
        leaves = [t for t in (sample.input, *head, kwargs.get("linear_bias")) if t is not None]
        expected = getattr(F, name)(sample.input, *sample.args, **kwargs)
        actual = getattr(trimtab, name)(sample.input, *sample.args, **kwargs, impl=case.impl)
        torch.testing.assert_close(
            actual, expected, equal_nan=True, check_dtype=dtype == torch.float32
        )
        if not expected.requires_grad:
            continue
        upstream = torch.rand_like(expected)
        ours = torch.autograd.grad(actual, leaves, upstream)
        theirs = torch.autograd.grad(expected, leaves, upstream)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        count += 1
    assert count > 10


@pytest.mark.op("cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_mean_over_nothing_is_torchs_nan(case, reduction):
    for shape in ((4, 5), (0, 5)):
        logits = torch.randn(shape, requires_grad=True)
        target = torch.full(shape[:1], -100)
        expected = F.cross_entropy(logits, target, reduction=reduction)
        actual = trimtab.cross_entropy(logits, target, reduction=reduction, impl=case.impl)
        torch.testing.assert_close(actual, expected, equal_nan=True)
        actual.backward(torch.ones_like(actual))
        assert torch.equal(logits.grad, torch.zeros(shape))


def compiled(function, backend="aot_eager", **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_compile_equals_eager_to_the_bit(case, reduction, count, frozen):
    given = problem(n=12, v=31, weight_shape=(count,) if count else ())

    def loss(x, w, b, t):
        return trimtab.linear_cross_entropy(
            2.0 * x,
            w,
            given.target,
            linear_bias=b,
            token_weight=t.square(),
            reduction=reduction,
            softcap=9.0,
            impl=case.impl,
        )

    def run(function):
        leaves = [tensor.requires_grad_() for tensor in given.tensors(torch.float32)]
        if frozen:
            leaves[1].requires_grad_(False)
            leaves[2].requires_grad_(False)
        result = function(*leaves)
        result.backward(torch.linspace(0.5, 1.0, result.numel()).reshape(result.shape))
        return [result, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for ours, eager in zip(run(compiled(loss)), run(loss), strict=True):
        assert_same_bits(ours, eager)


@pytest.mark.op("linear_logp")
def test_compile_of_the_other_operators(case):
    given = problem(n=12, v=31, ignored=False)

    def everything(x, w, z):
        ratio = trimtab.linear_logp_ratio(x, w, x, w, given.target, temperature=0.9, impl=case.impl)
        logp = trimtab.linear_logp(x, w, given.target, impl=case.impl)
        rows = trimtab.cross_entropy(z, given.target, label_smoothing=0.1, impl=case.impl)
        return ratio.log_ratio.sum() + logp.logp.mean() + logp.entropy.mean() + rows, logp.predicted

    def run(function):
        leaves = [
            given.input.float().requires_grad_(),
            given.weight.float().requires_grad_(),
            torch.arange(372.0).sin().reshape(12, 31).requires_grad_(),
        ]
        total, predicted = function(*leaves)
        total.backward()
        return [total, predicted, *(leaf.grad for leaf in leaves)]

    for ours, eager in zip(run(compiled(everything)), run(everything), strict=True):
        assert_same_bits(ours.double(), eager.double())


@pytest.mark.slow
def test_compile_with_inductor():
    given = problem(n=12, v=31)

    def loss(x, w, b, t):
        return trimtab.linear_cross_entropy(
            x.tanh(), w, given.target, linear_bias=b, token_weight=t
        )

    results = []
    for function in (loss, compiled(loss, backend="inductor")):
        leaves = [tensor.requires_grad_() for tensor in given.tensors(torch.float32)]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


def test_compile_serves_new_sizes_without_a_new_graph():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def loss(x, w, y, t):
        return trimtab.linear_cross_entropy(x, w, y, token_weight=t)

    for n in (8, 13, 21):
        given = problem(n=n)
        input, weight, _, token_weight = given.tensors(torch.float32)
        expected = trimtab.linear_cross_entropy(
            input, weight, given.target, token_weight=token_weight
        )
        torch.testing.assert_close(loss(input, weight, given.target, token_weight), expected)
    assert len(graphs) == 1


def opcheck_arguments(impl):
    given = problem(n=9, v=13)
    input, weight, bias, coef = given.tensors(torch.float32)
    logits, transform = torch.randn(9, 13), (-100, 1.1, 5.0)
    vectors = [torch.empty(9) for _ in range(3)]
    head = (torch.float32, torch.float32, impl)
    yield "token_loss", (logits, given.target, coef, None, *transform, 0.1, 0.01, True, impl)
    yield (
        "token_loss",
        (logits, given.target, None, torch.rand(13), *transform, 0.0, 0.0, False, impl),
    )
    for needs in ([True, True, True], [False, False, False], [True, False, False]):
        tail = (needs, False, 4, *head)
        yield (
            "linear_token_loss",
            (input, weight, bias, given.target, coef, None, *transform, 0.1, 0.0, *tail),
        )
        yield (
            "linear_token_logp_backward",
            (
                input,
                weight,
                bias,
                given.target,
                None,
                *transform,
                coef,
                None,
                coef,
                needs,
                4,
                *head,
            ),
        )
    yield (
        "linear_token_logp",
        (input, weight, None, given.target, coef.abs() + 1, *transform, True, 4, *head[1:]),
    )
    if impl == "native":
        grad = torch.empty(9, 13)
        yield (
            "token_loss_rows",
            (logits, given.target, coef, None, *transform, 0.1, 0.0, vectors[0], grad),
        )
        predicted = torch.empty(9, dtype=torch.int64)
        yield "token_logp_rows", (logits, given.target, None, *transform, *vectors, predicted, grad)
        yield (
            "token_logp_rows_backward",
            (logits, given.target, None, *transform, coef, coef, None, grad),
        )
        yield "accumulate", (grad, logits.clone(), torch.empty(9, 13))


@pytest.mark.parametrize("index", range(14))
def test_opcheck(case, index):
    arguments = [] if case.impl == "reference" else list(opcheck_arguments(case.impl))
    if index >= len(arguments):
        pytest.skip("no such operator for this implementation")
    name, args = arguments[index]
    torch.library.opcheck(getattr(torch.ops.trimtab, name).default, args)


def test_shapes_and_dtypes_on_a_fake_cuda_device():
    with FakeTensorMode():
        input = torch.empty(4, 6, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(50, 8, device="cuda", dtype=torch.bfloat16)
        target = torch.empty(4, 6, device="cuda", dtype=torch.int64)
        chosen = trimtab.explain("linear_cross_entropy", input, weight, target).impl
        assert chosen == "triton"
        loss = trimtab.linear_cross_entropy(input, weight, target, reduction="none")
        assert (loss.shape, loss.dtype, loss.device.type) == ((4, 6), torch.float32, "cuda")
        logp = trimtab.linear_logp(input, weight, target, temperature=0.5)
        assert [field.dtype for field in logp] == [torch.float32] * 3 + [torch.int64]


X, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
ERRORS = [
    (ValueError, "linear_weight must be of shape", {"linear_weight": torch.zeros(5)}),
    (ValueError, "linear_weight must be non-empty", {"linear_weight": torch.zeros(0, 4)}),
    (ValueError, "input must be of shape", {"input": torch.zeros(3, 5)}),
    (ValueError, "target must be of shape", {"target": torch.zeros(4, dtype=torch.int64)}),
    (TypeError, "target must be int64", {"target": torch.zeros(3)}),
    (TypeError, "target must be int64", {"target": torch.zeros(3, dtype=torch.int32)}),
    (ValueError, "linear_bias must be of shape", {"linear_bias": torch.zeros(4)}),
    (TypeError, "linear_bias must be torch.float32", {"linear_bias": torch.zeros(5).double()}),
    (TypeError, "linear_weight must be torch.float32", {"linear_weight": W.bfloat16()}),
    (TypeError, "input must be float32", {"input": X.long()}),
    (ValueError, "weight must be of shape", {"weight": torch.zeros(3)}),
    (ValueError, "weight must be without gradient", {"weight": torch.zeros(5, requires_grad=True)}),
    (TypeError, "weight must be float32", {"weight": torch.zeros(5, dtype=torch.int64)}),
    (ValueError, "token_weight must be of shape", {"token_weight": torch.zeros(3, 2)}),
    (TypeError, "token_weight must be float32", {"token_weight": torch.zeros(3, dtype=torch.bool)}),
    (ValueError, "reduction must be", {"reduction": "batchmean"}),
    (ValueError, "normalizer must be None", {"reduction": "sum", "normalizer": 3.0}),
    (ValueError, "normalizer must be a number", {"normalizer": "tokens"}),
    (ValueError, "normalizer must be one number", {"normalizer": torch.ones(2)}),
    (ValueError, "token_weight must be given", {"normalizer": "token_weight"}),
    (ValueError, "label_smoothing must be in", {"label_smoothing": 1.5}),
    (ValueError, "softcap must be positive", {"softcap": 0.0}),
    (ValueError, "logit_scale must be finite", {"logit_scale": float("nan")}),
    (TypeError, "logit_scale must be a number", {"logit_scale": torch.tensor(1.0)}),
    (ValueError, "lse_square_scale must be finite", {"lse_square_scale": float("inf")}),
    (ValueError, "input must be of shape", {"linear_weight": torch.zeros(5, 2, 3)}),
    (
        ValueError,
        "options must be None",
        {"linear_weight": torch.zeros(5, 2, 4), "options": trimtab.TokenLossOptions()},
    ),
    (TypeError, "options must be a TokenLossOptions", {"options": {"chunk_size": 3}}),
    (ValueError, "impl must be one of", {"impl": "cuda"}),
    (
        TypeError,
        "impl must be available",
        {"impl": "triton", "input": X.double(), "linear_weight": W.double()},
    ),
    (IndexError, "target must be in", {"target": Y + 5}),
    (IndexError, "target must be in", {"target": Y - 1}),
    (ValueError, "linear_weight must be on", {"linear_weight": W.to("meta")}),
]


@pytest.mark.parametrize(("error", "text", "changed"), ERRORS, ids=[text for _, text, _ in ERRORS])
def test_errors_name_the_argument_and_the_remedy(error, text, changed):
    arguments = {"input": X, "linear_weight": W, "target": Y, **changed}
    with pytest.raises(error, match=f"^{text}.*, got .*; ") as caught:
        trimtab.linear_cross_entropy(**arguments)
    assert str(caught.value)[-1] not in ".;"


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (
            ValueError,
            "temperature must be positive",
            lambda: trimtab.linear_logp(X, W, Y, temperature=0.0),
        ),
        (
            ValueError,
            "temperature must be positive",
            lambda: trimtab.linear_logp(X, W, Y, temperature=Y.float()),
        ),
        (
            ValueError,
            "temperature must be a number",
            lambda: trimtab.linear_logp(X, W, Y, temperature=X),
        ),
        (
            ValueError,
            "temperature must be without",
            lambda: trimtab.linear_logp(X, W, Y, temperature=torch.ones(3, requires_grad=True)),
        ),
        (IndexError, "target must be in", lambda: trimtab.linear_logp(X, W, Y - 100)),
        (
            ValueError,
            "input must be of shape",
            lambda: trimtab.cross_entropy(torch.tensor(1.0), Y[0]),
        ),
        (
            ValueError,
            "input must be of at least",
            lambda: trimtab.cross_entropy(torch.zeros(3, 0), Y),
        ),
        (
            ValueError,
            "target must be of shape",
            lambda: trimtab.cross_entropy(torch.zeros(3, 4, 2), Y),
        ),
        (ValueError, "chunk_size must be", lambda: trimtab.TokenLossOptions(chunk_size=0)),
        (
            TypeError,
            "accum_dtype must be",
            lambda: trimtab.TokenLossOptions(accum_dtype=torch.int32),
        ),
        (ValueError, "op_name must be one of", lambda: trimtab.explain("softmax", X)),
    ],
)
def test_errors_of_the_other_operators(error, text, call):
    with pytest.raises(error, match=f"^{text}.*, got "):
        call()


def test_native_row_operators_check_what_they_are_given():
    """A wrong call of the compiled operators raises; it never reads outside its tensors."""
    rows, loss, target = torch.ops.trimtab.token_loss_rows.default, torch.empty(3), Y
    tail = (-100, 1.0, 0.0, 0.0, 0.0)
    good = (X, target, None, None, *tail, loss, None)
    rows(*good)
    for place, value in [
        (0, X.t()),
        (0, X[0]),
        (0, X.long()),
        (1, Y[:2]),
        (1, Y.int()),
        (2, torch.ones(2)),
        (3, torch.ones(3)),
        (9, torch.empty(4)),
        (9, loss.double()),
        (10, torch.empty(2, 4)),
    ]:
        bad = list(good)
        bad[place] = value
        with pytest.raises(RuntimeError, match="must"):
            rows(*bad)


def test_a_bad_target_poisons_only_its_row():
    """Without the check (CUDA's default) the kernel answers NaN and stays inside the row."""
    target = torch.tensor([1, 4, -5])
    loss, grad = torch.empty(3), torch.empty(3, 4)
    torch.ops.trimtab.token_loss_rows(X, target, None, None, -100, 1.0, 0.0, 0.0, 0.0, loss, grad)
    assert torch.isnan(loss).tolist() == [False, True, True]
    assert torch.isnan(grad).all(1).tolist() == [False, True, True]


def test_explain_names_the_choice(monkeypatch):
    assert trimtab.explain("linear_logp", X, W, Y).impl == "native"
    assert trimtab.explain("cross_entropy", X, Y, impl="reference").reason == "asked for"
    monkeypatch.setenv("TRIMTAB_IMPL", "reference")
    assert trimtab.explain("cross_entropy", X, Y).impl == "reference"
    monkeypatch.setenv("TRIMTAB_IMPL", "fastest")
    with pytest.raises(ValueError, match="impl must be one of"):
        trimtab.cross_entropy(X, Y)


def test_the_native_path_is_taken(monkeypatch):
    """Nobody notices a fused path that silently is not used, unless a test asserts that it runs."""
    calls = []
    original = torch.ops.trimtab.token_loss_rows
    monkeypatch.setattr(
        torch.ops.trimtab, "token_loss_rows", lambda *args: calls.append(1) or original(*args)
    )
    trimtab.linear_cross_entropy(X, W, Y)
    assert calls
