"""A ``LightningModule`` around a Hugging Face model that makes no logits."""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab.integrations.transformers


class Counting(Dataset):
    """Counting sequences, whose second half matters three times as much as the first."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(24) + 7 * index) % 128
        weights = torch.ones(24)
        weights[12:] = 3.0
        return {"input_ids": ids, "labels": ids, "loss_weights": weights}


class WeightedLM(lightning.LightningModule):
    """The model's own loss, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4,
            )
        )  # fmt: skip
        trimtab.integrations.transformers.apply(self.model)  # the one line
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        """One micro-batch."""
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int = 40) -> list[float]:
    """Trains, and returns the loss of each step."""
    lightning.seed_everything(0, verbose=False)
    module = WeightedLM().train()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Counting(), batch_size=8, shuffle=True))
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
    return module.losses


if __name__ == "__main__":
    main()
