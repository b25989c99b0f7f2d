"""O-LoRA: which adapters are trained, what the penalty is, what goes wrong behind its back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft

from olora_cases import (
    frozen_and_trained,
    gradients,
    loop_penalty,
    make_base,
    make_batch,
    make_config,
    make_tasks,
)
from trimtab.algorithms import olora as module
from trimtab.algorithms.olora import OLoRA
from trimtab.algorithms.olora import peft_model as peft_side

close = torch.testing.assert_close


def test_the_active_adapter_is_in_training_and_the_others_are_finished() -> None:
    model = peft.get_peft_model(make_base(), make_config(), adapter_name="first")
    model.add_adapter("second", make_config())
    model.add_adapter("third", make_config())
    model.set_adapter("second")
    olora = OLoRA(model)
    assert (olora.task, olora.finished) == ("second", ["first", "third"])
    assert frozen_and_trained(model) == ({"first", "third"}, {"second"})
    assert set(model.active_adapters) == {"first", "second", "third"}
    assert model.active_adapter == "second"
    close(olora.penalty(), loop_penalty(model, ["first", "third"], "second"))


def test_tasks_one_after_the_other() -> None:
    config = make_config()
    before = dict(vars(config))
    model = peft.get_peft_model(make_base(), config, adapter_name="yelp")
    olora = OLoRA(model)
    assert olora.penalty() == 0.0
    olora.start_task("amazon", config)
    assert (olora.task, olora.finished) == ("amazon", ["yelp"])
    assert frozen_and_trained(model) == ({"yelp"}, {"amazon"})
    olora.finish_task()
    assert (olora.task, olora.finished, olora.parameters()) == (None, ["yelp", "amazon"], [])
    assert frozen_and_trained(model) == ({"yelp", "amazon"}, set())
    for call in (olora.penalty, olora.finish_task, olora.accumulate_grads):
        with pytest.raises(RuntimeError, match="must have a task in training"):
            call()
    olora.start_task("yahoo", config)
    assert olora.tasks() == ["yelp", "amazon", "yahoo"]
    assert {id(p) for p in olora.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert vars(config) == {**before, "target_modules": set(before["target_modules"])}
    assert all(stored is not config for stored in list(model.peft_config.values())[1:])


def test_all_finished_is_found_again() -> None:
    olora = make_tasks()
    olora.finish_task()
    again = OLoRA(olora.model)
    assert (again.task, again.finished) == (None, ["t0", "t1", "t2"])
    again = OLoRA(make_tasks().model)
    assert (again.task, again.finished) == ("t2", ["t0", "t1"])


def test_a_finished_task_can_be_opened_again() -> None:
    model = make_tasks().model
    model.set_adapter("t0")
    olora = OLoRA(model)
    assert (olora.task, olora.finished) == ("t0", ["t1", "t2"])
    assert frozen_and_trained(model) == ({"t1", "t2"}, {"t0"})


def test_all_adapters_act_together_as_in_the_released_concatenation() -> None:
    olora = make_tasks(changes=({"lora_alpha": 6}, {"lora_alpha": 3}, {"use_rslora": True}))
    layer = olora.model.base_model.model.model.layers[0].self_attn.q_proj
    scaling = [6 / 3, 3 / 2, 6 / math.sqrt(4)]
    x = torch.randn(5, 16)
    downs = torch.cat([layer.lora_A[f"t{i}"].weight for i in range(3)])
    ups = [s * layer.lora_B[f"t{i}"].weight for i, s in enumerate(scaling)]
    close(layer(x), layer.base_layer(x) + x @ downs.mT @ torch.cat(ups, 1).mT)


@pytest.mark.parametrize("side", ["A", "B", "both"])
@pytest.mark.parametrize("norm", ["l1", "frobenius2"])
def test_penalty_of_both_terms(side: str, norm: str) -> None:
    olora = make_tasks(lamda_1=0.3, lamda_2=0.2, norm=norm, side=side)
    olora.model.double()
    rest = (olora.model, ["t0", "t1"], "t2")
    want = loop_penalty(*rest, lamda_1=0.0, lamda_2=0.2)
    for one in "AB" if side == "both" else side:
        want = want + loop_penalty(*rest, lamda_1=0.3, norm=norm, side=one)
    got = olora.penalty()
    assert got.dtype == torch.float64
    assert got.shape == ()
    close(got, want)
    close(gradients(olora.model, got), gradients(olora.model, want))


def test_a_factor_of_zero_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    penalty, norm = module.orthogonal_penalty, torch.linalg.vector_norm
    monkeypatch.setattr(
        module, "orthogonal_penalty", lambda *a, **k: calls.append("product") or penalty(*a, **k)
    )
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda *a, **k: calls.append("norm") or norm(*a, **k)
    )
    olora = make_tasks()
    for lamda_1, lamda_2, kinds in (
        (0.0, 0.0, set()), (0.5, 0.0, {"product"}), (0.0, 0.1, {"norm"}),
        (0.5, 0.1, {"product", "norm"}),
    ):  # fmt: skip
        calls.clear()
        olora.lamda_1, olora.lamda_2 = lamda_1, lamda_2
        value = olora.penalty()
        assert set(calls) == kinds
        assert (value == 0.0) == (not kinds)
        assert calls.count("product") <= 1
    with torch.no_grad():
        olora.model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["t2"].weight[:] = (
            math.nan
        )
    olora.lamda_1 = olora.lamda_2 = 0.0
    assert olora.penalty() == 0.0
    assert olora.accumulate_grads() == 0.0
    assert all(p.grad is None for p in olora.parameters())


def test_the_norm_of_a_zero_matrix_has_no_gradient() -> None:
    olora = make_tasks(changes=({}, {}, {"init_lora_weights": True}), lamda_1=0.0, lamda_2=0.1)
    olora.penalty().backward()
    for name, parameter in olora.model.named_parameters():
        if ".lora_B.t2" in name:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
        elif ".lora_A.t2" in name:
            close(parameter.grad, 0.1 * parameter.detach() / parameter.detach().norm())


def test_modules_that_an_earlier_task_did_not_touch_have_nothing_to_be_orthogonal_to() -> None:
    olora = make_tasks(
        changes=({"target_modules": ["q_proj"]}, {"target_modules": ["k_proj", "v_proj"]},
                 {"target_modules": ["q_proj", "v_proj", "o_proj"]}), lamda_2=0.1,
    )  # fmt: skip
    rest = (olora.model, ["t0", "t1"], "t2")
    close(olora.penalty(), loop_penalty(*rest, lamda_2=0.1))
    grads = gradients(olora.model, olora.penalty())
    want = gradients(olora.model, loop_penalty(*rest, lamda_2=0.1))
    close(grads, want)
    olora.start_task("t3", make_config(target_modules=["gate_proj"]))
    olora.lamda_2 = 0.0
    assert olora.penalty() == 0.0


def test_mixed_dtypes_count_in_float32() -> None:
    olora = make_tasks(lamda_2=0.1)
    olora.model.bfloat16()
    want = loop_penalty(make_tasks().model.bfloat16().double(), ["t0", "t1"], "t2", lamda_2=0.1)
    got = olora.penalty()
    assert got.dtype == torch.float32
    close(got.double(), want, rtol=1e-6, atol=0.0)
    got.backward()
    assert {p.grad.dtype for p in olora.parameters()} == {torch.bfloat16}
    olora.start_task("t3", make_config())  # PEFT makes new adapters float32
    assert {p.dtype for p in olora.parameters()} == {torch.float32}
    assert olora.penalty().isfinite()


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_gradients_written_directly_are_those_of_autograd(scale: float | None) -> None:
    olora = make_tasks(lamda_1=0.3, lamda_2=0.1)
    batch = make_batch()
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    factor = 1.0 if scale is None else scale

    def accumulated(first: bool) -> list[Tensor]:
        olora.model.zero_grad()
        if first:
            value = olora.accumulate_grads(scaler)
        for _ in range(2):
            (olora.model(**batch).loss * factor).backward()
        if not first:
            value = olora.accumulate_grads(scaler)
        close(value, olora.penalty().detach())
        return [p.grad.clone() for p in olora.parameters()]

    loss = 2.0 * olora.model(**batch).loss + olora.penalty()
    want = [factor * g for g in torch.autograd.grad(loss, olora.parameters())]
    close(accumulated(True), want)
    close(accumulated(False), want)
    with torch.no_grad():
        olora.model.zero_grad()
        olora.accumulate_grads()
    assert any(bool(p.grad.any()) for p in olora.parameters())


def test_gradients_have_the_layout_of_their_parameters() -> None:
    olora = make_tasks(side="B")
    olora.accumulate_grads()
    (olora.model(**make_batch()).loss + olora.penalty()).backward()
    grads = [p.grad for p in olora.parameters()]
    assert all(g.stride() == p.stride() for g, p in zip(grads, olora.parameters(), strict=True))
    loss = olora.model(**make_batch()).loss + 2.0 * olora.penalty()
    close(grads, list(torch.autograd.grad(loss, olora.parameters())))


def test_training_makes_the_new_subspace_orthogonal_and_leaves_the_old_alone() -> None:
    olora = make_tasks(lamda_1=0.1, ranks=(3, 3, 3), changes=[{"init_lora_weights": True}] * 3)
    old = {n: p.clone() for n, p in olora.model.named_parameters() if ".t2." not in n}
    optimizer = torch.optim.Adam(olora.model.parameters(), lr=3e-3)
    before = olora.overlap()
    for step in range(80):
        optimizer.zero_grad()
        (olora.model(**make_batch(seed=step)).loss + olora.penalty()).backward()
        optimizer.step()
    after = olora.overlap()
    assert bool((after[2, :2] < 0.1 * before[2, :2]).all())
    close(after[0, 1], before[0, 1])
    for name, parameter in olora.model.named_parameters():
        assert ".t2." in name or torch.equal(parameter, old[name])


# What others do behind its back.


def test_the_end_of_disable_adapter_leaves_finished_tasks_frozen() -> None:
    olora = make_tasks()
    batch = make_batch()
    want = olora.model(**batch).logits
    with olora.model.disable_adapter():
        assert not torch.equal(olora.model(**batch).logits, want)
        with pytest.raises(RuntimeError, match="got disabled adapters"):
            olora.penalty()
    close(olora.model(**batch).logits, want)
    assert olora.penalty() > 0.0
    assert frozen_and_trained(olora.model) == ({"t0", "t1"}, {"t2"})


def test_peft_that_heeds_its_list_never_thaws_a_finished_task() -> None:
    model = make_tasks().model
    if not hasattr(model.base_model.model.model.layers[0].self_attn.q_proj,
                   "frozen_peft_weight_names"):  # fmt: skip
        pytest.skip("this PEFT has no such list")
    with model.disable_adapter():
        pass
    model.set_requires_grad(["t0", "t2"])
    model.base_model.set_adapter(["t0", "t1", "t2"])
    model.base_model.enable_adapter_layers()
    assert frozen_and_trained(model) == ({"t0", "t1"}, {"t2"})


def test_a_thawed_task_is_frozen_before_its_gradient_is_written() -> None:
    """What PEFT without that list does; the forward pass has already recorded the parameters."""
    olora = make_tasks()
    olora.model.requires_grad_(True)
    loss = olora.model(**make_batch()).loss
    (loss + olora.penalty()).backward()
    with_grad = {n for n, p in olora.model.named_parameters() if p.grad is not None}
    assert all(".t0." not in name and ".t1." not in name for name in with_grad)
    assert frozen_and_trained(olora.model) == ({"t0", "t1"}, {"t2"})


def test_tasks_that_are_not_active_are_an_error_until_activate() -> None:
    olora = make_tasks()
    want = olora.penalty()
    for breakage, found in (
        (lambda m: m.set_adapter("t2"), r"active adapters \['t2'\]"),
        (lambda m: m.set_adapter("t0"), r"active adapters \['t0'\]"),
        (lambda m: m.requires_grad_(False), "'t2' frozen"),
        (lambda m: m.base_model.disable_adapter_layers(), "disabled adapters"),
    ):
        breakage(olora.model)
        with pytest.raises(RuntimeError, match=f"got {found}; call OLoRA.activate"):
            olora.penalty()
        olora.activate()
        close(olora.penalty(), want)
        assert frozen_and_trained(olora.model) == ({"t0", "t1"}, {"t2"})


def test_merged_adapters_are_an_error() -> None:
    olora = make_tasks()
    olora.model.merge_adapter()
    for call in (olora.penalty, olora.activate):
        with pytest.raises(RuntimeError, match="merged adapters"):
            call()
    with pytest.raises(RuntimeError, match="merged adapters"):
        olora.start_task("t3", make_config())
    assert "t3" not in olora.model.peft_config
    olora.model.unmerge_adapter()
    assert olora.penalty() > 0.0


def test_replaced_parameters_and_moved_storage_are_noticed() -> None:
    olora = make_tasks(lamda_2=0.1)
    model, rest = olora.model, (["t0", "t1"], "t2")

    def agrees() -> None:
        close(olora.penalty(), loop_penalty(model, *rest, lamda_2=0.1))

    agrees()
    model.double()  # the same parameters, other storage
    agrees()
    for task, table in (("t0", "lora_A"), ("t2", "lora_A"), ("t2", "lora_B")):
        layer = model.base_model.model.model.layers[1].self_attn.v_proj
        linear = getattr(layer, table)[task]
        linear.weight = nn.Parameter(torch.randn_like(linear.weight) * 3.0)
        agrees()
    state = {name: 2.0 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    olora.activate()  # assign takes over the state's requires_grad
    agrees()


def test_adapters_that_come_and_go_are_noticed() -> None:
    olora = make_tasks()
    model = olora.model
    model.delete_adapter("t0")
    close(olora.penalty(), loop_penalty(model, ["t1"], "t2"))
    # The same name, and as much PEFT config: the tensors alone are others.
    config = model.peft_config["t1"]
    model.delete_adapter("t1")
    model.add_adapter("t1", config)
    olora.activate()
    close(olora.penalty(), loop_penalty(model, ["t1"], "t2"))
    model.add_adapter("extra", make_config())
    with pytest.raises(RuntimeError, match="active adapters"):
        olora.penalty()
    olora.activate()
    assert olora.finished == ["t1", "extra"]
    close(olora.penalty(), loop_penalty(model, ["t1", "extra"], "t2"))
    model.delete_adapter("t2")
    with pytest.raises(RuntimeError, match="the adapter 't2' in training"):
        olora.activate()


def test_a_name_that_was_given_again_between_two_penalties_is_noticed() -> None:
    olora = make_tasks()
    config = olora.model.peft_config["t0"]
    olora.penalty()
    olora.model.delete_adapter("t0")
    olora.model.add_adapter("t0", config)
    olora.model.base_model.set_adapter(["t2", "t1", "t0"])
    close(olora.penalty(), loop_penalty(olora.model, ["t1", "t0"], "t2"))
    assert "t0" in frozen_and_trained(olora.model)[0]


def test_tasks_begin_in_other_subspaces_though_the_seed_is_the_same() -> None:
    """As it is after every training with Trainer."""

    def draw() -> tuple[Tensor, float]:
        olora = make_tasks(ranks=(3,))
        for i in (1, 2):
            torch.manual_seed(42)
            olora.start_task(f"t{i}", make_config(init_lora_weights=True))
            after = float(torch.rand(()))
        return olora.overlap(), after

    (overlap, after), (again, _) = draw(), draw()
    assert overlap[1, 2] < 0.5
    assert torch.equal(overlap, again)
    torch.manual_seed(42)
    torch.randint(2**62, ())
    assert after == float(torch.rand(()))


def test_new_dropout_has_the_mode_of_the_model() -> None:
    olora = make_tasks(ranks=(3,))
    for training in (False, True):
        olora.model.train(training)
        olora.start_task(f"mode{training}", make_config(lora_dropout=0.5))
        layers = peft_side.lora_layers(olora.model).values()
        assert {layer.lora_dropout[olora.task].training for layer in layers} == {training}
