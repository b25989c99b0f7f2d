"""Tiny Hugging Face models from their configurations, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 127
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
       "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},  # its head has a bias
    "mixtral": {
        "num_local_experts": 4,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
        "experts_implementation": "eager",  # the grouped one has no float64
    },
}
# Head, loss or layout of these is something else.
OTHERS: dict[str, dict[str, Any]] = {
    "bart": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 24,
        "encoder_ffn_dim": 24, "decoder_attention_heads": 2, "encoder_attention_heads": 2,
    },
    "bamba": {
        "z_loss_coefficient": 0.1, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "attn_layer_indices": [0], "mamba_expand": 2,
    },
    "t5": {
        "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip


def make_model(kind: str = "llama", *, std: float = 0.3, auto: str = "CausalLM", **changes: Any):
    """A tiny model in training mode, without dropout, with logits far enough from 0 to matter."""
    import transformers

    settings = {**SHAPE, **(MODELS.get(kind) or OTHERS.get(kind, {})), **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.train()


def make_batch(rows: int = 3, width: int = 13) -> dict[str, Tensor]:
    """Tokens, some of whose labels are ignored, the whole last row among them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, width), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 6] = -100
    labels[-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of_logits(output: Any, model: Any, batch: dict[str, Any], divisor: Any = None) -> Tensor:
    """The weighted causal loss from logits, as wide as they are, and the routers' own loss."""
    logits = output.logits[:, :-1].flatten(0, 1)
    target = batch["labels"][:, 1:].flatten()
    losses = F.cross_entropy(logits, target, reduction="none")
    weights = batch.get("loss_weights")
    if weights is not None:
        flat = weights[:, 1:].flatten().to(losses)
        losses = torch.where(target == -100, 0.0, losses * flat)
    loss = losses.sum() / ((target != -100).sum() if divisor is None else divisor)
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + model.config.router_aux_loss_coef * output.aux_loss
    return loss


def with_grads(loss: Tensor, model: Any) -> dict[str, Tensor]:
    """A loss and the gradients of every parameter that it reaches."""
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def make_tokenizer() -> Any:
    """One token per word ``w3`` ... of the tiny models' vocabulary."""
    import tokenizers
    import transformers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


class Widest(TorchDispatchMode):
    """The most rows of logits that one tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            # Gradients of the head have the vocabulary first.
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCAB,):
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return out
