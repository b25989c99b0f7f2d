"""Our loss in Hugging Face models under PEFT and Trainer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from hf_cases import VOCAB, Widest, loss_of_logits, make_batch, make_model, with_grads
from trimtab.testing import assert_within_budget

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf = pytest.importorskip("trimtab.integrations.transformers")

ADAPTERS = {
    "attention": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head, bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.4},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(model, **settings):
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False,
                             **settings)  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).train()


def run(model, batch):
    """Loss and gradients, with the same dropout each time."""
    torch.manual_seed(2)
    return with_grads(model(**batch).loss, model)


@pytest.mark.parametrize("kind", ["llama", "gptj"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter, order, kind):
    model, batch = make_model(kind), make_batch()
    applied = hf.apply(model) if order == "before" else None
    model = adapted(model, **ADAPTERS[adapter])
    applied = applied or hf.apply(model)
    torch.manual_seed(2)
    output = model(**batch)
    assert output.logits is None
    ours = with_grads(output.loss, model)
    applied.revert()
    eager = run(model, batch)
    wide = copy.deepcopy(model).double()
    torch.manual_seed(2)
    if adapter == "dropout":
        # Float64 draws another mask.
        truth = {name: value.double() for name, value in eager.items()}
    else:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        truth = with_grads(loss_of_logits(wide(**inputs), wide, batch), wide)
    assert ours.keys() == eager.keys()
    scale = max(float(grad.abs().max()) for grad in truth.values())
    for name, value in ours.items():
        assert_within_budget(value, eager[name], truth[name], name=name, scale=scale)


def test_adapters_that_are_off_or_merged():
    model = adapted(make_model(), target_modules=["lm_head"])
    batch = make_batch()
    hf.apply(model)
    with_adapter = model(**batch).loss
    with model.disable_adapter():
        without = model(**batch).loss
        own = model(**batch, return_logits=True).loss
    assert_within_budget(without, own, own.double(), scale=float(own.detach()))
    assert float((with_adapter - without).detach().abs()) > 0.01
    model.merge_adapter()
    merged = model(**batch).loss
    assert_within_budget(merged, with_adapter, with_adapter.double(), scale=16.0)


def test_a_head_with_another_adapter_is_refused():
    model = adapted(make_model(), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="plain LoRA adapters, got Linear"):
        hf.apply(model)
    model = make_model()
    hf.apply(model)
    with pytest.raises(ValueError, match="plain LoRA adapters, got Linear"):
        adapted(model, target_modules=["lm_head"], use_dora=True)(**make_batch())


class Rows(Dataset):
    """Sequences with labels and token weights, as Trainer's default collator takes them."""

    def __init__(self, count: int = 8, weights: bool = False) -> None:
        batch = make_batch(count, 9)
        # A different number of labels in each row, so that divisors matter.
        for row in range(count):
            batch["labels"][row, : row % 7 + 1] = -100
            batch["labels"][row, 8] = batch["input_ids"][row, 8]
        if weights:
            batch["loss_weights"] = torch.rand(count, 9, generator=torch.Generator().manual_seed(1))
        self.rows = [{k: v[row].tolist() for k, v in batch.items()} for row in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def make_trainer(model, rows, folder, **settings):
    metrics = settings.pop("compute_metrics", None)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **settings}
    args = transformers.TrainingArguments(
        str(folder), max_steps=4, learning_rate=0.01, logging_steps=1, report_to=[], seed=0,
        save_strategy="no", use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
    )


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_trainer_takes_the_same_steps(tmp_path, average, bf16):
    """Also after accelerate has put its autocast around forward."""
    runs = []
    for ours in (False, True):
        model = make_model()
        if ours:
            hf.apply(model)
        trainer = make_trainer(model, Rows(), tmp_path, bf16=bf16,
                               average_tokens_across_devices=average)  # fmt: skip
        with Widest() as seen:
            trainer.train()
        assert (seen.rows == 0) if ours else (seen.rows == 2 * 9)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append([*losses, trainer.evaluate()["eval_loss"]])
    # The second model: accelerate takes its autocast off down to our forward, not to the model's.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert model.train()(**make_batch()).logits is None
    eps = torch.finfo(torch.bfloat16 if bf16 else torch.float32).eps
    own, ours = runs
    assert len(own) == 5
    assert own[0] - own[-1] > 0.1
    # Adam divides by the gradient's own size, so roundings grow with each step.
    assert max(abs(a - b) for a, b in zip(own, ours, strict=True)) < 64 * eps * own[0]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_step_of_trainer_is_the_weighted_sum_over_the_number_of_tokens(tmp_path, weighted):
    """The column of weights survives remove_unused_columns; the divisor is of all micro-batches."""
    rows, model = Rows(weights=weighted), make_model()
    batch = {k: torch.tensor([row[k] for row in rows.rows]) for k in rows.rows[0]}
    batch["labels"][:, 0] = -100  # predicted by nothing, so Trainer does not count it
    twins = [copy.deepcopy(model), copy.deepcopy(model).double()]
    eager, truth = (
        with_grads(loss_of_logits(twin(batch["input_ids"]), twin, batch), twin) for twin in twins
    )
    before = dict(copy.deepcopy(model).named_parameters())
    hf.apply(model)
    trainer = make_trainer(
        model, rows, tmp_path, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.args.max_steps = 1
    trainer.train()
    for name, parameter in model.named_parameters():
        # The step is read off parameters that are larger than it.
        step = (before[name].double() - parameter.double()).detach() / 0.01
        scale = float(before[name].detach().abs().max()) / 0.01
        assert_within_budget(step, eager[name], truth[name], dtype=torch.float32, scale=scale)
    found = trainer.state.log_history[0]["loss"]
    assert abs(found - float(truth["loss"])) < 1e-4


def test_trainer_has_logits_for_metrics_and_none_without(tmp_path):
    shapes = []

    def metrics(found):
        shapes.append(np.asarray(found.predictions).shape)
        return {}

    model = make_model()
    hf.apply(model)
    make_trainer(model, Rows(), tmp_path, compute_metrics=metrics).evaluate()
    assert shapes == [(8, 9, VOCAB)]
    hf.apply(model, return_logits=False)
    with Widest() as seen:
        make_trainer(model, Rows(), tmp_path, prediction_loss_only=True).evaluate()
    assert seen.rows == 0
