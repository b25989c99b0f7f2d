"""``project_out``: values and gradients in every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trimtab
from orthogonal_cases import array, normal
from trimtab.testing import assert_same_bits, assert_within_budget, max_error

pytestmark = [pytest.mark.op("project_out"), pytest.mark.usefixtures("poison")]

SIXTEENS = (torch.bfloat16, torch.float16)
# (n, k, d); the last one has more rows than a thread takes.
SHAPES = [(1, 1, 1), (3, 2, 7), (63, 3, 127), (5, 33, 252), (8, 16, 507), (0, 2, 4), (4, 0, 6),
          (2, 3, 3), (130, 40, 96), (400, 3, 4100)]  # fmt: skip


def basis(k: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q.mT.contiguous().to(dtype)


def pairs(dtype=torch.float32, device="cpu", shapes=SHAPES):
    return ([normal(n, d, dtype=dtype).to(device) for n, _, d in shapes],
            [basis(k, d, dtype).to(device) for _, k, d in shapes])  # fmt: skip


def oracle(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    t, q = array(tensor), array(rows)
    return torch.as_tensor(t - np.einsum("nd,kd,ke->ne", t, q, q, optimize=True))


def eager(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return tensor - (tensor @ rows.mT) @ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEENS])
def test_odd_shapes_within_the_budget(case, dtype):
    case.skip_unless_taken(dtype)
    tensors, bases = pairs(dtype, case.device)
    found = trimtab.project_out(tensors, bases, impl=case.impl)
    assert len(found) == len(tensors)
    for m, (out, t, q) in enumerate(zip(found, tensors, bases, strict=True)):
        assert (out.shape, out.dtype) == (t.shape, t.dtype)
        scale = float(t.abs().max()) if t.numel() else 0.0
        assert_within_budget(out.cpu(), eager(t, q).cpu(), oracle(t, q), name=str(m), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_tensors(case, dtype):
    case.skip_unless_taken(dtype)
    wide, q = normal(50, 90, dtype=dtype).to(case.device), basis(5, 30, dtype).to(case.device)
    tensors = [wide[:30, :9].mT, wide[:4, 1:90:3], wide[:1, :30].expand(6, 30)]
    bases = [q, q.mT.contiguous().mT, basis(60, 30, dtype).to(case.device)[:30:7]]
    for out, t, rows in zip(trimtab.project_out(tensors, bases, impl=case.impl), tensors, bases,
                            strict=True):  # fmt: skip
        scale = float(t.abs().max())
        assert_within_budget(out.cpu(), eager(t, rows).cpu(), oracle(t, rows), scale=scale)


def test_what_lies_in_the_subspace_goes_and_the_rest_stays(case):
    q = basis(6, 40).to(case.device)
    inside = normal(9, 6).to(case.device) @ q
    outside = trimtab.project_out([normal(9, 40).to(case.device)], [q], impl="reference")[0]
    gone, kept = trimtab.project_out([inside, outside], [q, q], impl=case.impl)
    assert float(gone.abs().max()) <= 1e-5
    assert max_error(kept.cpu(), outside.double().cpu()) <= 1e-6


def test_an_empty_basis_leaves_the_bits(case):
    t = normal(5, 8).to(case.device)
    (out,) = trimtab.project_out([t], [t[:0]], impl=case.impl)
    assert_same_bits(out, t)
    assert out.data_ptr() != t.data_ptr()


def test_dtypes_may_differ_within_and_between_pairs(case):
    """The result keeps its tensor's dtype, whatever the basis has."""
    q = basis(4, 24)
    tensors = [normal(3, 24, dtype=torch.float16), normal(3, 24), normal(5, 24).half()]
    tensors = [t.to(case.device) for t in tensors]
    bases = [b.to(case.device) for b in (q, q.half(), q.half())]
    found = trimtab.project_out(tensors, bases, impl=case.impl)
    assert [out.dtype for out in found] == [t.dtype for t in tensors]
    for out, t, rows in zip(found, tensors, bases, strict=True):
        common = torch.promote_types(t.dtype, rows.dtype)
        plain = eager(t.to(common), rows.to(common)).to(t.dtype)
        scale = float(t.abs().max())
        assert_within_budget(out.cpu(), plain.cpu(), oracle(t, rows), scale=scale)


@pytest.mark.parametrize("both", [False, True], ids=["tensors", "tensors and bases"])
def test_gradients(case, both):
    tensors, bases = pairs(device=case.device, shapes=SHAPES[1:4])
    upstream = [normal(*t.shape).to(case.device) for t in tensors]

    def grads(function, dtype):
        rows = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        spans = [q.to(dtype, copy=True).requires_grad_(both) for q in bases]
        outs = function(rows, spans)
        torch.autograd.backward(outs, [u.to(dtype) for u in upstream])
        return [leaf.grad for leaf in (*rows, *(spans if both else ()))]

    def plain(rows, spans):
        return [eager(t, q) for t, q in zip(rows, spans, strict=True)]

    def ours(rows, spans):
        return trimtab.project_out(rows, spans, impl=case.impl)

    found, near, truth = (
        grads(ours, torch.float32), grads(plain, torch.float32), grads(plain, torch.float64),
    )  # fmt: skip
    for three in zip(found, near, truth, strict=True):
        assert_within_budget(*three, scale=float(three[2].abs().max()) + 3.0)


def test_a_basis_made_of_the_tensor(case):
    """The gradient runs through the basis too, once."""
    x = normal(3, 5).to(case.device).requires_grad_()
    upstream = normal(3, 5).to(case.device)
    (out,) = trimtab.project_out([x], [0.3 * x], impl=case.impl)
    (found,) = torch.autograd.grad(out, x, upstream)
    (expected,) = torch.autograd.grad(eager(x, 0.3 * x), x, upstream)
    torch.testing.assert_close(found, expected)


def test_gradcheck():
    tensors, bases = pairs(torch.float64, shapes=SHAPES[:2])
    inputs = [t.requires_grad_() for t in (*tensors, *bases)]
    for impl in ("reference", None):

        def project(*given, impl=impl):
            return tuple(trimtab.project_out(given[:2], given[2:], impl=impl))

        assert torch.autograd.gradcheck(project, inputs)
        assert torch.autograd.gradgradcheck(project, inputs)


def test_same_inputs_same_bits(case):
    tensors, bases = pairs(device=case.device)
    first = trimtab.project_out(tensors, bases, impl=case.impl)
    for _ in range(3):
        again = trimtab.project_out(tensors, bases, impl=case.impl)
        for out, once in zip(again, first, strict=True):
            assert_same_bits(out, once)


def test_nothing_to_do():
    assert trimtab.project_out([], []) == []
