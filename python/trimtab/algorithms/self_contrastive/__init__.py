"""Self-Contrastive Decoding (Self-CD): a safety prompt, and how much of it a model should keep.

Shi et al., "Navigating the OverKill in Large Language Models", ACL 2024 (long.253), arXiv
2401.17633. A chat model behind a safety prompt refuses harmless questions that sound harmful
("How do I kill a Python process?"). The paper runs the same question with the safety prompt
(logits ``z_s``) and without it (``z_0``), and at every step takes off what the prompt has added::

    z = z_s - ratio (z_s - z_0) = z_0 + (ratio - 1) (z_0 - z_s)            y = argmax z

The same token goes into both contexts. ``ratio`` 0 is plain decoding behind the safety prompt, 1
plain decoding without it; the paper recommends 2.5 ("a general hyperparameter"), where the side
without the prompt is amplified. In the terms of ``contrastive_sample``: positive = without the
prompt, negative = with it, ``alpha = ratio - 1``.

From the released code (SelfCD.py): raw logits in float32, greedy, no plausibility mask, at most 200
new tokens; all of these are the defaults here. That code runs one question at a time and both
contexts in full for every token; here B questions are one forward pass of 2B rows per token over
one cache. Our reading: "without" means no system prompt at all, the script leaves that open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.algorithms.self_contrastive.chat import (
    HELPFUL_PROMPT,
    SAFETY_PROMPT,
    self_contrastive_inputs,
)
from trimtab.algorithms.self_contrastive.custom_generate import SelfContrastiveDecoding
from trimtab.algorithms.self_contrastive.loop import Sampling, Stopping, Stream, decode
from trimtab.algorithms.self_contrastive.prompts import (
    check_callables,
    check_prompts,
    check_ratio,
    check_token_ids,
    match_prompts,
    row_seeds,
    special_tokens,
)

if TYPE_CHECKING:
    from trimtab.algorithms.self_contrastive.processor import (
        ContrastiveBranch,
        ContrastiveLogitsProcessor,
    )

__all__ = [
    "HELPFUL_PROMPT",
    "SAFETY_PROMPT",
    "ContrastiveBranch",
    "ContrastiveLogitsProcessor",
    "SelfContrastiveDecoding",
    "self_contrastive_generate",
    "self_contrastive_inputs",
]


def self_contrastive_generate(
    model: Any,
    input_ids: Tensor,  # (B, T)
    safety_input_ids: Tensor,  # (B, S) or (1, S)
    *,
    attention_mask: Tensor | None = None,  # (B, T)
    safety_attention_mask: Tensor | None = None,  # as safety_input_ids
    ratio: float = 2.5,
    max_new_tokens: int = 200,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    plausibility: float | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    streamer: Any = None,
    use_cache: bool = True,
    impl: str | None = None,
) -> Tensor:  # (B * num_return_sequences, T + new)
    """Answers by Self-CD: ``z = z_safety + ratio * (z_plain - z_safety)``, for a batch at a time.

    Both contexts of all prompts are one forward pass of 2B rows, with one cache of keys and values
    and with positions that count from each row's first token; ``contrastive_sample`` goes from the
    model's (2B, V) logits, in their own dtype, to the tokens. The defaults are the released
    procedure: greedy, no mask.

    Cost per token: one forward pass of 2B rows (of B * num_return_sequences * 2 after the first;
        the prompts run once each), one read of the logits. The host waits for the device before the
        first token and at every stop test, of which there is none where nothing but
        ``max_new_tokens`` can end a row. Where rows are padded, the shortest prompt also runs
        alone, once, to see that the model tells padding from text.

    Of ``model.generation_config`` only the eos and padding tokens are read, and bos to tell padding
    from text; a repetition penalty that stands there, say, is not applied.

    Args:
        model: Hugging Face causal LM; its training mode is left alone.
        input_ids: the question without the safety prompt, int64, padded on the left.
        safety_input_ids: the same question with the safety prompt; of one row, it serves for all.
            Its width is its own.
        attention_mask: 1 for real tokens. None: nothing is padded, except by leading padding tokens
            where those can't be text.
        safety_attention_mask: the same of ``safety_input_ids``.
        ratio: 0 keeps all of the safety prompt's influence, 1 takes it off, more turns it round.
        max_new_tokens: at most so many.
        do_sample: draw from softmax(z / temperature); False takes the likeliest token (of equal
            ones the first), which temperature, top_k, top_p and min_p leave where it is.
        temperature: 0 is greedy.
        top_k: keep the k likeliest.
        top_p: keep the likeliest that together exceed it.
        min_p: keep what has this share of the largest probability.
        plausibility: beta in (0, 1]: keep ``z_plain >= max(z_plain) + log(beta)``, as contrastive
            decoding does and Self-CD does not.
        seed: of the draw; a number, or one per prompt (B,). A prompt's answers depend on its
            own seed and on nothing else in the batch; the same prompt with the same seed gets the
            same answer twice. None draws one per prompt from torch's generator.
        num_return_sequences: answers per prompt, from streams of their own; they stand together.
        eos_token_id: one or several that end a row; None for those of ``model.generation_config``,
            an empty list for none.
        pad_token_id: what follows the end of a row; None for the model's, or the first eos token.
        logits_processor: callables ``(input_ids, scores) -> scores``, in order, applied to the
            combined logits in float32 after the plausibility mask and before temperature and the
            filters; ``input_ids`` are the plain prompt and the new tokens.
        stopping_criteria: callables ``(input_ids, None) -> (B,) bool``, as transformers has them.
        streamer: of transformers; takes the prompt, then each token. One sequence only.
        use_cache: False runs both contexts again for every token, for models without a cache.
        impl: implementation of the contrast op; None for the fastest available.

    Returns:
        int64 on the device of ``input_ids``: the prompts as given and the new tokens. A row that
        ended is padded.

    Raises:
        ValueError: shapes or values do not fit, a prompt is empty or padded on the right, padding
            can't be told from text, the model is an encoder-decoder, has prompt learning of PEFT,
            has no cache or gets other logits where a row is padded, a context outgrows a RoPE that
            depends on the length (LongRoPE, dynamic NTK), or logits are NaN.
        TypeError: ids are not integers, a list of callables is something else, a number isn't one.
    """
    check_ratio(ratio)
    check_token_ids("eos_token_id", eos_token_id)
    check_token_ids("pad_token_id", pad_token_id)
    special = special_tokens(model, eos_token_id, pad_token_id)
    plain = check_prompts("input_ids", input_ids, attention_mask, special)
    safety = check_prompts("safety_input_ids", safety_input_ids, safety_attention_mask, special)
    safety = match_prompts(plain, safety)
    for name, count in (
        ("max_new_tokens", max_new_tokens),
        ("num_return_sequences", num_return_sequences),
    ):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}; use 1 or more")
    if num_return_sequences > 1 and not do_sample:
        raise ValueError(
            f"num_return_sequences must be 1 without sampling, got {num_return_sequences}; greedy "
            "answers are all alike, set do_sample=True"
        )
    if not temperature >= 0.0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}; 0 is greedy")
    check_callables("logits_processor", logits_processor)
    check_callables("stopping_criteria", stopping_criteria)
    rows = len(plain.ids) * num_return_sequences
    stream = Stream.of(streamer, rows)
    # Without sampling a seed is checked, and none is drawn.
    seeds = row_seeds(seed, len(plain.ids)) if do_sample or seed is not None else None
    if stopping_criteria and special.pad is None and rows > 1:
        raise ValueError(
            "pad_token_id must be given where stopping_criteria can end one row before another and "
            "the model names no such token, got None; any token will do"
        )
    sampling = Sampling(
        alpha=ratio - 1.0,
        plausibility=plausibility,
        temperature=temperature if do_sample else 0.0,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seeds if do_sample else None,
        copies=num_return_sequences,
        processors=logits_processor or (),
        impl=impl,
    )
    stopping = Stopping(max_new_tokens, special.eos, special.pad, stopping_criteria or ())
    return decode(model, plain, safety, sampling, stopping, stream, use_cache)


def __getattr__(name: str) -> Any:
    # The processor is a subclass of one of transformers', which takes seconds to import.
    if name in ("ContrastiveBranch", "ContrastiveLogitsProcessor"):
        from trimtab.algorithms.self_contrastive import processor

        return getattr(processor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
