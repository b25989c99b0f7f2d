"""Gradient projection: what was learned on protected inputs stays, whatever the optimizer does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trimtab.algorithms import gradient_projection
from trimtab.algorithms.gradient_projection import GradientProjection
from trimtab.testing import max_error

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(12, 9, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(9, 4, bias=False)

    def forward(self, x, attention_mask=None):
        return self.second(self.dropout(torch.tanh(self.first(x))))


def low_rank(n: int, rank: int, d: int = 12) -> torch.Tensor:
    return torch.randn(n, rank) @ torch.randn(rank, d)


def train(model, optimizer, steps=5, d=12):
    for _ in range(steps):
        x, y = torch.randn(16, d), torch.randint(4, (16,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outputs_on_protected_inputs_stay(name):
    model, old = Net(), low_rank(30, 3)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # Adam and momentum come with a past
    projection = GradientProjection(model)
    projection.attach(optimizer)
    assert projection.protect([{"x": old}], energy=1.0)["first.weight"] == 3
    kept, before = model(old).detach(), model.first.weight.detach().clone()
    train(model, optimizer, steps=20)
    scale = float(kept.abs().max())
    assert max_error(model(old), kept) <= 1e-4 * scale
    assert max_error(model.first.weight, before) > 0.05  # it did learn


def test_a_layer_that_is_called_by_keyword():
    layer, old = nn.Linear(12, 5), low_rank(30, 3)
    (added,) = GradientProjection(layer).protect([{"input": old}], energy=1.0).values()
    assert added == 3


def test_without_a_hook_they_do_not_stay():
    model, old = Net(), low_rank(30, 3)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    GradientProjection(model).protect([{"x": old}])
    kept = model(old).detach()
    train(model, optimizer, steps=20)
    assert max_error(model(old), kept) > 0.1 * float(kept.abs().max())


def test_gradient_mode_is_the_papers_step():
    model, old = Net(), low_rank(30, 4)
    projection = GradientProjection(model)
    projection.protect([{"x": old}], energy=0.9)
    q = projection.bases["first.weight"]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = projection.attach(optimizer, of="gradient")
    before = model.first.weight.detach().clone()
    F.cross_entropy(model(torch.randn(8, 12)), torch.randint(4, (8,))).backward()
    g = model.first.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model.first.weight, before - 0.1 * (g - g @ q.mT @ q))
    handle.remove()
    again = model.first.weight.detach().clone()
    model.first.weight.grad.copy_(g)
    optimizer.step()
    torch.testing.assert_close(model.first.weight, again - 0.1 * g)


def test_update_hooks_can_be_removed():
    model = Net()
    projection = GradientProjection(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    projection.attach(optimizer).remove()
    old = low_rank(30, 3)
    projection.protect([{"x": old}])
    kept = model(old).detach()
    train(model, optimizer, steps=10)
    assert not torch.allclose(model(old), kept, atol=1e-2)


def literal_gpm(tasks: list[torch.Tensor], energy: float) -> torch.Tensor:
    """The paper's two rules in float64: the smallest k whose directions hold the energy."""
    basis = torch.zeros(tasks[0].shape[1], 0, dtype=torch.float64)
    for rows in tasks:
        r = rows.double().mT  # (d, n)
        rest = r - basis @ (basis.mT @ r)
        u, s, _ = torch.linalg.svd(rest, full_matrices=False)
        total, held = float(r.square().sum()), float((basis.mT @ r).square().sum())
        k = 0
        while held + float(s[:k].square().sum()) < energy * total:
            k += 1
        basis = torch.cat([basis, u[:, :k]], 1)
    return basis


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
def test_the_basis_is_gpms(energy):
    torch.manual_seed(1)
    tasks = [low_rank(40, rank) + 0.05 * torch.randn(40, 12) for rank in (2, 3, 2)]
    model = Net()
    projection = GradientProjection(model)
    counts = [projection.protect([{"x": x}], energy=energy)["first.weight"] for x in tasks]
    ours, theirs = projection.bases["first.weight"].double(), literal_gpm(tasks, energy)
    assert sum(counts) == len(ours) == theirs.shape[1]
    torch.testing.assert_close(ours.mT @ ours, theirs @ theirs.mT, rtol=0, atol=1e-5)
    identity = torch.eye(len(ours), dtype=torch.float64)
    torch.testing.assert_close(ours @ ours.mT, identity, rtol=0, atol=1e-6)


def test_what_is_held_already_adds_nothing():
    model, old = Net(), low_rank(30, 3)
    projection = GradientProjection(model)
    assert projection.protect([{"x": old}], energy=1.0)["first.weight"] == 3
    assert projection.protect([{"x": 2.0 * old[:9]}], energy=1.0)["first.weight"] == 0
    full = projection.protect([{"x": torch.randn(40, 12)}], energy=1.0)["first.weight"]
    assert full == 9
    assert projection.protect([{"x": torch.randn(40, 12)}], energy=1.0)["first.weight"] == 0


def test_samples_and_batches_are_bounded():
    model, ran = Net(), []
    projection = GradientProjection(model)

    def forward(batch):
        ran.append(1)
        return model(batch["x"])

    batches = [{"x": torch.randn(10, 12)} for _ in range(5)]
    added = projection.protect(batches, energy=1.0, samples=7, forward=forward)
    assert added == {"first.weight": 7, "second.weight": 7}
    assert len(ran) == 1


def test_padding_is_left_out():
    model, x = Net(), low_rank(24, 2).view(4, 6, 12)
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    noisy = torch.where(mask[..., None].bool(), x, 100 * torch.randn(4, 6, 12))
    projection = GradientProjection(model)
    batch = {"x": noisy, "attention_mask": mask}
    assert projection.protect([batch], energy=1.0)["first.weight"] == 2


def test_the_model_is_as_before():
    model = Net(dropout=0.5).train()
    model.dropout.eval()
    projection = GradientProjection(model)
    projection.protect([{"x": torch.randn(9, 12)}])
    assert model.training
    assert not model.dropout.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_only_trainable_layers_are_protected():
    model = Net()
    model.second.weight.requires_grad_(False)
    projection = GradientProjection(model)
    projection.protect([{"x": torch.randn(9, 12)}])
    assert list(projection.bases) == ["first.weight"]


def test_all_layers_are_projected_in_one_call(monkeypatch):
    calls = []

    def spy(tensors, bases, **options):
        calls.append(len(tensors))
        return project_out(tensors, bases, **options)

    project_out = gradient_projection.project_out
    model = Net()
    projection = GradientProjection(model)
    projection.protect([{"x": torch.randn(9, 12)}])
    monkeypatch.setattr(gradient_projection, "project_out", spy)
    F.cross_entropy(model(torch.randn(8, 12)), torch.randint(4, (8,))).backward()
    projection.project()
    assert calls == [2]


def test_gradients_of_earlier_tasks():
    """OGD: later gradients are orthogonal to those that were kept."""
    model = Net()
    projection = GradientProjection(model)

    def backward():
        model.zero_grad()
        F.cross_entropy(model(torch.randn(8, 12)), torch.randint(4, (8,))).backward()

    for _ in range(3):
        backward()
        assert projection.protect_gradients() == {"first.weight": 1, "second.weight": 1}
    assert projection.protect_gradients() == {"first.weight": 0, "second.weight": 0}
    backward()
    projection.project()
    for name, basis in projection.bases.items():
        grad = model.get_parameter(name).grad.flatten()
        assert basis.shape == (3, grad.numel())
        assert float((basis @ grad).abs().max()) <= 1e-6


def test_bases_can_be_saved():
    model, other = Net(), Net()
    projection, fresh = GradientProjection(model), GradientProjection(other)
    projection.protect([{"x": torch.randn(9, 12)}])
    fresh.load_state_dict(projection.state_dict())
    assert all(torch.equal(fresh.bases[n], q) for n, q in projection.bases.items())


def test_a_head_tied_to_an_embedding_is_protected():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 9)  # before the head, whose name is then the second one
            self.head = nn.Linear(9, 4, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(torch.tanh(self.first(x)))

    model, old = Tied(), low_rank(30, 2)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    projection = GradientProjection(model)
    projection.attach(optimizer)
    projection.protect([{"x": old}], energy=1.0)
    projection.load_state_dict(projection.state_dict())
    kept = model(old).detach()
    train(model, optimizer, steps=10)
    assert max_error(model(old), kept) <= 1e-4 * float(kept.abs().max())


def test_layers_that_share_a_weight_are_refused():
    model = Net()
    model.third = nn.Linear(12, 9, bias=False)
    model.third.weight = model.first.weight
    with pytest.raises(ValueError, match="must not share a weight between linear layers"):
        GradientProjection(model).protect([{"x": torch.randn(9, 12)}])


def test_lora_weights_are_linear_layers_too():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["first", "second"]))
    projection = GradientProjection(model)
    added = projection.protect([{"x": low_rank(20, 3)}], energy=1.0)
    name = "base_model.model.first.lora_A.default.weight"
    assert added[name] == 3
    assert all("lora_" in n for n in added)


def test_errors():
    model = Net()
    projection = GradientProjection(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = [{"x": torch.randn(9, 12)}]
    with pytest.raises(ValueError, match="energy must be in"):
        projection.protect(x, energy=0.0)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        projection.protect(x, samples=0)
    with pytest.raises(RuntimeError, match="batches must reach a linear layer"):
        projection.protect([])
    with pytest.raises(ValueError, match='of must be "update" or "gradient"'):
        projection.attach(optimizer, of="weights")
    with pytest.raises(ValueError, match="model must have gradients"):
        projection.protect_gradients()
    projection.protect(x)
    F.cross_entropy(model(torch.randn(8, 12)), torch.randint(4, (8,))).backward()
    with pytest.raises(ValueError, match="need a GradientProjection each"):
        projection.protect_gradients()
    with pytest.raises(ValueError, match="must name weights of the model"):
        projection.load_state_dict({"third.weight": torch.zeros(1, 12)})
    with pytest.raises(ValueError, match="must have 12 columns"):
        projection.load_state_dict({"first.weight": torch.zeros(1, 5)})
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="Linear whose weight requires grad"):
        projection.protect(x)
