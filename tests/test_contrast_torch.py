"""Contrast inside torch: torch.compile, opcheck, fakes, functional_call, deterministic mode."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trimtab
from contrast_cases import rows
from trimtab.testing import assert_same_bits

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

B, V, D = 6, 31, 8


def compiled(function, backend="aot_eager", **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


def leaves_of(case, *names):
    generator = torch.Generator().manual_seed(2)
    shapes = {"p": (B, V), "n": (B, V), "a": (B, V), "h": (B, D), "g": (B, D), "w": (V, D)}
    shapes["b"] = (V,)
    return [
        torch.randn(shapes[name], generator=generator).to(case.device).requires_grad_()
        for name in names
    ]


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("per_row", [False, True], ids=["numbers", "rows"])
def test_compile_of_logits_and_logp(case, anchored, per_row):
    target = torch.arange(B, device=case.device)
    row = torch.linspace(0.5, 1.5, B, device=case.device)
    alpha, heat, beta = (row, row + 0.1, row / 2) if per_row else (1.5, 0.7, 0.1)

    def both(p, n, a):
        more = {"alpha": alpha, "anchor": a if anchored else None, "impl": case.impl}
        logp = trimtab.contrastive_logp(2 * p, n, target, temperature=heat, **more)
        z = trimtab.contrastive_logits(p, n, plausibility=beta, **more)
        return logp, z.masked_fill(z == -torch.inf, 0.0)

    def run(function):
        leaves = leaves_of(case, "p", "n", "a")
        outputs = function(*leaves)
        torch.autograd.backward(outputs, [torch.linspace(-1, 1, o.numel(), device=o.device)
                                          .view(o.shape) for o in outputs])  # fmt: skip
        return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    results, expected = run(compiled(both)), run(both)
    assert len(results) == len(expected) == (5 if anchored else 4)
    for ours, eager in zip(results, expected, strict=True):
        assert_same_bits(ours, eager)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("per_row", [False, True], ids=["numbers", "rows"])
def test_compile_of_sample(case, per_row):
    p, n, a = (leaf.detach() for leaf in leaves_of(case, "p", "n", "a"))
    row = torch.linspace(0.0, 0.9, B, device=case.device)
    index = torch.arange(B, device=case.device)
    options = {
        "alpha": row if per_row else 0.5,
        "plausibility": row * 0.01 + 0.001 if per_row else 0.01,
        "temperature": row if per_row else 0.7,
        "top_k": index if per_row else 20,
        "top_p": row if per_row else 0.9,
        "min_p": row / 10 if per_row else 0.02,
        "seed": index * 7 if per_row else 7,
        "position": index if per_row else 5,
    }
    maps = {"positive_rows": index.flip(0)} if per_row else {}

    def sample(p, n, a):
        return trimtab.contrastive_sample(p, n, anchor=a, impl=case.impl, **options, **maps)

    for ours, eager in zip(compiled(sample)(p, n, a), sample(p, n, a), strict=True):
        assert_same_bits(ours, eager)


@pytest.mark.op("linear_contrastive_sample")
@pytest.mark.parametrize("beta", [None, 0.1])
def test_compile_of_the_linear_forms(case, beta):
    target = torch.arange(B, device=case.device)

    def both(h, g, w, b):
        logp = trimtab.linear_contrastive_logp(
            h, g, w, target, alpha=0.5, linear_bias=b, temperature=0.9, impl=case.impl
        )
        drawn = trimtab.linear_contrastive_sample(
            h, g, w, alpha=0.5, linear_bias=b, plausibility=beta, top_p=0.9, impl=case.impl
        )
        return logp, *drawn

    def run(function):
        leaves = leaves_of(case, "h", "g", "w", "b")
        outputs = function(*leaves)
        outputs[0].backward(torch.linspace(-1, 1, B, device=case.device))
        return [*outputs, *(leaf.grad for leaf in leaves)]

    for ours, eager in zip(run(compiled(both)), run(both), strict=True):
        assert_same_bits(ours.detach(), eager.detach())


@pytest.mark.slow
def test_compile_with_inductor():
    target = torch.arange(B)
    cpu = type("case", (), {"device": "cpu"})

    def step(p, n):
        logp = trimtab.contrastive_logp(p.tanh(), n, target, alpha=0.5)
        return logp, trimtab.contrastive_sample(p.tanh(), n, alpha=0.5, temperature=0.0).token

    results = []
    for function in (step, compiled(step, backend="inductor")):
        p, n = leaves_of(cpu, "p", "n")
        logp, token = function(p, n)
        logp.sum().backward()
        results.append([logp.detach(), token, p.grad, n.grad])
    torch.testing.assert_close(*results)


@pytest.mark.op("contrastive_sample")
def test_compile_serves_new_steps_and_sizes_without_a_new_graph(case):
    """Decoding: every step has another position, and now and then another batch."""
    if case.impl == "reference":
        pytest.skip("the oracle makes no promise of graphs")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def step(p, n, position):
        return trimtab.contrastive_sample(p, n, alpha=0.5, position=position, impl=case.impl)

    for b, position in [(4, 7), (4, 8), (9, 9), (5, 1000)]:
        p, n = rows(b, V, device=case.device).logits(torch.float32, 2)
        expected = trimtab.contrastive_sample(p, n, alpha=0.5, position=position, impl=case.impl)
        for ours, eager in zip(step(p, n, position), expected, strict=True):
            assert_same_bits(ours, eager)
    assert len(graphs) == 1


def opcheck_arguments(case):
    p, n, a = (leaf.detach() for leaf in leaves_of(case, "p", "n", "a"))
    y = torch.arange(B, device=case.device)
    row = torch.linspace(0.5, 1.5, B, device=case.device)
    logp = (p, n, a, y, 0.0, row, 0.7, None, -100)
    plain = (p, n, None, y, 1.5, None, 0.0, row, 3)
    filters = (0.5, None, -2.0, None, 0.7, None, 9, None, 0.1, None, -3.0, None, 7, None, 5, None)
    per_row = (0.0, row, 0.0, -row, 0.0, row, 0, y, 0.0, row / 4, 0.0, -row, 0, y * 3, 0, y)
    outputs = torch.empty(B, dtype=torch.int64), torch.empty(B), torch.empty_like(y)
    yield "contrastive_logits", (p, n, a, 1.5, None, -2.0, None, case.impl)
    yield "contrastive_logits", (p, n, None, 0.0, row, 0.0, -row, case.impl)
    yield "contrastive_logp", (*logp, case.impl)
    yield "contrastive_logp", (*plain, case.impl)
    yield "contrastive_logp_backward", (*logp, row, [True, True, True], case.impl)
    yield "contrastive_logp_backward", (*plain, row, [False, True, False], case.impl)
    yield "contrastive_sample", (p, n, a, None, None, None, *filters, B, case.impl)
    yield "contrastive_sample", (p, n, a, y, y.flip(0), y, *per_row, B, case.impl)
    yield "contrastive_sample", (p, None, None, y[:2], None, None, *filters, 2, case.impl)
    if case.impl == "native":
        grads = [torch.empty(B, V) for _ in range(3)]
        outputs = (torch.empty_like(y), torch.empty(B), torch.empty_like(y))
        yield "contrastive_logits_rows", (p, n, a, 1.5, None, -2.0, None, grads[0])
        yield "contrastive_logp_rows", (*logp, outputs[1])
        yield "contrastive_logp_rows_backward", (*logp, row, *grads)
        yield "contrastive_sample_rows", (p, n, a, y, None, y, *per_row, *outputs)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("index", range(13))
def test_opcheck(case, index):
    arguments = [] if case.impl == "reference" else list(opcheck_arguments(case))
    if index >= len(arguments):
        pytest.skip("no such operator for this implementation")
    name, args = arguments[index]
    torch.library.opcheck(getattr(torch.ops.trimtab, name).default, args)


def test_shapes_and_dtypes_on_a_fake_cuda_device():
    with FakeTensorMode():
        p = torch.empty(4, 50, device="cuda", dtype=torch.bfloat16)
        one = torch.empty(1, 50, device="cuda", dtype=torch.bfloat16)
        h = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        w = torch.empty(50, 8, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(4, device="cuda", dtype=torch.int64)
        assert trimtab.explain("contrastive_sample", p, p, alpha=0.5).impl == "triton"
        z = trimtab.contrastive_logits(p, p, alpha=0.5)
        assert (z.shape, z.dtype, z.device.type) == ((4, 50), torch.float32, "cuda")
        for logp in (
            trimtab.contrastive_logp(p, p, y, alpha=0.5),
            trimtab.linear_contrastive_logp(h, h, w, y, alpha=0.5),
        ):
            assert (logp.shape, logp.dtype) == ((4,), torch.float32)
        drawn_rows = [
            trimtab.contrastive_sample(p, p, alpha=0.5, top_p=0.9),
            trimtab.contrastive_sample(one, p, alpha=0.5, positive_rows=y),
        ]
        # A fake CUDA tensor can be sliced only in a build of torch that knows CUDA.
        if torch.backends.cuda.is_built():
            drawn_rows.append(
                trimtab.linear_contrastive_sample(h, h, w, alpha=0.5, plausibility=0.1)
            )
        for drawn in drawn_rows:
            assert [field.shape for field in drawn] == [(4,)] * 3
            assert [field.dtype for field in drawn] == [torch.int64, torch.float32, torch.int64]


@pytest.mark.op("linear_contrastive_logp")
def test_functional_call(case):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(D, V)

        def forward(self, h, g, target):
            return trimtab.linear_contrastive_logp(
                h, g, self.head.weight, target, alpha=0.5, linear_bias=self.head.bias,
                impl=case.impl,
            )  # fmt: skip

    model = Model().to(case.device)
    replaced = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    h, g = leaves_of(case, "h", "g")
    target = torch.arange(B, device=case.device)
    logp = torch.func.functional_call(model, replaced, (h, g, target))
    torch.testing.assert_close(logp, -torch.full((B,), float(V), device=case.device).log())


@pytest.mark.op("contrastive_logp")
def test_deterministic_mode_changes_nothing(case):
    given = rows(B, V, device=case.device)

    def run():
        leaves = [tensor.requires_grad_() for tensor in given.logits(torch.float32)]
        more = {"alpha": 0.5, "anchor": leaves[2], "impl": case.impl}
        logp = trimtab.contrastive_logp(*leaves[:2], given.target, **more)
        logp.sum().backward()
        drawn = trimtab.contrastive_sample(*leaves[:2], top_p=0.9, plausibility=0.01, **more)
        return [logp.detach(), *(leaf.grad for leaf in leaves), *drawn]

    plain = run()
    torch.use_deterministic_algorithms(True)
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(again, plain, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.op("contrastive_logp")
def test_autocast_leaves_rows_of_logits_alone(case):
    given = rows(B, V, device=case.device)
    p, n = given.logits(torch.float32, 2)

    def run():
        more = {"alpha": 0.5, "impl": case.impl}
        return [
            trimtab.contrastive_logits(p, n, **more),
            trimtab.contrastive_logp(p, n, given.target, **more),
            *trimtab.contrastive_sample(p, n, top_p=0.9, **more),
        ]

    plain = run()
    with torch.autocast(case.device, dtype=torch.bfloat16):
        for ours, theirs in zip(run(), plain, strict=True):
            assert ours.dtype == theirs.dtype
            assert_same_bits(ours, theirs)
