"""A plain PyTorch loop: a Hugging Face model that makes no logits, and a weight per token."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab.integrations.transformers


def make_model() -> LlamaForCausalLM:
    """A tiny model; yours comes from ``from_pretrained``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_batch() -> dict[str, torch.Tensor]:
    """Counting sequences, whose second half matters three times as much as the first."""
    ids = (torch.arange(24) + torch.randint(100, (8, 1))) % 128
    weights = torch.ones(ids.shape)
    weights[:, 12:] = 3.0
    return {"input_ids": ids, "labels": ids, "loss_weights": weights}


def main(steps: int = 40) -> list[float]:
    """Trains, and returns the loss of each step."""
    model = make_model().train()
    trimtab.integrations.transformers.apply(model)  # the one line
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        output = model(**make_batch())
        assert output.logits is None  # they were never made
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
