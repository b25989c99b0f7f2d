"""Drop-ins for other packages' losses: their signatures, and their meaning in plain torch."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch.nn import functional as F

from trimtab.compat import cce, liger
from trimtab.testing import assert_within_budget, values_and_grads

N, D, V = 37, 16, 63
LIGER = {
    "plain": {},
    "z-loss": {"lse_square_scale": 0.02, "return_z_loss": True},
    "smoothing": {"label_smoothing": 0.1, "softcap": 3.0},
    "class weights": {"ce_weight": True, "label_smoothing": 0.1},
    "two divisors": {"ce_weight": True, "lse_square_scale": 0.02, "return_z_loss": True},
    "scaling": {"use_token_scaling": True, "lse_square_scale": 0.02, "return_z_loss": True},
    "everything": {
        "ce_weight": True, "softcap": 3.0, "use_token_scaling": True, "lse_square_scale": 0.02,
        "label_smoothing": 0.2, "return_z_loss": True, "return_token_accuracy": True,
        "return_predicted_tokens": True, "chunk_mem_const": 2,
    },
}  # fmt: skip


def head(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,))]
    target = torch.randint(V, (N,), generator=generator)
    target[::5] = -100
    return [tensor.to(dtype) for tensor in tensors], target


def class_weights(dtype):
    return (torch.rand(V, generator=torch.Generator().manual_seed(1)) + 0.1).to(dtype)


def plain_liger(input, weight, target, bias, ce_weight=None, ignore_index=-100,
                lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", softcap=None,
                use_token_scaling=False, **_):  # fmt: skip
    """Liger's loss and z-loss from logits."""
    logits = F.linear(input, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = target != ignore_index
    loss = F.cross_entropy(logits, target, ce_weight, ignore_index=ignore_index, reduction="none",
                           label_smoothing=label_smoothing)  # fmt: skip
    z_loss = torch.where(kept, lse_square_scale * logits.logsumexp(-1) ** 2, 0.0)
    if use_token_scaling:
        scale = logits.softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0].detach()
        loss, z_loss = loss * scale, z_loss * scale
    if reduction == "mean":
        total = kept.sum() if ce_weight is None else ce_weight[target[kept]].sum()
        loss, z_loss = loss / total, z_loss / kept.sum()
    loss = loss + z_loss
    return (loss, z_loss) if reduction == "none" else (loss.sum(), z_loss.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", LIGER)
def test_liger_is_what_it_says(options, reduction):
    given = {**LIGER[options], "reduction": reduction}
    found = {}

    def ours(input, weight, bias):
        kwargs = {
            k: class_weights(input.dtype) if k == "ce_weight" else v for k, v in given.items()
        }
        out = liger.liger_fused_linear_cross_entropy(input, weight, target, bias, **kwargs)
        if isinstance(out, torch.Tensor):
            return out
        found.update(vars(out))
        return out.loss

    def theirs(input, weight, bias):
        kwargs = {
            k: class_weights(input.dtype) if k == "ce_weight" else v for k, v in given.items()
        }
        loss, z_loss = plain_liger(input, weight, target, bias, **kwargs)
        found["expected"] = z_loss.detach()
        return loss

    tensors, target = head()
    truth = values_and_grads(theirs, tensors)
    z_truth = found["expected"]
    eager = values_and_grads(theirs, [tensor.float() for tensor in tensors])
    z_eager = found["expected"]
    actual = values_and_grads(ours, [tensor.float() for tensor in tensors])
    for mine, their, true in zip(actual, eager, truth, strict=True):
        assert_within_budget(mine, their, true, scale=float(truth[0].abs().max()))
    if "return_z_loss" in given:
        assert_within_budget(found["z_loss"], z_eager, z_truth)
        assert not found["z_loss"].requires_grad
    if "return_predicted_tokens" in given:
        logits = F.linear(tensors[0], tensors[1], tensors[2])
        kept = target != -100
        expected = torch.where(kept, logits.argmax(-1), -1)
        right = ((expected == target) & kept).float()
        accuracy = right if reduction == "none" else right.sum() / kept.sum()
        assert torch.equal(found["predicted_tokens"], expected)
        assert torch.equal(found["token_accuracy"], accuracy)


def test_liger_of_nothing_is_zero():
    (input, weight, bias), target = head(torch.float32)
    for ce_weight in (None, class_weights(torch.float32)):
        loss, *grads = values_and_grads(
            lambda x, w, b, c=ce_weight: liger.liger_fused_linear_cross_entropy(
                x, w, torch.full_like(target, -100), b, c, -100, 0.1
            ),
            [input, weight, bias],
        )
        assert float(loss) == 0.0
        assert all(not grad.any() for grad in grads)


def test_liger_counts_no_ignored_token_as_right():
    (input, weight, bias), target = head(torch.float32)
    target = target.masked_fill(target == -100, -1)  # what `predicted_tokens` says of them too
    out = liger.liger_fused_linear_cross_entropy(
        input, weight, target, bias, ignore_index=-1, reduction="sum", return_token_accuracy=True,
        return_predicted_tokens=True,
    )  # fmt: skip
    right = (out.predicted_tokens == target) & (target != -1)
    assert float(out.token_accuracy) == pytest.approx(float(right.sum() / (target != -1).sum()))


def test_liger_as_a_module():
    (input, weight, bias), target = head(torch.float32)
    module = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=2.0)
    expected, _ = plain_liger(input, weight, target, bias, reduction="sum", softcap=2.0)
    wide, _ = plain_liger(input.double(), weight.double(), target, bias.double(), reduction="sum",
                          softcap=2.0)  # fmt: skip
    assert_within_budget(module(weight, input, target, bias), expected, wide)


def test_liger_chunks_are_as_large_as_asked():
    input, weight = torch.empty(100, 8), torch.empty(64, 8)
    # 64 / (2 * 8) = 4 chunks of 25 rows, rounded up to a power of two.
    assert liger._chunk_size(input, weight, 2) == 32
    assert liger._chunk_size(input, weight, 8) == 100
    assert liger._chunk_size(input, weight, 1) is None
    (input, weight, _), target = head()
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="chunk_mem_const must be a positive integer"):
            liger.liger_fused_linear_cross_entropy(input, weight, target, chunk_mem_const=wrong)


def plain_cce(e, c, targets, softcap, reduction, shift):
    logits = F.linear(e, c)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if shift:
        logits, targets = logits[..., :-1, :], targets[..., 1:]
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    return loss.reshape(targets.shape) if reduction == "none" else loss


@pytest.mark.parametrize(
    ("softcap", "reduction", "shift", "batched"),
    list(itertools.product([None, 3.0], ["mean", "sum", "none"], [False, True], [False, True])),
)
def test_cce_is_what_it_says(softcap, reduction, shift, batched):
    (e, c, _), targets = head()
    if batched:
        e, targets = e[:36].reshape(3, 12, D), targets[:36].reshape(3, 12)

    def ours(e, c):
        return cce.linear_cross_entropy(e, c, targets, -100, softcap, reduction, shift)

    def theirs(e, c):
        return plain_cce(e, c, targets, softcap, reduction, shift)

    truth = values_and_grads(theirs, [e, c])
    eager = values_and_grads(theirs, [e.float(), c.float()])
    actual = values_and_grads(ours, [e.float(), c.float()])
    for mine, their, true in zip(actual, eager, truth, strict=True):
        assert_within_budget(mine, their, true, scale=float(truth[0].abs().max()))


def test_cce_as_a_module_and_its_gradient_is_exact_whatever_the_filter():
    (e, c, _), targets = head(torch.float32)

    def run(filter_eps):
        module = cce.LinearCrossEntropy(softcap=3.0, reduction="sum", filter_eps=filter_eps)
        return values_and_grads(lambda e, c: module(e, c, targets), [e, c])

    exact = run(None)
    for filter_eps in ("auto", "high", 0.5):
        for mine, true in zip(run(filter_eps), exact, strict=True):
            assert torch.equal(mine, true)


def test_cce_refuses_what_it_can_not_do():
    (e, c, _), targets = head(torch.float32)
    with pytest.raises(ValueError, match="impl must be 'cce'"):
        cce.linear_cross_entropy(e, c, targets, impl="torch_compile")
    with pytest.raises(ValueError, match="filter_eps must be None"):
        cce.linear_cross_entropy(e, c, targets, filter_eps="low")
    with pytest.raises(ValueError, match="targets must have the shape"):
        cce.linear_cross_entropy(e, c, targets[1:], shift=True)
    with pytest.raises(ValueError, match="reduction must be"):
        cce.linear_cross_entropy(e, c, targets, reduction="median")


def parameters(function):
    """Names, order and defaults; an enumeration counts as its name."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, getattr(p.default, "name", p.default)) for p in found]


def test_signatures_of_liger():
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    name = "liger_fused_linear_cross_entropy"
    assert parameters(getattr(liger, name)) == parameters(getattr(functional, name))
    for method in ("__init__", "forward"):
        own = getattr(LigerFusedLinearCrossEntropyLoss, method)
        assert parameters(getattr(liger.LigerFusedLinearCrossEntropyLoss, method)) == parameters(
            own
        )
    fields = [list(inspect.signature(m.CrossEntropyOutput).parameters) for m in (liger, functional)]
    assert fields[0] == fields[1]


def test_signatures_of_cce():
    package = pytest.importorskip("cut_cross_entropy")
    for ours, theirs in [
        (cce.linear_cross_entropy, package.linear_cross_entropy),
        (cce.LinearCrossEntropy.__init__, package.LinearCrossEntropy.__init__),
        (cce.LinearCrossEntropy.forward, package.LinearCrossEntropy.forward),
    ]:
        own = [(n, d.lower() if n == "impl" else d) for n, d in parameters(theirs)]
        assert parameters(ours) == own
    # Their enumeration is taken too.
    (e, c, _), targets = head(torch.float32)
    loss = cce.linear_cross_entropy(e, c, targets, impl=package.LinearCrossEntropyImpl.CCE)
    assert torch.equal(loss, cce.linear_cross_entropy(e, c, targets))
