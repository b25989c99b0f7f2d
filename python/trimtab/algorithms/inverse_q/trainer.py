"""Training with Inverse-Q* on top of ``transformers.Trainer``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.inverse_q import InverseQ
from trimtab.algorithms.inverse_q.config import InverseQConfig
from trimtab.algorithms.inverse_q.estimators import Estimator
from trimtab.algorithms.inverse_q.sampling import (
    PromptCollator,
    row_seeds,
    sample_responses,
    split_rows,
)

try:
    from transformers import Trainer
except ImportError as error:
    _missing = error

    class Trainer:  # type: ignore[no-redef]
        """Stands in for transformers' class, and says so when it is used."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ImportError(
                "InverseQTrainer must have transformers and accelerate, which can't be imported; "
                "pip install 'transformers[torch]'"
            ) from _missing


RewardFunction = Callable[[list[Tensor], list[Tensor]], Any]

_TRAIN, _EVAL = 0, 1  # streams of the sampling seeds
_HELD = "held_responses.pt"


class InverseQTrainer(Trainer):
    """Samples responses from the current policy and learns from their token rewards.

    An optimizer step draws ``per_device_train_batch_size * gradient_accumulation_steps`` prompts,
    samples ``num_generations`` responses to each in evaluation mode, scores them once (pi_old,
    pi_ref, pi*) and minimises the loss of ``InverseQConfig``, divided by the number of response
    tokens of the whole step: how a step is cut into batches changes nothing but rounding. The mask
    of a response runs up to and including its end token. Responses depend on ``sampling_seed``, the
    step and the row alone, so a run that resumes from a checkpoint draws what the uninterrupted run
    draws.

    ``loss="ppo", advantage="sequence"`` is the PPO-style baseline in the same loop, for comparing
    convergence: the reward of a whole response, less its KL penalty, less the mean of the other
    responses, is every token's advantage; no critic. (The paper compares with PPO; how its baseline
    was set up could not be had.)

    Beside the loss it logs, as means over response tokens: "reward", "kl" (to the reference),
    "star_kl" (to pi*), both estimated from the sampled tokens, "entropy" in nats, "logp",
    "clip_fraction" (ppo), "exact_star_kl" (reverse_kl); as means over responses:
    "response_length", "sequence_reward" (baseline). ``evaluate`` samples with seeds that never
    change and logs the same with the prefix "eval_".

    Memory: the policy, its optimizer, and pi_ref (none for PEFT), but no logits beyond a chunk in
    training and scoring. The head may be trained, frozen, or have LoRA. One process, one device.

    Args:
        model: the policy; construct the trainer before any training, since without ``ref_model`` a
            plain model's copy is taken here as pi_ref. To resume, construct it from the same
            initial weights and call ``train(resume_from_checkpoint=...)``.
        args: an ``InverseQConfig``.
        estimator: pi*, as for ``InverseQ``.
        ref_model: pi_ref, as for ``InverseQ``.
        reward_fn: with ``advantage="sequence"``: prompts and responses, lists of B id tensors
            without padding, to B rewards. None takes the sum of the token rewards.
        processing_class: tokenizer; saved with the model, and asked for padding and end tokens.
        data_collator: None for ``PromptCollator``: rows are ``{"input_ids": prompt}``.
        kwargs: what else ``transformers.Trainer`` takes, such as ``train_dataset``, ``callbacks``.

    Raises:
        ValueError: arguments that do not fit.
        ImportError: transformers or accelerate is missing.
    """

    def __init__(
        self,
        model: Any,
        args: InverseQConfig,
        *,
        estimator: Estimator,
        ref_model: Any = None,
        reward_fn: RewardFunction | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if reward_fn is not None and not args.is_baseline:
            raise ValueError(
                f"reward_fn must be None with loss={args.loss!r} and advantage={args.advantage!r}, "
                "got one; it rewards whole responses: loss='ppo', advantage='sequence'"
            )
        for name in ("model_init", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None, got one; pass the model and `args.loss`")
        self.eos_token_id, self.pad_token_id = _special_tokens(model, args, processing_class)
        self.algorithm = InverseQ(
            model,
            ref_model,
            estimator=estimator,
            beta=args.beta,
            loss=args.make_objective(),
            estimate_from=args.estimate_from,
            temperature=args.temperature,
        )
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=data_collator or PromptCollator(self.pad_token_id),
            **kwargs,
        )
        # The loss is divided by the tokens of the whole step here; the base class must not divide.
        self.model_accepts_loss_kwargs = True
        if self.algorithm.ref_model is not None and self.place_model_on_device:
            self.algorithm.ref_model.to(args.device)
        self.reward_fn = reward_fn
        self._sums: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        self._held: list[dict[str, Tensor]] = []
        self._evaluated_rows = 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, with responses, and how many tokens those have."""
        prompts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not prompts:
            return prompts, None
        fresh = self.state.global_step % self.args.updates_per_batch == 0
        if fresh or len(self._held) != len(prompts):
            self._held = self._respond(prompts, (_TRAIN, self.state.global_step), 0)
        count = sum((batch["labels"] != -100).sum() for batch in self._held)
        return list(self._held), count

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch with responses, divided by ``num_items_in_batch`` tokens."""
        with self.accelerator.autocast():
            loss, metrics = self.algorithm.loss_and_metrics(inputs, num_items_in_batch)
        sums = self._sums[torch.is_grad_enabled()]
        metrics["responses"] = loss.new_tensor(len(inputs["labels"]))
        if "sequence_reward" in inputs:
            metrics["sequence_reward"] = inputs["sequence_reward"].sum()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of responses sampled with seeds that are the same every time."""
        prompts = self._prepare_inputs(inputs)
        batch = self._respond([prompts], (_EVAL,), self._evaluated_rows)[0]
        self._evaluated_rows += len(batch["labels"])
        with torch.no_grad():
            return self.compute_loss(model, batch).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, from the first row's seed on."""
        self._evaluated_rows = 0
        self._sums[False] = {}
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log to the losses that are logged."""
        for training, prefix in ((True, ""), (False, "eval_")):
            if f"{prefix}loss" in logs:
                logs.update({prefix + k: v for k, v in _means(self._sums[training]).items()})
                self._sums[training] = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def _respond(
        self, prompts: list[Mapping[str, Tensor]], stream: tuple[int, ...], first: int
    ) -> list[dict[str, Tensor]]:
        """Batches of prompts, with responses and all that the loss reads of other models."""
        args, batches = self.args, []
        seed = args.seed if args.sampling_seed is None else args.sampling_seed
        with self.accelerator.autocast():
            for part in prompts:
                ids, mask = (
                    self._prepare_input(part[name]).repeat_interleave(args.num_generations, 0)
                    for name in ("input_ids", "attention_mask")
                )
                batch = sample_responses(
                    self.model,
                    ids,
                    mask,
                    seeds=row_seeds(seed, stream, first, len(ids)),
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature,
                    eos_token_id=self.eos_token_id,
                    pad_token_id=self.pad_token_id,
                )
                first += len(ids)
                batch.update(self.algorithm.score(batch, self._wanted_scores()))
                batches.append(batch)
            if args.loss == "ppo":
                self._add_advantages(batches)
        return batches

    def _wanted_scores(self) -> list[str]:
        needed = {
            "imitation": ["logp_star"],
            "ppo": ["old_logp", "ref_logp", "logp_star"],
            "reverse_kl": [],
        }[self.args.loss]
        reported = ["ref_logp", "logp_star"] if self.args.report_rewards else []
        return [name for name in ("old_logp", "ref_logp", "logp_star") if name in needed + reported]

    def _add_advantages(self, batches: list[dict[str, Tensor]]) -> None:
        rewards = None
        if self.reward_fn is not None:
            rewards = [self._rewards_of(batch) for batch in batches]
        group = self.args.num_generations if self.args.is_baseline else 1
        found = self.algorithm.advantages(batches, rewards, group)
        for row, (batch, advantages) in enumerate(zip(batches, found, strict=True)):
            batch["advantages"] = advantages
            if rewards is not None:
                batch["sequence_reward"] = rewards[row]

    def _rewards_of(self, batch: dict[str, Tensor]) -> Tensor:  # (B,)
        assert self.reward_fn is not None, "the caller asked"
        rewards = torch.as_tensor(self.reward_fn(*split_rows(batch)), dtype=torch.float32)
        if rewards.shape != batch["labels"].shape[:1] or not bool(rewards.isfinite().all()):
            raise ValueError(
                f"reward_fn must give {len(batch['labels'])} finite rewards, one per response, got "
                f"{rewards!r}; see InverseQTrainer"
            )
        return rewards.to(self.args.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.state.global_step % self.args.updates_per_batch:
            folder = f"checkpoint-{self.state.global_step}"
            folder = os.path.join(self._get_output_dir(trial=trial), folder)
            torch.save(self._held, os.path.join(folder, _HELD))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, _HELD)
        if os.path.exists(path):
            self._held = torch.load(path, map_location=self.args.device, weights_only=True)


def _special_tokens(model: Any, args: InverseQConfig, tokenizer: Any) -> tuple[Any, int]:
    """End tokens (or None) and the padding token, from the first place that has them."""
    places = (args, tokenizer, getattr(model, "generation_config", None), model.config)
    ends = [getattr(place, "eos_token_id", None) for place in places]
    end = next((token for token in ends if token is not None), None)
    pads = [getattr(place, "pad_token_id", None) for place in places]
    first = end[0] if isinstance(end, (list, tuple)) else end
    pad = next((token for token in [*pads, first] if token is not None), None)
    if pad is None:
        raise ValueError(
            "pad_token_id must be given for a model without padding and end tokens, got None; any "
            "token will do, the mask hides it"
        )
    return end, pad


def _means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums into means per response token, or per response for what counts responses."""
    if not sums:
        return {}
    tokens, responses = float(sums["tokens"]), float(sums["responses"])
    means = {"response_length": tokens / responses}
    for name, total in sums.items():
        if name == "sequence_reward":
            means[name] = float(total) / responses
        elif name not in ("tokens", "responses"):
            means[name] = float(total) / max(tokens, 1.0)
    return means
