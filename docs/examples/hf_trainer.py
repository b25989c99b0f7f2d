"""``transformers.Trainer`` with our loss and a column of token weights."""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import trimtab.integrations.transformers


class Counting(Dataset):
    """Counting sequences of one length, so that the default collator can stack them.

    ``loss_weights`` is an argument of the model's forward after ``apply``, so Trainer keeps the
    column. Rows of different lengths need a collator that pads it with zeros.
    """

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, list]:
        ids = [(index * 7 + step) % 128 for step in range(24)]
        weights = [1.0 if step < 12 else 3.0 for step in range(24)]
        return {"input_ids": ids, "labels": ids, "loss_weights": weights}


def main(steps: int = 40) -> list[float]:
    """Trains, and returns the losses that Trainer logs."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4,
        )
    )  # fmt: skip
    trimtab.integrations.transformers.apply(model)  # the one line
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=3e-3, logging_steps=10, save_strategy="no", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Counting())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
