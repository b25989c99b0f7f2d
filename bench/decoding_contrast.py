"""Tokens per second of Self-CD: ours, transformers' own guidance, and the released loop.

All run the same LLaMA-shaped model with random weights on the same prompts, greedily. Times are
those of one new token: of a call, divided by the tokens that it made. The contexts differ in
length, as with and without a safety prompt; within a batch the lengths are equal, so that nobody
needs padding but whoever makes one batch of both contexts.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from measure import Judge, Outputs, Step, Task
from suite import Provider, always, not_here
from trimtab.testing import BudgetError

RATIO = 2.5
SAFETY_TOKENS = 48  # what the safety prompt adds to a context
FLOOR = "forwards alone"
LOOP = "released loop"
LOOP_TOKENS = 8  # on which the released loop is timed
_JUDGED = 2  # sequences compared with float64

_SHAPES = {  # hidden, intermediate, layers, heads, vocabulary
    "tiny": (32, 64, 2, 4, 128),
    "small": (512, 1376, 8, 8, 32000),
    "1b": (2048, 8192, 16, 32, 128256),
}


class Case(NamedTuple):
    """One model and batch."""

    size: str
    dtype_name: str
    batch: int
    prompt: int  # tokens without the safety prompt
    new: int
    device: str

    family = "contrast"
    op = "self_contrastive_generate"
    mode = "self_cd"
    capturable = False  # every token is a launch of its own
    flop = 0
    bytes = 0

    @property
    def id(self) -> str:
        return f"{self.mode}-{self.dtype_name}-{self.batch}x{self.prompt}x{self.new}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    def describe(self) -> dict[str, object]:
        """The fields that name this case in a result row."""
        return {
            "family": self.family, "op": self.op, "mode": self.mode, "dtype": self.dtype_name,
            "shape": [self.batch, self.prompt, self.new], "device": self.device, "model": self.size,
        }  # fmt: skip


class Inputs(NamedTuple):
    """Prompts of both contexts."""

    positive: Tensor  # (B, P), without the safety prompt
    negative: Tensor  # (B, P + S), with it

    def copy(self) -> Inputs:
        """The same values in memory of their own."""
        return Inputs(*(t.clone() for t in self))


def cases(device: str, *, quick: bool = False) -> list[Case]:
    """One sequence, and a batch."""
    if quick:
        return [Case("tiny", "float32", batch, 12, 6, device) for batch in (1, 3)]
    size, dtype = ("1b", "bfloat16") if device == "cuda" else ("small", "float32")
    batches = (1, 8, 64) if device == "cuda" else (1, 8)
    return [Case(size, dtype, batch, 128, 64, device) for batch in batches]


@lru_cache(maxsize=2)
def model_of(size: str, dtype: torch.dtype, device: str) -> Any:
    """A LLaMA of random weights that never ends a sequence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, classes = _SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=classes,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def make_inputs(case: Case) -> Inputs:
    """Random prompts, each context's safety prompt in front."""
    generator = torch.Generator().manual_seed(0)
    low, classes = 3, _SHAPES[case.size][-1]
    positive = torch.randint(low, classes, (case.batch, case.prompt), generator=generator)
    prefix = torch.randint(low, classes, (1, SAFETY_TOKENS), generator=generator)
    negative = torch.cat([prefix.expand(case.batch, -1), positive], 1)
    return Inputs(positive.to(case.device), negative.to(case.device))


# Who takes part


def _with_model(generate: Callable[[Case, Any, Inputs], Tensor]) -> Callable[[Case], Step]:
    def step(case: Case) -> Step:
        model = model_of(case.size, case.dtype, case.device)

        @torch.no_grad()
        def run(inputs: Inputs) -> Outputs:
            return {"token": generate(case, model, inputs)}

        return run

    return step


def ours(impl: str) -> Callable[[Case, Any, Inputs], Tensor]:
    """Both contexts as one batch, one cache, and the contrast from logits to tokens."""

    def generate(case: Case, model: Any, inputs: Inputs) -> Tensor:
        from trimtab import self_contrastive_generate

        answers = self_contrastive_generate(
            model, inputs.positive, inputs.negative, ratio=RATIO, max_new_tokens=case.new,
            attention_mask=torch.ones_like(inputs.positive),
            safety_attention_mask=torch.ones_like(inputs.negative), impl=impl,
        )  # fmt: skip
        return answers[:, inputs.positive.shape[1] :]

    return generate


def guidance(case: Case, model: Any, inputs: Inputs) -> Tensor:
    """``generate`` with guidance: two forward passes per token, one after the other."""
    answers = model.generate(
        inputs.positive, attention_mask=torch.ones_like(inputs.positive), guidance_scale=RATIO,
        negative_prompt_ids=inputs.negative,
        negative_prompt_attention_mask=torch.ones_like(inputs.negative),
        max_new_tokens=case.new, do_sample=False,
    )  # fmt: skip
    return answers[:, inputs.positive.shape[1] :]


def released_loop(case: Case, model: Any, inputs: Inputs) -> Tensor:
    """Both contexts of one sequence in full for every token, all positions' logits in float32."""
    positive, negative = inputs.positive[:1], inputs.negative[:1]
    for _ in range(loop_tokens(case)):
        plain = model(positive, use_cache=False).logits.float()[:, -1]
        safe = model(negative, use_cache=False).logits.float()[:, -1]
        token = (safe - RATIO * (safe - plain)).argmax(-1, keepdim=True)
        positive, negative = torch.cat([positive, token], 1), torch.cat([negative, token], 1)
    return positive[:, inputs.positive.shape[1] :]


def forwards(case: Case, model: Any, inputs: Inputs) -> Tensor:
    """The forward passes of both contexts as one batch with a cache; the tokens are made up."""
    padding = inputs.negative.shape[1] - inputs.positive.shape[1]
    ids = torch.cat([torch.nn.functional.pad(inputs.positive, (padding, 0)), inputs.negative])
    mask = torch.ones_like(ids)
    mask[: len(inputs.positive), :padding] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache = None
    for _ in range(case.new):
        out = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache,
                    use_cache=True, logits_to_keep=1)  # fmt: skip
        cache, ids, places = out.past_key_values, ids[:, -1:], places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return out.logits[:, -1]


def loop_tokens(case: Case) -> int:
    return min(case.new, LOOP_TOKENS)


def _loop_note(case: Case) -> str | None:
    if case.batch == 1 and loop_tokens(case) == case.new:
        return None
    return (
        f"timed on the first {loop_tokens(case)} tokens of one sequence: it takes one sequence at "
        "a time, and each token longer than the one before"
    )


def _needs_transformers(case: Case) -> str | None:
    found = importlib.util.find_spec("transformers") is not None
    return None if found else "transformers is not installed"


def _ours_why_not(impl: str) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        row = torch.empty(1, 1, dtype=case.dtype, device=case.device)
        missing = not_here("contrastive_sample", case.device, impl, row, row, alpha=RATIO - 1)
        return missing or _needs_transformers(case)

    return why_not


def _all_tokens(case: Case) -> int:
    return case.batch * case.new


def _the_forwards_decide(case: Case) -> str:
    return "the forward passes take nearly all of the time; native shows it"


PROVIDERS = (
    Provider(FLOOR, _with_model(forwards), _needs_transformers, checked=False, units=_all_tokens),
    Provider(LOOP, _with_model(released_loop), _needs_transformers, units=loop_tokens,
             note=_loop_note),
    *(
        Provider(f"trimtab {impl}", _with_model(ours(impl)), _ours_why_not(impl), impl=impl,
                 units=_all_tokens,
                 costly=_the_forwards_decide if impl == "reference" else always)
        for impl in ("native", "triton", "reference")
    ),
    Provider("Hugging Face guidance", _with_model(guidance), _needs_transformers,
             units=_all_tokens),
)  # fmt: skip


# How they are judged


def task_of(case: Case) -> Task:
    """Data and judgement of a case."""
    inputs = make_inputs(case)
    tiny = make_inputs(case._replace(batch=1, prompt=4))
    return Task(inputs, tiny, {}, lambda outputs: outputs, case.dtype, case.device,
                judge_tokens(case, inputs))  # fmt: skip


def judge_tokens(case: Case, inputs: Inputs) -> Judge:
    """Each token must be the likeliest after those before it, up to the model's rounding.

    The tokens go through a float64 copy of the model. What they may fall short of the largest
    contrasted logit by is twice the largest error of the model in its own dtype, on each side.
    """
    model = model_of(case.size, case.dtype, case.device)
    exact = copy.deepcopy(model).double()

    def judge(results: Outputs, eager: Outputs | None) -> dict[str, float]:
        tokens = results["token"][:_JUDGED]
        due = loop_tokens(case) if eager is None else case.new
        if tokens.shape[1] != due or len(results["token"]) not in (1, case.batch):
            raise BudgetError(f"token: shape {tuple(results['token'].shape)}, {due} tokens are due")
        z = contrast_along(exact, inputs, tokens)
        error = float((contrast_along(model, inputs, tokens).double() - z).abs().max())
        short = float((z.amax(-1) - z.gather(-1, tokens[..., None]).squeeze(-1)).max())
        if not short <= 4 * error:
            raise BudgetError(f"token: {short:.2e} below the largest logit, budget {4 * error:.2e}")
        return {"shortfall": short}

    return judge


@torch.no_grad()
def contrast_along(model: Any, inputs: Inputs, tokens: Tensor) -> Tensor:  # (b, new, V)
    """Contrasted logits before each of the tokens."""
    rows, new = tokens.shape

    def logits(prompts: Tensor) -> Tensor:
        whole = torch.cat([prompts[:rows], tokens], 1)
        return model(whole, use_cache=False).logits[:, -new - 1 : -1]

    plain, safe = logits(inputs.positive), logits(inputs.negative)
    return safe - RATIO * (safe - plain)
