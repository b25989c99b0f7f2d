"""TRL's ``SFTTrainer`` with a weight for each token, from a column of the data set.

The same ``apply(trainer)``, without ``loss_weights``, serves DPO, KTO and GRPO trainers.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import trimtab.integrations.trl


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per number; yours comes from ``from_pretrained``."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i for i in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_row(index: int) -> dict[str, list]:
    """Counting of some length; what comes late matters more."""
    ids = [3 + (index * 7 + step) % 125 for step in range(16 + index % 9)]
    return {
        "input_ids": ids,
        "loss_weights": [1.0 if step < 8 else 3.0 for step in range(len(ids))],
    }


def main(steps: int = 40) -> list[float]:
    """Trains, and returns the losses that the trainer logs."""
    disable_progress_bars()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3,
            logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model, args, train_dataset=Dataset.from_list([make_row(i) for i in range(256)]),
            processing_class=make_tokenizer(),
        )  # fmt: skip
        trimtab.integrations.trl.apply(trainer, loss_weights="loss_weights")  # the one line
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
