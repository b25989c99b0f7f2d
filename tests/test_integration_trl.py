"""TRL's trainers with our log-probabilities: what they read of each token, and their steps."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from hf_cases import loss_of_logits, make_batch, make_model, make_tokenizer, with_grads
from trimtab.testing import assert_same_bits, assert_within_budget, error_budget

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
ours = pytest.importorskip("trimtab.integrations.trl")

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


def holder(model, **settings):
    """A model with TRL's fused head, where a trainer keeps it."""
    trl.trainer.utils.add_fused_lm_head(model, outputs=FIELDS, **settings)
    return SimpleNamespace(model=model, ref_model=None)


def by_logits(model, batch, temperature):
    """The fields from the model's logits, as wide as they are."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits, labels = output.logits[:, :-1] / temperature, batch["labels"][:, 1:]
    logp, kept = logits.log_softmax(-1), labels != -100
    fields = {
        "log_probs": logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
        "mean_logits": logits.mean(-1).detach(),
        "is_top1": (logits.argmax(-1) == labels).double(),
    }
    return {name: value.masked_fill(~kept, 0.0) for name, value in fields.items()}, output


def objective(fields, aux_loss):
    """Something of everything that has a gradient, with an upstream of its own for each token."""
    steps = torch.arange(fields["log_probs"].numel()).reshape(fields["log_probs"].shape)
    loss = (fields["log_probs"] * steps.cos() + fields["entropy"] * steps.sin()).sum()
    return loss if aux_loss is None else loss + 0.3 * aux_loss


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gptj", "granite", "mixtral"])
def test_everything_that_trl_reads_of_a_token(kind, temperature):
    model, batch = make_model(kind), make_batch()
    results = []
    for precision in (torch.float64, torch.float32):
        twin = copy.deepcopy(model).to(precision)
        fields, output = by_logits(twin, batch, temperature)
        loss = objective(fields, getattr(output, "aux_loss", None))
        results.append((fields, with_grads(loss, twin)))
    (truth, true_grads), (eager, eager_grads) = results
    ours.apply(holder(model, temperature=temperature))
    output = model(**batch, fused_lm_head=True)
    found = {name: getattr(output, name) for name in FIELDS}
    for name, value in found.items():
        if name == "is_top1":
            assert torch.equal(value.double(), truth[name])
        else:
            scale = float(truth[name].abs().max()) * 2
            assert_within_budget(value, eager[name], truth[name], name=name, scale=scale)
    assert torch.equal(output.label_mask, batch["labels"][:, 1:] != -100)
    grads = with_grads(objective(found, output.aux_loss), model)
    scale = max(float(grad.abs().max()) for grad in true_grads.values())
    for name, value in grads.items():
        assert_within_budget(value, eager_grads[name], true_grads[name], name=name, scale=scale)


def test_it_agrees_with_the_head_that_it_replaces():
    """In shapes, dtypes, the loss and what shifted labels and a count of tokens do."""
    model, batch = make_model("mixtral"), make_batch()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    calls = [
        {**batch},
        {**batch, "num_items_in_batch": torch.tensor(5)},
        {**batch, "shift_labels": shifted},
        {**batch, "labels": torch.full_like(batch["labels"], -100)},
    ]
    held = holder(model)
    theirs = [model(**call, fused_lm_head=True) for call in calls]
    with ours.apply(held):
        mine = [model(**call, fused_lm_head=True) for call in calls]
    for own, their in zip(mine, theirs, strict=True):
        assert own.keys() == their.keys()
        for name in own.keys():  # noqa: SIM118  (a ModelOutput iterates over its values)
            a, b = own[name], their[name]
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            budget = error_budget(b.double(), b.double(), torch.float32, scale=32.0)
            assert float((a.double() - b.double()).abs().max()) <= budget, name
    logits = model(batch["input_ids"]).logits
    assert logits.shape[-1] == model.config.vocab_size


def test_an_adapter_on_the_head_counts():
    import peft

    model, batch = make_model(), make_batch()
    held = holder(model)
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    held.model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with ours.apply(held):
        found = held.model(**batch, fused_lm_head=True).log_probs
    truth, _ = by_logits(copy.deepcopy(held.model).double(), batch, 1.0)
    eager, _ = by_logits(held.model, batch, 1.0)
    assert_within_budget(found, eager["log_probs"], truth["log_probs"])
    found.sum().backward()
    assert held.model.base_model.model.lm_head.lora_A["default"].weight.grad.abs().sum() > 0


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_accelerate_has_prepared_keeps_its_autocast(fresh_accelerate):
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model, batch = make_model(), make_batch()
    held = holder(model)
    held.accelerator = accelerator
    with ours.apply(held), torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch, fused_lm_head=True).log_probs
    held.model = accelerator.prepare_model(model)
    with ours.apply(held):
        assert_same_bits(held.model(**batch, fused_lm_head=True).log_probs, expected)


def words(generator, count):
    return " ".join(f"w{i}" for i in torch.randint(3, 120, (count,), generator=generator).tolist())


def make_data(kind):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(8):
        row = {"prompt": words(generator, 3 + index % 3)}
        if kind == "sft":
            ids = torch.randint(3, 120, (5 + index % 4,), generator=generator).tolist()
            weights = torch.rand(len(ids), generator=generator).tolist()
            row = {"input_ids": ids, "loss_weights": weights}
        elif kind == "dpo":
            row |= {"chosen": words(generator, 4), "rejected": words(generator, 3)}
        elif kind == "kto":
            row |= {"completion": words(generator, 4), "label": index % 2 == 0}
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def make_trainer(kind, model, folder, **settings):
    given = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01,
        "logging_steps": 1, "seed": 0, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, **settings,
    }  # fmt: skip
    rest = {"train_dataset": make_data(kind), "processing_class": make_tokenizer()}
    if kind == "sft":
        return trl.SFTTrainer(model, trl.SFTConfig(str(folder), **given), **rest)
    if kind == "grpo":
        args = trl.GRPOConfig(str(folder), num_generations=2, max_completion_length=4, beta=0.1,
                              temperature=0.8, **given)  # fmt: skip

        def reward(completions, **_):
            return [float(len(set(text.split()))) + 0.1 * len(text) for text in completions]

        # The reference is loaded from where the policy comes from.
        model.save_pretrained(folder / "policy")
        model = type(model).from_pretrained(folder / "policy")
        return trl.GRPOTrainer(model, args=args, reward_funcs=reward, **rest)
    rest["ref_model"] = copy.deepcopy(model)
    name = kind.upper()
    args = getattr(trl, f"{name}Config")(str(folder), **given)
    return getattr(trl, f"{name}Trainer")(model, args=args, **rest)


def logged(trainer):
    """The numbers of each step that say something of the model."""
    trainer.train()
    hidden = ("runtime", "second", "flos", "time", "mfu", "memory")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in hidden)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo"])
def test_trainers_take_the_same_steps(kind, bf16, tmp_path, monkeypatch):
    calls = []
    original = ours.linear_logp
    monkeypatch.setattr(
        ours, "linear_logp", lambda *args, **kw: calls.append(kw) or original(*args, **kw)
    )
    runs = []
    for apply in (False, True):
        trainer = make_trainer(kind, make_model(), tmp_path, bf16=bf16)
        if apply:
            ours.apply(trainer)
            calls.clear()
        runs.append(logged(trainer))
    theirs, mine = runs
    assert len(calls) >= (2 if kind == "sft" else 4)
    assert all(call["temperature"] == (0.8 if kind == "grpo" else 1.0) for call in calls)
    assert len(theirs) == 2
    eps = torch.finfo(torch.bfloat16 if bf16 else torch.float32).eps
    for their, own in zip(theirs, mine, strict=True):
        assert own.keys() == their.keys()
        for name, value in their.items():
            # Sums over a few dozen log-probabilities of about 5 each, and what Adam makes of them.
            assert abs(own[name] - value) <= 64 * eps * max(5.0, abs(value)), name
    assert theirs[0]["loss"] != theirs[1]["loss"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_step_of_weighted_sft(mode, tmp_path):
    """Token weights from a column, cut where the tokens are cut."""
    model = make_model()
    trainer = make_trainer(
        "sft", model, tmp_path, max_length=7, truncation_mode=mode, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.args.max_steps = 1
    cut = slice(None, 7) if mode == "keep_start" else slice(-7, None)
    rows = [(row["input_ids"][cut], row["loss_weights"][cut]) for row in make_data("sft")]
    batch = {
        "input_ids": torch.zeros(8, 7, dtype=torch.long),
        "attention_mask": torch.zeros(8, 7, dtype=torch.long),
        "labels": torch.full((8, 7), -100),
        "loss_weights": torch.zeros(8, 7),
    }
    for row, (ids, weights) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = batch["labels"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["loss_weights"][row, : len(ids)] = torch.tensor(weights)
    twins = [copy.deepcopy(model).float(), copy.deepcopy(model).double()]
    for twin in twins:
        del twin.forward  # TRL's is bound to the original
    eager, truth = (
        with_grads(
            loss_of_logits(t(batch["input_ids"], attention_mask=batch["attention_mask"]), t, batch),
            t,
        )
        for t in twins
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours.apply(trainer, loss_weights="loss_weights")
    trainer.train()
    for name, parameter in model.named_parameters():
        step = (before[name].double() - parameter.detach().double()) / 0.01
        scale = float(before[name].abs().max()) / 0.01
        assert_within_budget(step, eager[name], truth[name], dtype=torch.float32, scale=scale)
    assert abs(trainer.state.log_history[0]["loss"] - float(truth["loss"])) < 1e-4


def test_weights_of_batches():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    inner = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
    rows = [{"input_ids": [5, 6, 7], "w": [1.0, 2.0, 3.0]}, {"input_ids": [8, 9], "w": [4.0, 5.0]}]
    batch = ours.WeightCollator(inner, "w")(rows)
    assert batch["loss_weights"].tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="w must have one number per token in every row, got None"):
        ours.WeightCollator(inner, "w")([{"input_ids": [5]}])
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    left = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(ValueError, match="collator must pad on the right"):
        ours.WeightCollator(left, "w")(rows)
    tokenizer.padding_side = "right"
    batch = ours.WeightCollator(left, "w")(rows)
    assert batch["loss_weights"].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]
    with pytest.raises(ValueError, match="got 1 for 2 tokens"):
        ours.WeightCollator(inner, "w")([{"input_ids": [5, 6], "w": [1.0]}])


def test_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="trainer must be one of TRL"):
        ours.apply(SimpleNamespace(model=make_model(), ref_model=None))
    for settings, reason in [
        ({"loss_type": "dft"}, "loss_weights must come without packing"),
        ({"label_smoothing_factor": 0.1}, "loss_weights must come without compute_loss_func"),
    ]:
        trainer = make_trainer("sft", make_model(), tmp_path, **settings)
        with pytest.raises(ValueError, match=reason):
            ours.apply(trainer, loss_weights="loss_weights")
    trainer = make_trainer("sft", make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"loss_weights must be one of the columns .* got 'other'"):
        ours.apply(trainer, loss_weights="other")
    trainer = make_trainer("dpo", make_model(), tmp_path)
    with pytest.raises(ValueError, match="loss_weights must be None for DPOTrainer"):
        ours.apply(trainer, loss_weights="loss_weights")


def test_it_can_be_undone(tmp_path):
    trainer = make_trainer("sft", make_model(), tmp_path)
    forward, collator = trainer.model.forward, trainer.data_collator
    with ours.apply(trainer, loss_weights="loss_weights"):
        assert trainer.model.forward != forward
        assert isinstance(trainer.data_collator, ours.WeightCollator)
        assert "loss_weights" in trainer._signature_columns
    assert trainer.model.forward == forward
    assert trainer.data_collator is collator
    assert "loss_weights" not in trainer._signature_columns
    trainer.train()
