"""Arguments of ``InverseQTrainer``, with the help texts that ``HfArgumentParser`` shows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trimtab.algorithms.inverse_q.losses import (
    ADVANTAGES,
    ClippedSurrogate,
    Loss,
    ReverseKL,
    make_loss,
)

try:
    from transformers import TrainingArguments
except ImportError as error:
    _missing = error

    @dataclass
    class TrainingArguments:  # type: ignore[no-redef]
        """Stands in for transformers' class, and says so when it is used."""

        output_dir: str | None = None

        def __post_init__(self) -> None:
            raise ImportError(
                "InverseQConfig must have transformers and accelerate, which can't be imported; "
                "pip install 'transformers[torch]'"
            ) from _missing


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


_PPO_ONLY = ("advantage", "clip_range", "kl_coef", "normalize_advantages", "updates_per_batch")


@dataclass
class InverseQConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and what Inverse-Q* adds; every field has a help text.

    ``per_device_train_batch_size`` counts prompts; a batch has ``num_generations`` rows for each.
    The paper's hyper-parameters could not be had: the defaults are ours.

    Raises:
        ValueError: a value out of its range, an option of another loss, or an option of the base
            class that this trainer can't honour.
        ImportError: transformers or accelerate is missing.
    """

    learning_rate: float = _option(1e-6, "Initial learning rate. LoRA takes more, such as 1e-4.")
    remove_unused_columns: bool = _option(
        False, "Leave columns other than input_ids out before collating."
    )
    beta: float = _option(0.1, "Unit of the token rewards beta * (log pi* - log pi_ref).")
    loss: str = _option(
        "imitation",
        "'imitation' (squared, of token rewards), 'ppo' (clipped surrogate) or 'reverse_kl' "
        "(exact, over the vocabulary).",
    )
    advantage: str = _option(
        "reward",
        "With loss='ppo': 'reward' (the token rewards), 'log_ratio' (beta * log(pi*/pi_old)), or "
        "'sequence' (PPO-style baseline: one number per response, less its KL penalty and the mean "
        "of the other responses).",
    )
    clip_range: float = _option(0.2, "With loss='ppo': how far the probability ratio may move.")
    kl_coef: float = _option(0.0, "With loss='ppo': weight of an extra KL to the reference.")
    normalize_advantages: bool = _option(
        False, "With loss='ppo': advantages of mean 0 and variance 1 over the tokens of a step."
    )
    updates_per_batch: int = _option(
        1,
        "With loss='ppo': optimizer steps on the same responses. An epoch keeps its number of "
        "steps, so that beyond 1 it skips the prompts of the steps that sample nothing.",
    )
    estimate_from: str = _option(
        "reference", "Model that pi* is estimated from: 'reference' (fixed) or 'policy' (moving)."
    )
    temperature: float = _option(1.0, "Temperature of sampling, of the policy and the reference.")
    max_new_tokens: int = _option(64, "Length of the longest response.")
    num_generations: int = _option(1, "Responses per prompt.")
    sampling_seed: int | None = _option(
        None, "Seed of the responses, at least 0; None for `seed`. No generator state is involved."
    )
    eos_token_id: int | None = _option(
        None, "Token that ends a response; None for the tokenizer's or the model's."
    )
    pad_token_id: int | None = _option(
        None, "Padding token; None for the tokenizer's, the model's, or the end token."
    )
    chunk_size: int = _option(1024, "With loss='reverse_kl': tokens whose logits are in memory.")
    report_rewards: bool = _option(
        True,
        "Log reward and KL also where the loss does not need them, at the price of a forward pass "
        "of the reference (and, with 'reverse_kl', of the estimator).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "num_generations", "updates_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; try 1")
        if self.sampling_seed is not None and self.sampling_seed < 0:
            raise ValueError(
                f"sampling_seed must be at least 0, got {self.sampling_seed}; None takes `seed`"
            )
        defaults = {f.name: f.default for f in fields(self)}
        others = [] if self.loss == "ppo" else list(_PPO_ONLY)
        others += [] if self.loss == "reverse_kl" else ["chunk_size"]
        changed = [name for name in others if getattr(self, name) != defaults[name]]
        if changed:
            owner = "reverse_kl" if changed == ["chunk_size"] else "ppo"
            raise ValueError(
                f"{changed[0]} must be {defaults[changed[0]]!r} with loss={self.loss!r}, got "
                f"{getattr(self, changed[0])!r}; it belongs to loss={owner!r}"
            )
        self.make_objective()
        self._check_base()

    def make_objective(self) -> Loss:
        """The loss object that these arguments describe."""
        if self.loss == "ppo":
            return ClippedSurrogate(
                self.clip_range, self.advantage, self.kl_coef, self.normalize_advantages
            )
        return ReverseKL(self.chunk_size) if self.loss == "reverse_kl" else make_loss(self.loss)

    @property
    def is_baseline(self) -> bool:
        """Whether responses are rewarded as a whole."""
        return self.loss == "ppo" and self.advantage == ADVANTAGES[-1]

    def _check_base(self) -> None:
        """Raises for options of the base class that would change nothing or break the loss."""
        unsupported = {
            "label_smoothing_factor": self.label_smoothing_factor,
            "torch_compile": self.torch_compile,
            "deepspeed": self.deepspeed,
            "fsdp": self.fsdp,
        }
        for name, value in unsupported.items():
            if value:
                raise ValueError(
                    f"{name} must be off, got {value!r}; InverseQTrainer reads hidden states of "
                    "the unwrapped model on one device"
                )
        if self.world_size > 1 or self.n_gpu > 1:
            raise ValueError(
                f"InverseQTrainer must have one process and one device, got {self.world_size} and "
                f"{self.n_gpu}; set CUDA_VISIBLE_DEVICES to one"
            )
