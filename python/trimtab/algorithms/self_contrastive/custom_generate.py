"""Self-CD as a ``custom_generate`` callable for ``model.generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.self_contrastive.decoder import refuse_prompt_learning
from trimtab.algorithms.self_contrastive.loop import Sampling, Stopping, Stream, decode
from trimtab.algorithms.self_contrastive.prompts import (
    Prompts,
    SpecialTokens,
    check_prompts,
    check_ratio,
    match_prompts,
    row_seeds,
    special_tokens,
)

# What a generation config can ask for that this loop does not do -> the values that don't ask.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "is_assistant": (None, False),
    "token_healing": (None, False),
    "cache_implementation": (None, "dynamic", "dynamic_full"),
    "cache_config": (None,),
    "prefill_chunk_size": (None,),
    "compile_config": (None,),
    "return_dict_in_generate": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
_WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
_FIELDS = ("temperature", "top_k", "top_p", "min_p")


class SelfContrastiveDecoding:
    """Self-CD for those who call ``generate``: pass an instance as ``custom_generate=``.

    ::

        decoding = SelfContrastiveDecoding(safety_input_ids, safety_attention_mask)
        model.generate(input_ids, custom_generate=decoding, max_new_tokens=200)

    It needs a transformers whose ``generate`` takes a callable there; 5.17 does.

    The safety contexts may also go to ``generate`` itself, where the callable needs no arguments:
    ``generate(**inputs, custom_generate=SelfContrastiveDecoding())`` with what
    ``self_contrastive_inputs`` returns; so may ``seed``.

    Of the generation config: lengths, ``do_sample``, temperature, top-k, top-p, min-p, eos and
    padding tokens, ``num_return_sequences``, ``max_time`` and every logits processor it asks for
    are honoured; note that ``generate`` itself sets ``top_k`` to 50 where nobody does. Processors
    work on the combined logits. Beams, guidance, prompt lookup, static caches and outputs other
    than the tokens are errors, and so is a PEFT model with prompt learning.

    Some arguments ``generate`` (up to transformers 5.17) keeps to itself, so that this class can
    neither honour nor refuse them: ``assistant_model``, ``negative_prompt_ids`` and their mask,
    ``low_memory`` and ``synced_gpus`` have no effect (ranks don't wait for one another: under
    DeepSpeed ZeRO-3 or FSDP every rank must make as many steps), ``streamer`` gets the prompt
    alone (give it to this class instead), and ``cache_implementation="paged"`` leaves for
    continuous batching before any callable is asked.

    Args:
        safety_input_ids: (B, S) the questions with the safety prompt, or (1, S) for all.
        safety_attention_mask: 1 for real tokens.
        ratio: as for ``self_contrastive_generate``.
        plausibility: the same.
        seed: the same; one per prompt, not per returned sequence.
        streamer: the same.
        impl: the same.
    """

    def __init__(
        self,
        safety_input_ids: Tensor | None = None,
        safety_attention_mask: Tensor | None = None,
        *,
        ratio: float = 2.5,
        plausibility: float | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        streamer: Any = None,
        impl: str | None = None,
    ) -> None:
        check_ratio(ratio)
        self.safety_input_ids = safety_input_ids
        self.safety_attention_mask = safety_attention_mask
        self.ratio, self.plausibility, self.seed = ratio, plausibility, seed
        self.streamer, self.impl = streamer, impl

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,  # (B * num_return_sequences, T)
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        generation_config: Any = None,
        safety_input_ids: Tensor | None = None,
        safety_attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """What ``generate`` calls, with its arguments prepared and its prompts repeated.

        Raises:
            ValueError: something is asked for that Self-CD does not do; a shape or value is wrong.
        """
        # PEFT hands over the model inside, and puts its own preparation of inputs there meanwhile.
        prepare = getattr(model, "prepare_inputs_for_generation", None)
        refuse_prompt_learning(getattr(prepare, "__self__", model))
        _refuse(generation_config)
        mask, use_cache = _take_model_kwargs(model_kwargs, input_ids)
        special = special_tokens(
            model, generation_config.eos_token_id, _padding_token(generation_config)
        )
        copies = generation_config.num_return_sequences or 1
        # `generate` has repeated each prompt; the first forward pass needs it once.
        plain = check_prompts(
            "input_ids", input_ids[::copies], None if mask is None else mask[::copies], special
        )
        safety = match_prompts(
            plain, self._safety(safety_input_ids, safety_attention_mask, special)
        )
        do_sample = bool(generation_config.do_sample)
        processors = list(logits_processor or ())
        filters = _take_filters(processors) if do_sample else {"temperature": 0.0}
        seed = self.seed if seed is None else seed
        sampling = Sampling(
            alpha=self.ratio - 1.0,
            plausibility=self.plausibility,
            seed=row_seeds(seed, len(plain.ids)) if do_sample else None,
            copies=copies,
            processors=processors,
            impl=self.impl,
            **filters,
        )
        stopping = Stopping(
            generation_config.max_length - input_ids.shape[1],
            pad=_padding_token(generation_config),
            criteria=list(stopping_criteria or ()),  # the eos tokens are one of them
        )
        stream = Stream.of(self.streamer, len(input_ids))
        return decode(model, plain, safety, sampling, stopping, stream, use_cache)

    def _safety(self, ids: Tensor | None, mask: Tensor | None, special: SpecialTokens) -> Prompts:
        if ids is None and mask is not None:
            raise ValueError(
                "safety_input_ids must be given to generate along with safety_attention_mask, got "
                "None; pass both there, or both to SelfContrastiveDecoding"
            )
        if ids is None:
            ids, mask = self.safety_input_ids, self.safety_attention_mask
        if ids is None:
            raise ValueError(
                "safety_input_ids must be given, got None; pass them to SelfContrastiveDecoding or "
                "to generate"
            )
        return check_prompts("safety_input_ids", ids, mask, special)


def _refuse(generation_config: Any) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if value not in neutral:
            raise ValueError(
                f"{name} must be {neutral[-1]} with Self-CD, got {value!r}; leave it out, or keep "
                "generate's own decoding with ContrastiveLogitsProcessor.self_contrastive"
            )


def _take_model_kwargs(model_kwargs: dict[str, Any], ids: Tensor) -> tuple[Tensor | None, bool]:
    """The mask and whether to use a cache; what else ``generate`` prepares must be its own."""
    mask = model_kwargs.pop("attention_mask", None)
    use_cache = model_kwargs.pop("use_cache", None)
    cache = model_kwargs.pop("past_key_values", None)
    if cache is not None and (cache.get_seq_length() or getattr(cache, "_is_user_defined", False)):
        raise ValueError(
            "past_key_values must be None, got a cache; both contexts of Self-CD have a new one"
        )
    positions = model_kwargs.pop("position_ids", None)
    real = torch.ones_like(ids) if mask is None else mask.long()
    if positions is not None:
        expected = (real.cumsum(1) - 1) * real
        if positions.ndim != 2 or not torch.equal((positions * real).to(expected), expected):
            raise ValueError(
                "position_ids must count from each row's first real token, got others; leave them "
                "out, they do not fit the safety context"
            )
    if model_kwargs.pop("logits_to_keep", 1) != 1:
        raise ValueError("logits_to_keep must be 1, got another number; leave it out")
    left = {name for name, value in model_kwargs.items() if value is not None}
    if left:
        name = min(left)
        raise ValueError(
            f"{name} must be left out with Self-CD, got {type(model_kwargs[name]).__name__}; the "
            "model gets token ids alone"
        )
    return mask, use_cache is not False


def _padding_token(generation_config: Any) -> int | None:
    token = getattr(generation_config, "_pad_token_tensor", None)
    token = generation_config.pad_token_id if token is None else token
    return None if token is None else int(token)


def _take_filters(processors: list[Any]) -> dict[str, Any]:
    """Takes the warpers that the op can do from the end of the list, while their order is its own.

    What stands before them, or is something else, runs as it is.
    """
    taken: dict[str, Any] = {"temperature": 1.0}
    rank = len(_WARPERS)
    while processors:
        last = processors[-1]
        name = type(last).__name__
        plain = (
            type(last).__module__.startswith("transformers.")
            and name in _WARPERS[:rank]
            and getattr(last, "filter_value", -float("inf")) == -float("inf")
            and getattr(last, "min_tokens_to_keep", 1) == 1
        )
        if not plain:
            break
        rank = _WARPERS.index(name)
        taken[_FIELDS[rank]] = getattr(last, _FIELDS[rank])
        processors.pop()
    return taken
