"""Hugging Face causal LMs with our loss: the model's own loss and gradients, without its logits."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys

import pytest
import torch
from torch import nn

import trimtab
from hf_cases import MODELS, VOCAB, Widest, loss_of_logits, make_batch, make_model, with_grads
from trimtab.testing import assert_same_bits, assert_within_budget, max_error

pytest.importorskip("transformers")
hf = pytest.importorskip("trimtab.integrations.transformers")


def three_ways(model, batch, **arguments):
    """Results of our loss, of the model's own, and of float64 logits."""
    wide = copy.deepcopy(model).double()
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    own = {k: v for k, v in batch.items() if k != "loss_weights"}
    divisor = arguments.get("num_items_in_batch")
    truth = with_grads(loss_of_logits(wide(**inputs), wide, batch, divisor), wide)
    if "loss_weights" in batch:
        eager = with_grads(loss_of_logits(model(**inputs), model, batch, divisor), model)
    else:
        eager = with_grads(model(**own, **arguments).loss, model)
    with hf.apply(model):
        output = model(**batch, **arguments)
        assert output.logits is None
        ours = with_grads(output.loss, model)
    return ours, eager, truth


def check(ours, eager, truth, dtype=None, terms=0.0):
    """Every result within the budget; what was summed before it is as large as the largest."""
    assert ours.keys() == eager.keys() == truth.keys()
    scale = max(float(grad.abs().max()) for name, grad in truth.items() if name != "loss")
    for name, value in ours.items():
        given = terms if name == "loss" else scale
        assert_within_budget(value, eager[name], truth[name], name=name, dtype=dtype, scale=given)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_every_gradient_are_the_models_own(kind):
    check(*three_ways(make_model(kind), make_batch()))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "mixtral"])
def test_token_weights_of_either_sign(kind):
    batch = make_batch()
    batch["loss_weights"] = torch.randn(batch["labels"].shape)
    batch["loss_weights"][batch["labels"] == -100] = float("nan")
    model = make_model(kind)
    terms = {**batch, "loss_weights": batch["loss_weights"].abs()}
    magnitude = loss_of_logits(model(batch["input_ids"]), model, terms).detach()
    check(*three_ways(model, batch), terms=float(magnitude))


@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_16_bits(kind):
    check(*three_ways(make_model(kind).bfloat16(), make_batch()), dtype=torch.bfloat16)


def test_autocast():
    model, batch = make_model("gemma2"), make_batch()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    wide = copy.deepcopy(model).double()
    truth = with_grads(loss_of_logits(wide(**inputs), wide, batch), wide)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        return with_grads(loss, model)

    eager = run()
    hf.apply(model)
    check(run(), eager, truth, dtype=torch.bfloat16)


def test_float64_keeps_what_transformers_rounds_to_float32():
    model, batch = make_model().double(), make_batch()
    ours, own, truth = three_ways(model, batch)
    assert ours["loss"].dtype == torch.float64
    for name, value in ours.items():
        assert max_error(value, truth[name]) < max_error(own[name], truth[name]) / 1000


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_num_items_in_batch_is_the_divisor(count):
    check(*three_ways(make_model(), make_batch(), num_items_in_batch=count))


@pytest.mark.parametrize("form", ["ignore_index", "shift_labels", "positional", "one_element"])
def test_every_way_to_give_labels(form):
    model, batch = make_model(), make_batch()
    ids, labels = batch["input_ids"], batch["labels"].masked_fill(batch["labels"] == -100, 5)
    target = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    place = list(inspect.signature(model.forward).parameters).index("labels")
    args, kwargs = (ids,), {"labels": labels}
    if form == "ignore_index":
        kwargs["ignore_index"] = 5
        target = target.masked_fill(target == 5, -100)
    elif form == "shift_labels":
        kwargs["shift_labels"] = target = labels.roll(-1, 1)
    elif form == "positional":
        args, kwargs = (ids, *[None] * (place - 1), labels), {}
    else:
        kwargs["num_items_in_batch"] = torch.tensor([(target != -100).sum()])
    own = model(*args, **kwargs).loss
    logits = copy.deepcopy(model).double()(ids).logits
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    hf.apply(model)
    assert_within_budget(
        model(*args, **kwargs).loss.reshape(own.shape), own, truth.expand(own.shape)
    )


def test_token_weights_belong_to_labels_also_beside_shift_labels():
    model, batch = make_model(), make_batch()
    weights = torch.rand(batch["labels"].shape)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    hf.apply(model)
    first = model(**batch, loss_weights=weights).loss
    second = model(**batch, loss_weights=weights, shift_labels=shifted).loss
    assert_same_bits(first, second)
    counts = torch.ones(batch["labels"].shape, dtype=torch.int64)
    assert_same_bits(model(**batch, loss_weights=counts).loss, model(**batch).loss)


def test_no_tensor_holds_the_logits():
    model, batch = make_model(), make_batch()
    rows = batch["labels"].numel()
    with Widest() as own:
        model(**batch).loss.backward()
    assert own.rows == rows
    hf.apply(model, impl="reference", options=trimtab.TokenLossOptions(chunk_size=5))
    with Widest() as seen:
        model(**batch, return_logits=True).loss.backward()
    assert seen.rows == rows
    hf.apply(model, options=trimtab.TokenLossOptions(chunk_size=5))
    with Widest() as seen:
        model(**batch).loss.backward()
    assert seen.rows <= 5


def test_who_gets_logits():
    model, batch = make_model(), make_batch()
    own = model(**batch).logits
    weights = torch.rand(batch["labels"].shape)
    hf.apply(model)
    assert model(**batch).logits is None
    assert "logits" not in model(**batch)
    assert_same_bits(model(**batch, return_logits=True).logits, own)
    weighted = model(**batch, return_logits=True, loss_weights=weights)
    assert_same_bits(weighted.logits, own)
    without = model(**batch, loss_weights=weights).loss
    assert_within_budget(weighted.loss, without, without.double(), scale=float(without.detach()))
    model.eval()
    assert_same_bits(model(**batch).logits, own)
    assert model(**batch, return_logits=False).logits is None
    assert model(**batch, return_logits=False, return_dict=False)[1] is None
    hf.apply(model, return_logits=False)
    assert model(**batch).logits is None


def test_without_labels_and_in_generate_nothing_changes():
    model = make_model().eval()
    batch = make_batch()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    hf.apply(model)
    assert_same_bits(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    with pytest.raises(ValueError, match="loss_weights must come with labels"):
        model(**inputs, loss_weights=torch.ones(3, 13))


def test_gradient_checkpointing():
    model, batch = make_model(), make_batch()
    hf.apply(model)
    plain = with_grads(model(**batch).loss, model)
    model.gradient_checkpointing_enable()
    again = with_grads(model(**batch).loss, model)
    for name, value in plain.items():
        assert_same_bits(again[name], value, name=name)


def test_it_can_be_undone_and_applied_twice():
    model, batch = make_model(), make_batch()
    own = type(model)
    first = hf.apply(model)
    ours = type(model)
    with hf.apply(model, return_logits=True) as second:
        assert second.model is model
        assert type(model) is ours
        assert str(ours) == str(own)
        assert model(**batch).logits is not None
    assert model(**batch).logits is None
    first.revert()
    assert type(model) is own
    assert model(**batch).logits is not None
    assert not [name for name in vars(model) if "trimtab" in name]
    hf.revert(model)
    with pytest.raises(RuntimeError, match="broken"), hf.apply(model):
        raise RuntimeError("broken")
    assert type(model) is own


def test_an_error_in_forward_leaves_nothing_behind():
    model, batch = make_model(), make_batch()
    hf.apply(model)
    batch["labels"][0, 5] = VOCAB
    with pytest.raises(IndexError):
        model(**batch)
    assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(ValueError, match=r"loss_weights must have the shape of labels \(3, 13\)"):
        model(**make_batch(), loss_weights=torch.ones(3, 12))
    with pytest.raises(ValueError, match="labels must be one per position"):
        model(**make_batch(), logits_to_keep=2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_the_loss_too(how):
    model, batch = make_model(), make_batch()
    hf.apply(model)
    file = io.BytesIO()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    hf.revert(model)
    assert type(other) is not type(model)
    output = other(**batch)
    assert output.logits is None
    assert_within_budget(output.loss, model(**batch).loss, output.loss.double(), scale=8.0)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert float(model.lm_head.weight.detach().abs().max()) > 0.0
    hf.revert(other)
    assert type(other) is type(model)


def test_what_is_saved_is_the_same(tmp_path):
    model = make_model()
    before = model.state_dict()
    model.save_pretrained(tmp_path / "own")
    hf.apply(model)
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path / "ours")
    for file in (tmp_path / "own").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes()
    again = type(model).from_pretrained(tmp_path / "ours").train()
    assert again(**make_batch()).logits is not None


def test_refused_in_words():
    for kind, auto, reason in [
        ("t5", "Seq2SeqLM", "with an encoder"),
        ("bart", "CausalLM", "makes its loss of its logits in another way"),
        ("bamba", "CausalLM", "its loss has terms that need its logits"),
    ]:
        model = make_model(kind, auto=auto)
        with pytest.raises(ValueError, match=reason):
            hf.apply(model)
        assert not hasattr(type(model), "_trimtab_own")


def test_a_formula_that_is_not_the_models_is_refused():
    for kind in ("llama", "gemma2"):
        with pytest.raises(ValueError, match="with logit_scale=1 and softcap=7"):
            hf.apply(make_model(kind), softcap=7.0)
        with pytest.raises(ValueError, match="with logit_scale=1\\.1 and softcap="):
            hf.apply(make_model(kind), logit_scale=1.1)


def test_what_other_packages_have_changed_is_refused():
    model = make_model()
    model.loss_function = lambda *_, **__: None
    with pytest.raises(ValueError, match="with the loss function"):
        hf.apply(model)
    model = make_model()
    model.forward = model.forward
    with pytest.raises(ValueError, match="whose forward has been replaced"):
        hf.apply(model)
    model = make_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="model must"):
        hf.apply(model)
    with pytest.raises(ValueError, match="no PreTrainedModel"):
        hf.apply(nn.Linear(2, 3))


def test_a_model_without_transformers_or_with_an_old_one(monkeypatch):
    model = make_model()
    # transformers puts another module in its place while it loads.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.49.1")
    with pytest.raises(ImportError, match=r">= 4.50, got 4.49.1"):
        hf.apply(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"install trimtab\[transformers\]"):
        hf.apply(model)


def test_the_signature_has_our_arguments_and_the_models():
    model = make_model()
    own = list(inspect.signature(model.forward).parameters)
    hf.apply(model)
    names = list(inspect.signature(model.forward).parameters)
    assert names == [*own[:-1], "loss_weights", "return_logits", own[-1]]
    assert inspect.signature(type(model).forward).parameters["loss_weights"].default is None


def test_compiled():
    model, batch = make_model(), make_batch()
    hf.apply(model)
    plain = with_grads(model(**batch).loss, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**batch)
    assert output.logits is None
    again = with_grads(output.loss, model)
    for name, value in plain.items():
        assert_within_budget(again[name], value, value.double(), name=name, scale=8.0)
    hf.revert(pickle.loads(pickle.dumps(model)))
    hf.revert(model)
    assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model.lm_head)
