"""Inverse-Q* with TRL's conventions: text in, the same training as with token ids."""

from __future__ import annotations

import pytest
import torch

from hf_cases import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from trimtab.algorithms.inverse_q import InverseQConfig, InverseQTrainer, PrinciplePrompt
from trimtab.integrations import trl as ours

PROMPTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13", "w14"]
PRINCIPLE = "w20 w21 w22"
CHAT = (
    "{% for message in messages %}{{ 'w30 ' if message.role == 'system' else 'w31 ' }}"
    "{{ message.content }} w33 {% endfor %}{% if add_generation_prompt %}w32{% endif %}"
)


def config(folder, **settings):
    return InverseQConfig(
        str(folder), use_cpu=True, per_device_train_batch_size=2, max_steps=3, logging_steps=1,
        report_to=[], disable_tqdm=True, learning_rate=1e-2, max_new_tokens=4, beta=1.0,
        save_strategy="no", **settings,
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ids_of(words):
    return [int(word[1:]) for word in words.split()]


def test_text_trains_as_its_token_ids_do(tmp_path):
    tokenizer = make_tokenizer()
    text = ours.InverseQTrainer(
        make_model(), config(tmp_path), principle=PRINCIPLE, rho=0.5, processing_class=tokenizer,
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
    )  # fmt: skip
    plain = InverseQTrainer(
        make_model(), config(tmp_path), processing_class=tokenizer,
        estimator=PrinciplePrompt(ids_of(PRINCIPLE), rho=0.5),
        train_dataset=[{"input_ids": ids_of(prompt)} for prompt in PROMPTS],
    )  # fmt: skip
    found = losses(text)
    assert found == losses(plain)
    assert len(set(found)) == 3


def test_conversations_get_the_principle_in_their_system_turn():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    prompts = ours._Prompts(tokenizer, PRINCIPLE)
    turn = {"role": "user", "content": "w5 w6"}
    system = {"role": "system", "content": "w40"}
    rows = prompts.rows([{"prompt": [turn]}, {"prompt": [system, turn]}])
    expected = {
        "w31 w5 w6 w33 w32": "w30 w20 w21 w22 w33 w31 w5 w6 w33 w32",
        "w30 w40 w33 w31 w5 w6 w33 w32": "w30 w20 w21 w22 w40 w33 w31 w5 w6 w33 w32",
    }
    for row, (without, longer) in zip(rows, expected.items(), strict=True):
        assert row["input_ids"] == ids_of(without)
        assert prompts.with_principle(torch.tensor(row["input_ids"])).tolist() == ids_of(longer)


def test_rewards_of_text_and_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    seen = []

    def short(prompts, completions, completion_ids):
        seen.append((prompts, completions, completion_ids))
        return [-float(len(ids)) for ids in completion_ids]

    def constant(prompts, **_):
        return [0.25] * len(prompts)

    trainer = ours.InverseQTrainer(
        make_model(), config(tmp_path, loss="ppo", advantage="sequence", num_generations=2),
        principle=PRINCIPLE, processing_class=make_tokenizer(), reward_funcs=[short, constant],
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    assert trainer.algorithm.ref_model is None
    losses(trainer)
    prompts, completions, ids = seen[0]
    assert set(prompts) <= set(PROMPTS)
    assert len(completions) == 4
    assert completions[0].split() == [f"w{i}" for i in ids[0] if i > 2]
    logged = [entry for entry in trainer.state.log_history if "sequence_reward" in entry]
    lengths = sum(len(row) for row in ids) / len(ids)
    assert logged[0]["sequence_reward"] == pytest.approx(0.25 - lengths)


def test_refused_in_words(tmp_path):
    given = {"principle": PRINCIPLE, "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match="prompt must be a text or a conversation"):
        ours.InverseQTrainer(
            make_model(), config(tmp_path), train_dataset=[{"text": "w5"}], **given
        )
    with pytest.raises(ValueError, match="principle must be a text, got ''"):
        ours.InverseQTrainer(make_model(), config(tmp_path), **{**given, "principle": ""})
    trainer = ours.InverseQTrainer(
        make_model(), config(tmp_path), train_dataset=[{"prompt": "w5"}], **given
    )
    with pytest.raises(ValueError, match="prompt must be one of the data sets"):
        trainer.prompts.with_principle(torch.tensor([7]))
