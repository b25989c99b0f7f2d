"""O-LoRA on every kind of layer and base that PEFT puts LoRA on, against the released formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft

from olora_cases import (
    KINDS,
    VOCAB,
    frozen_and_trained,
    gradients,
    loop_penalty,
    make_base,
    make_batch,
    make_config,
    make_tasks,
)
from trimtab.algorithms.olora import OLoRA
from trimtab.algorithms.olora.overlap import orthonormal_rows
from trimtab.testing import assert_within_budget

close = torch.testing.assert_close


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("norm", ["l1", "frobenius2"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_value_and_gradients_are_those_of_the_released_loop(
    kind: str, norm: str, side: str
) -> None:
    settings = {"lamda_1": 0.7, "lamda_2": 0.2, "norm": norm, "side": side}
    olora = make_tasks(kind, ranks=(3, 2, 1, 4), **settings)
    rest = (["t0", "t1", "t2"], "t3")
    got, eager = olora.penalty(), loop_penalty(olora.model, *rest, **settings)
    grads = [gradients(olora.model, value) for value in (got, eager)]
    wide = make_tasks(kind, ranks=(3, 2, 1, 4), **settings).model.double()
    truth = loop_penalty(wide, *rest, **settings)
    assert got.dtype == torch.float32
    assert_within_budget(got, eager, truth)
    for name, grad in gradients(wide, truth).items():
        assert_within_budget(grads[0][name], grads[1][name], grad, name=name)
    assert len(grads[0]) == 2 * len(olora.modules())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_of_training_changes_the_task_in_training_alone(kind: str) -> None:
    olora = make_tasks(kind, lamda_2=0.1)
    before = {name: p.detach().clone() for name, p in olora.model.named_parameters()}
    loss = olora.model(**make_batch(kind)).loss + olora.penalty()
    loss.backward()
    torch.optim.SGD(olora.model.parameters(), lr=0.1).step()
    changed = {n for n, p in olora.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if ".t2." in name}


class Conv(nn.Module):
    """A convolution and an embedding in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.line = nn.Conv1d(6, 4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)  # (B, 4, 6)
        return self.conv(x[:, None].expand(-1, 2, -1, -1)).mean() + self.line(x.mT).mean()


@pytest.mark.parametrize("side", ["A", "B"])
def test_convolutions_and_embeddings(side: str) -> None:
    torch.manual_seed(0)
    configs = [make_config("embed conv line", rank) for rank in (2, 3, 2)]
    for config in configs:
        config.init_lora_weights = True
    olora = OLoRA(peft.get_peft_model(Conv(), configs[0], adapter_name="t0"), side=side)
    for i in (1, 2):
        olora.start_task(f"t{i}", configs[i])
    with torch.no_grad():
        for name, parameter in olora.model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    olora.lamda_2 = 0.1
    assert len(olora.modules()) == 3
    assert sum(".lora_embedding_" in n for n, _ in olora.model.named_parameters()) == 6
    want = loop_penalty(olora.model, ["t0", "t1"], "t2", lamda_2=0.1, side=side)
    close(olora.penalty(), want)
    close(gradients(olora.model, olora.penalty()), gradients(olora.model, want))
    assert frozen_and_trained(olora.model) == ({"t0", "t1"}, {"t2"})
    (olora.model(torch.randint(0, 11, (3, 4))) + olora.penalty()).backward()
    assert all(p.grad is not None for p in olora.parameters())


def test_an_embedding_adapter_whose_factor_begins_at_zero() -> None:
    config = make_config("embed_tokens", init_lora_weights=True)
    olora = make_tasks(ranks=(3,), changes=({"target_modules": ["embed_tokens"]},), lamda_2=0.1)
    olora.start_task("t1", config)
    olora.penalty().backward()
    (a,) = (p for n, p in olora.model.named_parameters() if "lora_embedding_A.t1" in n)
    assert a.shape == (3, VOCAB)
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert bool(olora.overlap()[0, 1].isnan())  # a zero matrix spans nothing
    assert olora.principal_cosines("t0", "t1")[olora.modules()[0]].shape == (0,)


def test_dora_rslora_and_bias_train_and_freeze_with_their_task() -> None:
    changes = ({"use_dora": True}, {"use_rslora": True}, {"use_dora": True})
    olora = make_tasks(changes=changes)
    rest = (["t0", "t1"], "t2")
    close(olora.penalty(), loop_penalty(olora.model, *rest))
    magnitudes = {
        n.rsplit(".", 2)[-2]: p.requires_grad
        for n, p in olora.model.named_parameters()
        if "lora_magnitude_vector" in n
    }
    assert magnitudes == {"t0": False, "t2": True}
    layer = olora.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"t0": 2.0, "t1": 6 / math.sqrt(2), "t2": 1.5}
    olora.start_task("t3", make_config(lora_bias=True))
    olora.lamda_2 = 0.1
    close(olora.penalty(), loop_penalty(olora.model, [*rest[0], "t2"], "t3", lamda_2=0.1))
    assert any(n.endswith("lora_B.t3.bias") for n, p in olora.model.named_parameters()
               if p.requires_grad)  # fmt: skip
    with olora.model.disable_adapter():
        pass
    assert frozen_and_trained(olora.model) == ({"t0", "t1", "t2"}, {"t3"})


def test_shared_layers_count_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    olora = OLoRA(peft.get_peft_model(Twice(), make_config("one"), adapter_name="t0"))
    olora.start_task("t1", make_config("one"))
    assert len(olora.modules()) == 1
    close(olora.penalty(), loop_penalty(olora.model, ["t0"], "t1"))


@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_injected_adapters(how: str) -> None:
    base = make_base()
    if how == "peft":
        model = peft.inject_adapter_in_model(make_config(), base, adapter_name="t0")
    else:
        base.add_adapter(make_config(), adapter_name="t0")
        model = base
    olora = OLoRA(model)
    olora.start_task("t1", make_config(rank=2))
    close(olora.penalty(), loop_penalty(model, ["t0"], "t1"))
    assert frozen_and_trained(model) == ({"t0"}, {"t1"})
    alone = model(**make_batch()).logits
    (model(**make_batch()).loss + olora.penalty()).backward()
    if how == "transformers":
        assert set(model.active_adapters()) == {"t0", "t1"}
        model.set_adapter("t1")
        with pytest.raises(RuntimeError, match="active adapters"):
            olora.penalty()
        olora.activate()
        close(model(**make_batch()).logits, alone)
    for call in (olora.merge, lambda: olora.save("nowhere")):
        with pytest.raises(ValueError, match=r"must be a peft\.PeftModel to"):
            call()


class Int8Linear(nn.Linear):
    """Stands in for a quantised layer: int8 weights that can't have gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantize(model: Any, kind: str) -> Any:
    """The model with its attention's and MLP's weights quantised."""
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        is_target = lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name  # noqa: E731
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_target)
        return model
    bnb = pytest.importorskip("bitsandbytes") if kind.startswith("bnb") else None

    def make(linear: nn.Linear) -> nn.Module:
        shape = linear.in_features, linear.out_features
        if bnb is None:
            return Int8Linear(linear)
        if kind == "bnb-4bit":
            new = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=new)
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
        return new

    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, make(module))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "bnb-4bit", kind == "bnb-8bit"
    return model.to("cpu")


@pytest.mark.parametrize("kind", ["stand-in", "bnb-4bit", "bnb-8bit", "torchao"])
def test_quantised_bases(kind: str) -> None:
    base = quantize(make_base(hidden_size=64, head_dim=32), kind)
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype != torch.float32 or type(layer.weight) is not nn.Parameter
    olora = OLoRA(peft.get_peft_model(base, make_config(), adapter_name="t0"), lamda_2=0.1)
    olora.start_task("t1", make_config(rank=2))
    close(olora.penalty(), loop_penalty(olora.model, ["t0"], "t1", lamda_2=0.1))
    (olora.model(**make_batch()).loss + olora.penalty()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in olora.parameters())
    assert frozen_and_trained(olora.model) == ({"t0"}, {"t1"})


def test_gradient_checkpointing_and_autocast() -> None:
    olora = make_tasks(lamda_1=0.1)
    batch = make_batch()
    want = gradients(olora.model, olora.model(**batch).loss + olora.penalty())
    for reentrant in (False, True):
        model = make_tasks(lamda_1=0.1)
        model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.model.enable_input_require_grads()
        model.model.train()
        (model.model(**batch).loss + model.penalty()).backward()
        close({n: p.grad for n, p in model.model.named_parameters() if p.requires_grad}, want)
    with torch.autocast("cpu", torch.bfloat16):
        value = olora.penalty()
        close(olora.accumulate_grads(), value.detach())
    assert value.dtype == torch.float32
    close(value, olora.penalty())


def test_layers_on_several_devices_are_compared_on_their_own() -> None:
    """A model spread over devices has one call of the operator on each."""
    olora = make_tasks(lamda_2=0.1)
    olora.model.base_model.model.model.layers[1].to("meta")
    olora.activate()
    groups = list(olora._subspaces.compared())
    assert [current[0].device.type for _, current in groups] == ["cpu", "meta"]
    for previous, current in groups:
        assert len(previous) == len(current) == 2
        assert len({t.device for ts in [*previous, current] for t in ts}) == 1
    assert [norm.device.type for norm in olora._subspaces.norms()] == ["cpu", "meta"]


# Overlap.


def test_overlap_is_the_mean_squared_cosine_of_principal_angles() -> None:
    olora = make_tasks(ranks=(3, 2, 4), changes=({}, {"target_modules": ["q_proj", "k_proj"]}, {}))
    table, each = olora.overlap(), olora.overlap(per_module=True)
    names = olora.modules()
    assert table.shape == (3, 3)
    assert each.shape == (6, 3, 3)
    close(table, each.nanmean(0))
    close(table, table.mT)
    close(table.diagonal(), torch.ones(3))
    layers = dict(olora.model.named_modules())
    for i, (first, second) in enumerate([("t0", "t1"), ("t0", "t2"), ("t1", "t2")]):
        cosines = olora.principal_cosines(first, second)
        row, column = ((0, 1), (0, 2), (1, 2))[i]
        for m, name in enumerate(names):
            layer = layers[name.removesuffix(".lora_A")].lora_A
            if first not in layer or second not in layer:
                assert name not in cosines
                assert bool(each[m, row, column].isnan())
                continue
            q = [torch.linalg.qr(layer[t].weight.detach().mT)[0] for t in (first, second)]
            want = torch.linalg.svdvals(q[0].mT @ q[1])
            close(cosines[name], want)
            close(each[m, row, column], want.square().mean())
    with pytest.raises(ValueError, match=r"first and second must be of \['t0'"):
        olora.principal_cosines("t0", "t9")


def test_overlap_of_known_subspaces() -> None:
    olora = make_tasks(ranks=(2, 2, 3), changes=[{"target_modules": ["q_proj"]}] * 3)
    unit = torch.eye(16)
    angle = 0.3
    rows = {
        "t0": torch.stack((2.0 * unit[0], unit[0] + unit[1])),
        "t1": torch.stack((unit[2], math.cos(angle) * unit[0] + math.sin(angle) * unit[3])),
        "t2": torch.stack((unit[0], unit[1], unit[0] - unit[1])),  # of rank 2
    }
    for layer in olora.model.base_model.model.model.layers:
        for task, value in rows.items():
            layer.self_attn.q_proj.lora_A[task].weight.data = value
    some = math.cos(angle) ** 2 / 2
    close(olora.overlap(), torch.tensor([[1.0, some, 1.0], [some, 1.0, some], [1.0, some, 1.0]]))
    cosines = olora.principal_cosines("t0", "t1")
    close(next(iter(cosines.values())), torch.tensor([math.cos(angle), 0.0]))
    assert orthonormal_rows(rows["t2"]).shape == (2, 16)
    assert orthonormal_rows(rows["t2"].bfloat16()).dtype == torch.float32


def test_overlap_of_both_sides_and_of_finished_tasks() -> None:
    olora = make_tasks(side="both")
    olora.finish_task()
    assert olora.modules() == sorted(olora.modules(), key=lambda name: name.rpartition(".")[0])
    assert [name[-1] for name in olora.modules()] == ["A", "B"] * 4
    assert olora.overlap(per_module=True).shape == (8, 3, 3)
    assert bool(olora.overlap().isfinite().all())
