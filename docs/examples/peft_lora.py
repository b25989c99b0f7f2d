"""LoRA (PEFT), on the head too, with our loss: adapters train, logits are never made."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab.integrations.transformers


def main(steps: int = 40) -> list[float]:
    """Trains, and returns the loss of each step."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4,
        )
    )  # fmt: skip
    config = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.05,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config).train()
    trimtab.integrations.transformers.apply(model)  # before or after get_peft_model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(steps):
        ids = (torch.arange(24) + torch.randint(100, (8, 1))) % 128
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
