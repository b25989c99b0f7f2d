"""TRL's trainers with our kernels, ``apply(trainer)``, and Inverse-Q* with TRL's conventions.

TRL's SFT, DPO, KTO, GRPO and RLOO trainers ask their model for per-token log-probabilities in one
way, ``model(..., labels=labels, fused_lm_head=True)``. That call is what is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.algorithms.causal_lm import transform
from trimtab.algorithms.inverse_q import PrinciplePrompt
from trimtab.algorithms.inverse_q.trainer import InverseQTrainer as _InverseQTrainer
from trimtab.integrations._deferred_loss import (
    DeferredLoss,
    Settings,
    check_positions,
    shifted,
    shifted_weights,
)
from trimtab.integrations._model_checks import check_formula
from trimtab.integrations.transformers import causal_lm, own_class
from trimtab.ops.token_loss import TokenLogp, TokenLossOptions, linear_logp

__all__ = ["Applied", "InverseQTrainer", "WeightCollator", "apply"]

_THEIRS = "_fused_forward"  # the function that TRL puts in the place of a model's forward
_CHUNK = 1024  # rows of logits made at a time for their mean under a softcap


class Applied:
    """What ``apply`` has done to a trainer; undone by ``revert()`` or at the end of a ``with``."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo

    def revert(self) -> None:
        """Back to TRL's own kernels, data collator and columns."""
        self._undo.close()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def apply(
    trainer: Any,
    *,
    loss_weights: str | None = None,
    impl: str | None = None,
    options: TokenLossOptions | None = None,
) -> Applied:
    """Gives a TRL trainer the per-token log-probabilities of ``trimtab.linear_logp``.

    For SFT, DPO, KTO, GRPO and RLOO trainers of TRL 1.16 (RLOO makes the same call and was not
    run), between their construction and ``train()``; the reference model too, if there is one. The
    rest of the trainer is its own. What
    TRL reads of its fused head is given with the same meaning: log-probabilities, entropy, argmax,
    mean of the logits and sum of the squared probabilities, and the routers' loss of a mixture of
    experts, which the model computes itself. Unlike TRL's head ours honours LoRA adapters on the
    head. The models' formula is checked as by ``trimtab.integrations.transformers.apply``.

    Cost: 4 products of N x D x V per batch, ignored tokens free, and one chunk of logits. One more
    for the sum of squares (DPO's ``use_weighting``), and for the mean of the logits of a model with
    a softcap (DPO, KTO).

    Args:
        trainer: constructed, not yet training.
        loss_weights: for ``SFTTrainer``: the column of the data sets that holds a number for each
            token of ``input_ids``. The loss is ``sum_t w_t l_t`` over the number of tokens; the
            metrics stay unweighted. Not with packing or ``loss_type="dft"``.
        impl: as for ``linear_logp``.
        options: as for ``linear_logp``.

    Returns:
        A handle with ``revert()``, which works in a ``with`` too.

    Raises:
        ValueError: no such trainer, or a model, column or option that does not fit.
    """
    found = [getattr(trainer, name, None) for name in ("model", "ref_model")]
    models = [causal_lm(model) for model in found if model is not None]
    if not models or any(_their_forward(model) is None for model in models):
        raise ValueError(
            "trainer must be one of TRL >= 1.16 that has given its model a fused head, got "
            f"{type(trainer).__name__}; construct it first"
        )
    if loss_weights is not None:
        _check_weighted(trainer, loss_weights)
    settings = Settings(impl=impl, options=options)
    for model in models:
        check_formula(model, own_class(model).forward, settings)
    undo = contextlib.ExitStack()
    for model in models:
        _set(undo, model, "forward", MethodType(_our_forward(model, trainer, settings), model))
    if loss_weights is not None:
        _pass_weights(undo, trainer, loss_weights)
    return Applied(undo)


class WeightCollator:
    """A data collator that adds ``loss_weights`` of the shape of its batch's labels.

    Args:
        collator: pads the rest.
        column: what the weights are called in a row; it has one number per token.
        keep_end: rows that were cut to the collator's length were cut at their beginning.
    """

    def __init__(self, collator: Any, column: str = "loss_weights", keep_end: bool = False) -> None:
        self.collator, self.column, self.keep_end = collator, column, keep_end

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """The batch, padded on the right by weights of 0.

        Raises:
            ValueError: a row without weights or with fewer than tokens, or padding on the left.
        """
        weights = [self._of(row) for row in rows]
        rest = [{k: v for k, v in row.items() if k != self.column} for row in rows]
        batch = self.collator(rest)
        width = batch["labels"].shape[1]
        if not bool(batch.get("attention_mask", torch.ones(1, 1))[:, 0].all()):
            raise ValueError(
                "collator must pad on the right, got padding on the left; set the tokenizer's "
                "padding_side"
            )
        if len(batch["labels"]) == 1 and len(rows) > 1:  # padding-free
            weights = [torch.cat(weights)]
        batch["loss_weights"] = torch.stack([F.pad(w, (0, width - len(w))) for w in weights])
        return batch

    def _of(self, row: dict[str, Any]) -> Tensor:
        tokens = len(row["input_ids"])
        given = row.get(self.column)
        if given is None or len(given) < tokens:
            raise ValueError(
                f"{self.column} must have one number per token in every row, got "
                f"{None if given is None else len(given)} for {tokens} tokens; give weights beside "
                "input_ids"
            )
        weights = torch.as_tensor(given, dtype=torch.float32)
        return weights[len(weights) - tokens :] if self.keep_end else weights[:tokens]


def _check_weighted(trainer: Any, column: str) -> None:
    """Whether token weights can reach the loss of this trainer."""
    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise ImportError("loss_weights needs trl; install trimtab[trl]") from error
    if not isinstance(trainer, SFTTrainer):
        raise ValueError(
            f"loss_weights must be None for {type(trainer).__name__}, got {column!r}; SFTTrainer "
            "takes them"
        )
    args = trainer.args
    if args.loss_type == "dft" or args.packing or args.eval_packing:
        raise ValueError(
            f"loss_weights must come without packing and with loss_type='nll', got packing="
            f"{args.packing} and {args.loss_type!r}; padding_free keeps its weights"
        )
    if trainer.compute_loss_func is not None or args.label_smoothing_factor:
        raise ValueError(
            "loss_weights must come without compute_loss_func and label_smoothing_factor, got one; "
            "these make the loss of logits"
        )
    names = trainer.train_dataset.column_names if trainer.train_dataset is not None else [column]
    if names is not None and column not in names:
        raise ValueError(f"loss_weights must be one of the columns {names}, got {column!r}; add it")


def _pass_weights(undo: contextlib.ExitStack, trainer: Any, column: str) -> None:
    """Keeps the column of weights, and puts it into the batches."""
    keep_end = trainer.args.truncation_mode == "keep_end"
    trainer._set_signature_columns_if_needed()
    columns = [*trainer._signature_columns, column]
    _set(undo, trainer, "_signature_columns", columns)
    collator = WeightCollator(trainer.data_collator, column, keep_end)
    _set(undo, trainer, "data_collator", collator)


def _set(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _their_forward(model: Any) -> FunctionType | None:
    """TRL's forward of a model, also below what accelerate has put around it."""
    forward = model.__dict__.get("forward")
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if isinstance(function, FunctionType) and function.__code__.co_name == _THEIRS:
            return function
        forward = getattr(function, "__wrapped__", None)
    return None


def _our_forward(model: Any, trainer: Any, settings: Settings) -> Any:
    """A forward that answers ``fused_lm_head=True`` itself, and leaves the rest to TRL's."""
    theirs = _their_forward(model)
    assert theirs is not None, "apply has looked"
    wanted = inspect.getclosurevars(theirs).nonlocals
    previous, own_forward = model.forward, own_class(model).forward
    # Accelerate has put autocast around the forward of a model that is prepared already.
    prepared = getattr(previous, "__func__", previous) is not theirs

    @functools.wraps(own_forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        loss_weights: Tensor | None = None,  # (B, T)
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return previous(*args, **kwargs)
        scores = _TokenScores(self, settings, loss_weights)
        scores.temperature, scores.outputs = wanted["temperature"], wanted["outputs"]
        scores.in_float32 = wanted["cast_lm_head_to_fp32"]
        kwargs["use_cache"] = False
        around = trainer.accelerator.autocast() if prepared else contextlib.nullcontext()
        with around, scores.in_place():
            output = own_forward(self, *args, **kwargs)
        return scores.output(output)

    return forward


class _TokenScores(DeferredLoss):
    """What TRL's trainers read of each token, in the place of a loss."""

    takes_slices = False
    temperature: float = 1.0
    outputs: tuple[str, ...] = ("log_probs",)
    in_float32: bool = False

    def of_batch(
        self,
        logits: Tensor,
        labels: Tensor | None = None,  # (B, T)
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,  # (B, T)
        **_: Any,
    ) -> Tensor:
        """The loss; the scores are kept for ``output``."""
        self.calls += 1
        target = shifted(labels, -100) if shift_labels is None else shift_labels
        hidden, weight, head = self.head()
        check_positions(target, hidden)
        target = target.to(hidden.device)
        with contextlib.ExitStack() as stack:
            if self.in_float32:
                stack.enter_context(torch.autocast(hidden.device.type, enabled=False))
                bias = head["linear_bias"]
                head["linear_bias"] = None if bias is None else bias.float()
                hidden, weight = hidden.float(), weight.float()
            self.fields = self._score(hidden, weight, target, head)
        if shift_labels is None:
            # TRL's have no place for the last position, which predicts nothing.
            self.fields = {name: value[..., :-1] for name, value in self.fields.items()}
        weights = shifted_weights(self.weights, labels)
        log_probs = self.fields["log_probs"]
        if weights is not None:
            weights = weights[..., : log_probs.shape[-1]].to(log_probs)
            log_probs = torch.where(self.fields["label_mask"], log_probs * weights, 0.0)
            self.fields["log_probs"] = log_probs
        count = self.fields["label_mask"].sum().clamp(min=1)
        return -log_probs.sum() / (count if num_items_in_batch is None else num_items_in_batch)

    def _score(
        self, hidden: Tensor, weight: Tensor, target: Tensor, head: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The fields of TRL's output, each (B, T) and 0 where the target is ignored."""
        kept = target != -100

        def score(temperature: float) -> TokenLogp:
            return linear_logp(
                hidden, weight, target, temperature=temperature, ignore_index=-100,
                impl=self.settings.impl, options=self.settings.options, **head,
            )  # fmt: skip

        found = score(self.temperature)
        fields = {"log_probs": found.logp, "label_mask": kept}
        if "entropy" in self.outputs:
            fields["entropy"] = found.entropy
        if "is_top1" in self.outputs:
            fields["is_top1"] = found.predicted == target
        with torch.no_grad():
            if "log_sum_sq_probs" in self.outputs:
                # sum_v p_v^2 = exp(lse(2 z) - 2 lse(z))
                fields["log_sum_sq_probs"] = score(self.temperature / 2).lse - 2 * found.lse
            if "mean_logits" in self.outputs:
                mean = _mean_logits(hidden[kept], weight, head) / self.temperature
                fields["mean_logits"] = mean.new_zeros(kept.shape).masked_scatter(kept, mean)
        return fields

    def output(self, output: Any) -> Any:
        """TRL's output of the model's own, of which the routers' loss is kept."""
        from trl.trainer.utils import FusedCausalLMOutput

        aux_loss = getattr(output, "aux_loss", None)
        return FusedCausalLMOutput(loss=output.loss, aux_loss=aux_loss, **self.fields)


def _mean_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    head: dict[str, Any],
) -> Tensor:  # (N,)
    """Mean of the logits over the vocabulary, float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    bias, softcap = head["linear_bias"], head["softcap"]
    if softcap is None:
        mean = hidden.to(wide) @ weight.mean(0, dtype=wide)
        if bias is not None:
            mean = mean + bias.mean(dtype=wide)
        return mean * head["logit_scale"]
    parts = [
        transform(F.linear(rows, weight, bias), head["logit_scale"], softcap).mean(-1)
        for rows in hidden.split(_CHUNK)
    ]
    return torch.cat(parts)


class InverseQTrainer(_InverseQTrainer):
    """Inverse-Q* with the conventions of TRL's trainers: prompts, principle and rewards as text.

    Rows of the data sets have a ``prompt``: a string, or a conversation (a list of ``{"role",
    "content"}``) for the tokenizer's chat template. pi* is the model that reads the principle and a
    blank line before a string, or the principle in the system turn of a conversation; see
    ``PrinciplePrompt``.
    Everything else is ``trimtab.algorithms.inverse_q.InverseQTrainer``; it needs no TRL.

    Args:
        model: the policy.
        args: an ``InverseQConfig``.
        principle: what the policy shall learn to follow without being told.
        processing_class: the tokenizer.
        train_dataset: rows with a ``prompt``, all of which are read at once.
        eval_dataset: as ``train_dataset``.
        rho: weight of the contrast between the contexts with and without the principle.
        reward_funcs: for ``loss="ppo", advantage="sequence"``: a function or several, called with
            ``prompts`` and ``completions`` (lists of text) and ``completion_ids``, to a number for
            each; several are summed.
        peft_config: adapters to train; the model without them is then the reference.
        kwargs: what else the trainer takes, such as ``ref_model`` and ``callbacks``.

    Raises:
        ValueError: rows without a prompt, or arguments that do not fit.
        ImportError: transformers, accelerate or, with ``peft_config``, peft is missing.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        principle: str,
        processing_class: Any,
        train_dataset: Iterable[dict[str, Any]] | None = None,
        eval_dataset: Iterable[dict[str, Any]] | None = None,
        rho: float = 0.0,
        reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self.prompts = _Prompts(processing_class, principle)
        rewards = None
        if reward_funcs is not None:
            functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
            rewards = functools.partial(_rewards_of_text, processing_class, functions)
        super().__init__(
            model,
            args,
            estimator=PrinciplePrompt(self.prompts.with_principle, rho=rho),
            reward_fn=rewards,
            processing_class=processing_class,
            train_dataset=self.prompts.rows(train_dataset),
            eval_dataset=self.prompts.rows(eval_dataset),
            **kwargs,
        )


class _Prompts:
    """Token ids of prompts, and of the same prompts with the principle."""

    def __init__(self, tokenizer: Any, principle: str) -> None:
        if not isinstance(principle, str) or not principle:
            raise ValueError(
                f"principle must be a text, got {principle!r}; the estimators of "
                "trimtab.algorithms.inverse_q take token ids"
            )
        self.tokenizer, self.principle = tokenizer, principle
        self._known: dict[tuple[int, ...], list[int]] = {}

    def rows(self, dataset: Iterable[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Rows for ``PromptCollator``."""
        return None if dataset is None else [self._row(example) for example in dataset]

    def with_principle(
        self,
        prompt: Tensor,  # (P,)
    ) -> Tensor:  # (Q,)
        """A prompt's ids with the principle's among them."""
        found = self._known.get(tuple(prompt.tolist()))
        if found is None:
            raise ValueError(
                "prompt must be one of the data sets that the trainer was constructed with, got "
                f"{self.tokenizer.decode(prompt)!r}; pass it as eval_dataset"
            )
        return torch.tensor(found, device=prompt.device)

    def _row(self, example: dict[str, Any]) -> dict[str, Any]:
        prompt = example.get("prompt")
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            longer = self.tokenizer(f"{self.principle}\n\n{prompt}")["input_ids"]
        elif isinstance(prompt, list) and prompt:
            own = prompt[0]["content"] if prompt[0]["role"] == "system" else None
            rest = prompt if own is None else prompt[1:]
            content = self.principle if own is None else f"{self.principle}\n\n{own}"
            ids = self._chat(prompt)
            longer = self._chat([{"role": "system", "content": content}, *rest])
        else:
            raise ValueError(
                f"prompt must be a text or a conversation in every row, got {prompt!r}; name the "
                "column 'prompt'"
            )
        self._known[tuple(ids)] = longer
        return {"input_ids": ids}

    def _chat(self, messages: list[dict[str, Any]]) -> list[int]:
        found = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(found["input_ids"])


def _rewards_of_text(
    tokenizer: Any,
    functions: Sequence[Callable[..., Any]],
    prompts: list[Tensor],
    responses: list[Tensor],
) -> list[float]:
    """The summed rewards of functions that read text."""
    texts = {
        "prompts": [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts],
        "completions": [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses],
        "completion_ids": [ids.tolist() for ids in responses],
    }
    found = [[float(reward) for reward in function(**texts)] for function in functions]
    return [sum(rewards) for rewards in zip(*found, strict=True)]
