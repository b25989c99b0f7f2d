"""InverseQTrainer: the same numbers however a run is cut, and what it logs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file

from inverse_q_cases import PRINCIPLE, chosen, full_logits, make_model, star_logits
from trimtab.algorithms.inverse_q import (
    InverseQ,
    InverseQConfig,
    InverseQTrainer,
    PrinciplePrompt,
)
from trimtab.algorithms.inverse_q.sampling import (
    PromptCollator,
    row_seeds,
    sample_responses,
    split_rows,
)

PROMPTS = [{"input_ids": [3 + (7 * i + j) % 30 for j in range(2 + i % 4)]} for i in range(24)]
LOSSES: dict[str, dict[str, Any]] = {
    "imitation": {},
    "ppo": {"normalize_advantages": True, "kl_coef": 0.1},
    "reverse_kl": {"chunk_size": 7},
}
close = torch.testing.assert_close


def make_config(folder: Path, **settings: Any) -> InverseQConfig:
    settings = {
        "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "max_new_tokens": 5,
        "save_strategy": "no", "beta": 1.0, **settings,
    }  # fmt: skip
    return InverseQConfig(str(folder), **settings)


def make_trainer(folder: Path, model: Any = None, **settings: Any) -> InverseQTrainer:
    names = ("estimator", "ref_model", "reward_fn", "train_dataset", "eval_dataset", "callbacks")
    others = {name: settings.pop(name) for name in names if name in settings}
    others = {"estimator": PrinciplePrompt(PRINCIPLE), "train_dataset": PROMPTS, **others}
    return InverseQTrainer(
        make_model() if model is None else model, make_config(folder, **settings), **others
    )


def state_of(trainer: InverseQTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def logged(trainer: InverseQTrainer) -> list[dict[str, float]]:
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if k != "epoch"} for row in rows]


def dropped(**changes: Any) -> Any:
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return make_model("gpt2", **rates, **changes)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("imitation", {}),
        ("ppo", {"updates_per_batch": 3, "advantage": "sequence", "num_generations": 2}),
        ("reverse_kl", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    ],
)
def test_a_run_that_resumes_has_the_numbers_of_one_that_did_not(
    tmp_path: Path, loss: str, settings: dict[str, Any]
) -> None:
    """With dropout, so that the state of torch's generator counts too."""
    settings = {"loss": loss, "save_strategy": "steps", "save_steps": 2, **settings}
    whole = make_trainer(tmp_path, dropped(), **settings)
    whole.train()
    torch.manual_seed(77)
    again = make_trainer(tmp_path, dropped(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again) == logged(whole)
    assert len(logged(whole)) == 4
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, tensor in state_of(whole).items():
        assert torch.equal(tensor, state_of(again)[name]), name
        assert name not in saved or not torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_gives_the_numbers_of_one_large_batch(tmp_path: Path, loss: str) -> None:
    def run(name: str, **settings: Any) -> InverseQTrainer:
        settings = {"loss": loss, **LOSSES[loss], "num_generations": 2, **settings}
        trainer = make_trainer(tmp_path / name, optim="sgd", max_grad_norm=0.0, **settings)
        trainer.train()
        return trainer

    large = run("a")
    small = run("b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for got, want in zip(logged(small), logged(large), strict=True):
        # The base class adds the losses up in float32.
        assert got == pytest.approx(want, abs=2**-22)
    for name, tensor in state_of(small).items():
        close(tensor, state_of(large)[name])
    start = make_model().state_dict()
    assert any(not torch.equal(start[name], t) for name, t in state_of(large).items())


def test_what_is_logged_is_of_the_responses_it_sampled(tmp_path: Path) -> None:
    seen = []

    class Watched(InverseQTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({k: inputs[k].clone() for k in ("input_ids", "attention_mask", "labels")})
            seen.append({k: inputs[k] for k in inputs if k not in seen[-1]})
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = make_config(tmp_path, max_steps=1, temperature=0.8, num_generations=3)
    trainer = Watched(
        make_model(), config, estimator=PrinciplePrompt(PRINCIPLE, rho=0.5), train_dataset=PROMPTS
    )
    trainer.train()
    batch, first, row = seen[0], make_model(), logged(trainer)[0]
    assert batch["labels"].shape[0] == 12
    asked = [{"input_ids": prompt} for prompt in split_rows(batch)[0]]
    again = sample_responses(
        first, **PromptCollator(0)(asked), seeds=row_seeds(config.seed, (0, 0), 0, 12),
        max_new_tokens=5, temperature=0.8, eos_token_id=2,
    )  # fmt: skip
    for got, want in zip(split_rows(again)[1], split_rows(batch)[1], strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        logits = full_logits(first, batch, None)
        ref, star = chosen(logits, batch, 0.8), chosen(star_logits(first, batch, 0.5), batch)
        entropy = torch.distributions.Categorical(logits=logits / 0.8).entropy()
    wanted = {
        "loss": (ref - star).square().mean(), "reward": (star - ref).mean(), "kl": 0.0,
        "entropy": entropy.mean(), "logp": ref.mean(), "response_length": len(ref) / 12,
        "star_kl": ((star - ref).expm1() - (star - ref)).mean(),
    }  # fmt: skip
    for name, value in wanted.items():
        assert row[name] == pytest.approx(float(value), abs=2**-22), name
    assert "ref_logp" in seen[1]


def test_without_reports_the_reference_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, report_rewards=False, loss="reverse_kl")
    monkeypatch.setattr(InverseQ, "ref_logp", lambda *a: pytest.fail("not needed"))
    trainer.train()
    assert not {"kl", "reward", "star_kl"} & set(logged(trainer)[0])
    assert logged(trainer)[0]["exact_star_kl"] == pytest.approx(logged(trainer)[0]["loss"])


@pytest.mark.parametrize("loss", LOSSES)
def test_training_lowers_the_distance_to_pi_star(tmp_path: Path, loss: str) -> None:
    advantage = {"advantage": "log_ratio"} if loss == "ppo" else {}
    trainer = make_trainer(
        tmp_path, make_model(std=0.4), loss=loss, max_steps=25, eval_dataset=PROMPTS[:16],
        per_device_train_batch_size=24, learning_rate=5e-3, **advantage,
    )  # fmt: skip
    before = trainer.evaluate()
    assert trainer.evaluate()["eval_star_kl"] == before["eval_star_kl"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_star_kl"] < 0.7 * before["eval_star_kl"]
    assert before["eval_kl"] == pytest.approx(0.0, abs=1e-9)
    assert after["eval_kl"] > 0.0
    assert after["eval_response_length"] <= 5
    logs = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["eval_star_kl"] for row in logs][-1] == after["eval_star_kl"]


def count_sevens(prompts: list[Tensor], responses: list[Tensor]) -> list[float]:
    assert all({"input_ids": prompt.tolist()} in PROMPTS for prompt in prompts)
    return [float((response == 7).sum()) for response in responses]


def test_the_baseline_learns_a_reward_of_whole_responses(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, loss="ppo", advantage="sequence", reward_fn=count_sevens, max_steps=30,
        num_generations=4, per_device_train_batch_size=12, beta=0.02, updates_per_batch=2,
    )  # fmt: skip
    trainer.train()
    rewards = [row["sequence_reward"] for row in logged(trainer)]
    assert rewards[0] == rewards[1] != rewards[2]
    assert sum(rewards[-4:]) > 3 * sum(rewards[:4])
    clipped = [row["clip_fraction"] for row in logged(trainer)]
    assert clipped[0] == 0.0
    assert max(clipped[1::2]) > 0.0
    assert logged(trainer)[-1]["kl"] > 0.0


def test_the_baseline_compares_the_responses_to_one_prompt(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, loss="ppo", advantage="sequence", num_generations=2,
        reward_fn=lambda _, responses: [float(response.sum()) for response in responses],
        per_device_train_batch_size=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, "cpu")
    assert count == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    for batch in batches:
        response = batch["labels"] != -100
        rows = batch["advantages"].sum(1) / response.sum(1)
        assert torch.equal(batch["advantages"], torch.where(response, rows[:, None], 0.0))
        # The policy is still pi_ref: no KL penalty.
        left, right = batch["sequence_reward"].double()
        assert left != right
        close(rows, torch.stack((left - right, right - left)))


def test_every_step_draws_anew(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_dataset=PROMPTS[:1])
    drawn = []
    for trainer.state.global_step in (0, 1, 1):
        (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
        drawn.append(split_rows(batch)[1][0].tolist())
    assert drawn[0] != drawn[1] == drawn[2]


def test_sampling_scoring_and_loss_run_in_mixed_precision(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, make_model().float(), bf16=True, max_steps=1), []
    for name in ("score", "loss_and_metrics"):
        inner = getattr(trainer.algorithm, name)

        def watched(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return _inner(*args, **kwargs)

        setattr(trainer.algorithm, name, watched)
    trainer.train()
    assert seen == [True, True]


def test_bfloat16_and_a_frozen_head(tmp_path: Path) -> None:
    model = make_model().float()
    model.lm_head.weight.requires_grad_(False)
    head = model.lm_head.weight.clone()
    trainer = make_trainer(
        tmp_path, model, bf16=True, gradient_accumulation_steps=2, gradient_checkpointing=True
    )
    trainer.train()
    assert torch.equal(model.lm_head.weight, head)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    exact = make_trainer(tmp_path, loss="imitation", gradient_accumulation_steps=2)
    exact.train()
    got, want = logged(trainer)[0], logged(exact)[0]
    assert got["entropy"] == pytest.approx(want["entropy"], rel=2**-6)
    assert got["kl"] == pytest.approx(0.0, abs=2**-8)
    assert not torch.equal(model.model.embed_tokens.weight, make_model().model.embed_tokens.weight)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora(tmp_path: Path, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(make_model(std=0.4), config).double()

    settings = {
        "loss": "reverse_kl", "save_strategy": "steps", "save_steps": 15, "max_steps": 30,
        "per_device_train_batch_size": 12, "lr_scheduler_type": "constant",
    }  # fmt: skip
    trainer = make_trainer(tmp_path, adapted(), **settings)
    assert trainer.algorithm.ref_model is None
    trainer.train()
    rows = logged(trainer)
    assert rows[-1]["exact_star_kl"] < 0.7 * rows[0]["exact_star_kl"]
    with trainer.model.disable_adapter(), torch.no_grad():
        ids = torch.tensor([PROMPTS[3]["input_ids"]])
        close(trainer.model(ids).logits, make_model(std=0.4)(ids).logits)
    again = make_trainer(tmp_path, adapted(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert logged(again) == rows


def test_every_argument_has_a_help_text_and_defaults_hold(tmp_path: Path) -> None:
    base = {f.name for f in fields(InverseQConfig.__mro__[1])}
    own = [f for f in fields(InverseQConfig) if f.name not in base]
    assert len(own) == 16
    assert all(len(f.metadata["help"]) > 10 for f in own)
    from transformers import HfArgumentParser

    line = ["--output_dir", str(tmp_path), "--beta", "0.2", "--loss", "ppo", "--use_cpu"]
    (parsed,) = HfArgumentParser(InverseQConfig).parse_args_into_dataclasses(line)
    assert (parsed.beta, parsed.loss, parsed.learning_rate) == (0.2, "ppo", 1e-6)


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("max_new_tokens must be", {"max_new_tokens": 0}),
        ("num_generations must be", {"num_generations": 0}),
        ("sampling_seed must be", {"sampling_seed": -1}),
        ("clip_range must be 0.2 with loss='imitation'", {"clip_range": 0.1}),
        ("chunk_size must be 1024 with loss='ppo'", {"chunk_size": 5, "loss": "ppo"}),
        ("advantage must be", {"advantage": "gae", "loss": "ppo"}),
        ("loss must be one of", {"loss": "dpo"}),
        ("label_smoothing_factor must be off", {"label_smoothing_factor": 0.1}),
        ("torch_compile must be off", {"torch_compile": True}),
        ("reward_fn must be None", {"reward_fn": count_sevens}),
        ("beta must be", {"beta": -1.0}),
    ],
)
def test_errors_name_the_argument(tmp_path: Path, match: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, **settings)


def test_rewards_that_do_not_fit_and_missing_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, loss="ppo", advantage="sequence", reward_fn=lambda prompts, responses: [1.0]
    )
    with pytest.raises(ValueError, match="reward_fn must give 4 finite rewards"):
        trainer.train()
    model = make_model()
    for owner in (model.config, model.generation_config):
        owner.pad_token_id = owner.eos_token_id = None
    with pytest.raises(ValueError, match="pad_token_id must be given"):
        make_trainer(tmp_path, model)
    make_trainer(tmp_path, model, pad_token_id=0).train()


def test_without_transformers_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["transformers"] = None
from trimtab.algorithms.inverse_q import InverseQConfig, InverseQTrainer
try:
    InverseQConfig()
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "pip install 'transformers[torch]'" in result.stdout, result.stderr
