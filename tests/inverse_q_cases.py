"""Tiny models, batches and float64 oracles for the tests of Inverse-Q*."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRINCIPLE = [11, 12, 13]
SHAPE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4},
}
# Length of the prompt and of the response of each row.
ROWS = ((4, 5), (2, 3), (6, 1), (1, 4))


def make_model(kind: str = "llama", seed: int = 0, std: float = 0.3, **changes: Any) -> Any:
    """A tiny model in float64, random enough for its distributions to differ between contexts."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind], **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.double().eval()


def make_batch(side: str = "left", rows: tuple[tuple[int, int], ...] = ROWS) -> dict[str, Tensor]:
    """Rows of prompt and response; what pads is no padding token, so that it would be seen."""
    width = max(map(sum, rows))
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 37, (len(rows), width), generator=g)
    text = torch.randint(3, 37, (len(rows), width), generator=g)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(rows):
        first = width - prompt - response if side == "left" else 0
        last = first + prompt + response
        ids[row, first:last] = text[row, : last - first]
        mask[row, first:last] = 1
        labels[row, first + prompt : last] = ids[row, first + prompt : last]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def full_logits(model: Any, batch: dict[str, Tensor], principle: list[int] | None) -> Tensor:
    """(N, V) logits of the response tokens, one row at a time and without any padding."""
    parts = []
    for ids, mask, labels in zip(*batch.values(), strict=True):
        text, marked = ids[mask == 1], labels[mask == 1] != -100
        if not bool(marked.any()):
            continue
        before = torch.tensor(principle or [], dtype=torch.long)
        at = marked.nonzero()[:, 0] + len(before) - 1
        parts.append(model(torch.cat((before, text))[None]).logits[0, at])
    return torch.cat(parts)


def star_logits(model: Any, batch: dict[str, Tensor], rho: float) -> Tensor:
    """(N, V) contrasted logits of a model with and without the principle."""
    positive, negative = (full_logits(model, batch, p) for p in (PRINCIPLE, None))
    return (1.0 + rho) * positive - rho * negative


def chosen(logits: Tensor, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """(N,) log-probabilities of the response tokens."""
    target = batch["labels"][batch["labels"] != -100]
    return torch.log_softmax(logits / temperature, -1).gather(1, target[:, None])[:, 0]


def spread(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(N,) in its places of (B, T)."""
    out = torch.zeros(batch["labels"].shape, dtype=values.dtype)
    out[batch["labels"] != -100] = values
    return out


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    """Gradients of a loss for every parameter, zeros where it has none."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


class LoraHead(torch.nn.Module):
    """A linear layer with adapters, as PEFT keeps them."""

    def __init__(self, base: torch.nn.Linear, rank: int = 3) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.base_layer = base.requires_grad_(False)
        width, classes = base.in_features, base.out_features
        self.lora_A = torch.nn.ModuleDict({"a": torch.nn.Linear(width, rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"a": torch.nn.Linear(rank, classes, bias=False)})
        self.lora_dropout = torch.nn.ModuleDict({"a": torch.nn.Identity()})
        self.scaling, self.use_dora, self.active_adapters = {"a": 2.0}, {"a": False}, ["a"]
        self.merged = self.disable_adapters = False

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x)
        return self.base_layer(x) + 2.0 * self.lora_B["a"](self.lora_A["a"](x))


class Adapted(torch.nn.Module):
    """A model as PEFT wraps it, with an adapter on its head alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.lm_head = LoraHead(model.lm_head).double()
        self.inside = model
        self.disabled = 0

    def get_base_model(self) -> Any:
        return self.inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.inside.lm_head.disable_adapters = True
        self.disabled += 1
        yield
        self.inside.lm_head.disable_adapters = False


class Largest(TorchDispatchMode):
    """Rows of logits made at a time, and rows of the products that made them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.classes, self.width = model.lm_head.weight.shape
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A gradient of the head has these columns too, and as many rows as it is wide.
        shape = out.shape if isinstance(out, Tensor) else ()
        if len(shape) == 2 and shape[1] == self.classes and shape[0] not in (self.width, shape[1]):
            self.largest = max(self.largest, shape[0])
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                self.products += shape[0]
        return out
