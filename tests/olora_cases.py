"""Tiny models with stock PEFT adapters, and O-LoRA as its released code computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCAB = 41


class Kind(NamedTuple):
    """One architecture: how to make it, and what its attention calls its projections."""

    model: str
    targets: tuple[str, str]
    settings: dict[str, Any]


KINDS = {
    "t5": Kind("AutoModelForSeq2SeqLM", ("q", "v"), {
        "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0,
    }),
    "llama": Kind("AutoModelForCausalLM", ("q_proj", "v_proj"), {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }),
    "bert": Kind("AutoModelForMaskedLM", ("query", "value"), {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }),
    "gpt2": Kind("AutoModelForCausalLM", ("c_attn", "c_proj"), {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
    }),
}  # fmt: skip


def make_base(kind: str = "llama", **changes: Any) -> Any:
    """A model without dropout, so that two forward passes agree."""
    import transformers

    chosen = KINDS[kind]
    settings = {"vocab_size": VOCAB, **chosen.settings, **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    return getattr(transformers, chosen.model).from_config(config).eval()


def make_config(kind: str = "llama", rank: int = 3, **changes: Any) -> Any:
    """A LoRA of random B, so that it does something."""
    import peft

    targets = list(KINDS[kind].targets) if kind in KINDS else kind.split()
    settings = {"r": rank, "lora_alpha": 6, "target_modules": targets, **changes}
    return peft.LoraConfig(**{"init_lora_weights": False, **settings})


def make_tasks(
    kind: str = "llama",
    ranks: Sequence[int] = (3, 2, 4),
    changes: Sequence[dict[str, Any]] = ({}, {}, {}),
    **settings: Any,
) -> Any:
    """An ``OLoRA`` whose last task of several is in training: "t0", "t1", ..."""
    import peft

    from trimtab.algorithms.olora import OLoRA

    base = make_base(kind)
    configs = [
        make_config(kind, rank, **own)
        for rank, own in zip(ranks, [*changes, *[{}] * len(ranks)], strict=False)
    ]
    torch.manual_seed(1)
    olora = OLoRA(peft.get_peft_model(base, configs[0], adapter_name="t0"), **settings)
    for i, config in enumerate(configs[1:], 1):
        olora.start_task(f"t{i}", config)
    return olora


def make_batch(kind: str = "llama", rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Ids and labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, 7), generator=g)
    labels = torch.randint(3, VOCAB, (rows, 5), generator=g) if kind == "t5" else ids
    return {"input_ids": ids, "labels": labels}


def dataset(count: int = 24, kind: str = "llama") -> list[dict[str, Tensor]]:
    """Rows for a Trainer."""
    batch = make_batch(kind, count, seed=7)
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]


def loop_penalty(
    model: nn.Module,
    finished: Sequence[str],
    current: str,
    *,
    lamda_1: float = 0.5,
    lamda_2: float = 0.0,
    norm: str = "l1",
    side: str = "A",
) -> Tensor:
    """The released loss term, by walking the names of the parameters twice for each of them.

    The released fork keeps the earlier tasks of a module concatenated, in ``lora_A``, and the one
    in training in ``loranew_A``; here PEFT's own names are put together likewise.
    """
    orthogonal = 0.0
    for table in (f"lora_{side}", f"lora_embedding_{side}"):
        for name, new in model.named_parameters():
            module, found, rest = name.partition(f".{table}.{current}")
            if not found or rest not in ("", ".weight"):
                continue
            earlier = [
                old
                for task in finished
                for other, old in model.named_parameters()
                if other == f"{module}.{table}.{task}{rest}"
            ]
            if not earlier:
                continue
            dim = 0 if side == "A" else 1
            old = torch.cat([t.detach().flatten(1) for t in earlier], dim)
            new = new.flatten(1)
            product = old @ new.T if side == "A" else old.T @ new
            size = product.abs() if norm == "l1" else product**2
            orthogonal = orthogonal + size.sum()
    length = 0.0
    for name, new in model.named_parameters():
        tables = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
        if any(f".{table}.{current}" in name for table in tables) and not name.endswith(".bias"):
            length = length + torch.norm(new, p=2)
    return lamda_1 * orthogonal + lamda_2 * length


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Name -> gradient, for what has one; zeros for what a loss does not reach."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), found, strict=True)
    }


def frozen_and_trained(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the adapters that have no gradient, and of those with."""
    split: tuple[set[str], set[str]] = (set(), set())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            split[parameter.requires_grad].add(name.split(".lora_")[1].split(".")[1])
    return split
