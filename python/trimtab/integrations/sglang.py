"""Contrastive decoding of paired requests in SGLang: ``PairedLogitProcessor`` and ``paired``.

As ``trimtab.integrations.vllm``, with SGLang's interface. The server runs with
``--enable-custom-logit-processor`` and has trimtab installed; both requests go into one call::

    prompts = [plain_ids, safety_ids]
    both = paired("q1", alpha=1.5, parted_token_id=reserved, max_new_tokens=200)
    answer, _ = engine.generate(input_ids=prompts, **both)

A request's row can't be held back until its partner's comes. Where only one of a pair is in a step,
or one is further on than the other, both requests end with ``parted_token_id`` or, without one, the
scheduler ends with an error. How to keep pairs together and what a logit processor can't do at all
is in docs/serving.md. Written against the sources of SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trimtab.integrations._pairs import (
    Row,
    check_neutral,
    draw_pairs,
    pair_arguments,
    read_side,
    too_old,
)

__all__ = ["PairedLogitProcessor", "paired"]

_OLDEST = (0, 5, 23)
_NEEDS = "trimtab.integrations.sglang needs sglang >= 0.5.23"
_NEUTRAL: dict[str, Any] = {
    "n": 1, "sampling_seed": None, "beam_width": None, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "watermark": None,
}  # fmt: skip

_missing: str | None = None
try:
    import sglang as _sglang
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor as _Base

    if too_old(_sglang.__version__, _OLDEST):
        _missing = f"{_NEEDS}, got {_sglang.__version__}; upgrade it"
except ImportError as error:
    _missing = f"{_NEEDS}, which can't be imported ({error}); install sglang"

    class _Base:  # type: ignore[no-redef]
        pass


def _check_installed() -> None:
    if _missing is not None:
        raise ImportError(_missing)


def paired(
    pair_id: str,
    *,
    alpha: float,
    parted_token_id: int | None,
    plausibility: float | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    custom_params: dict[str, Any] | None = None,
    **sampling_params: Any,
) -> dict[str, Any]:
    """What a call of ``Engine.generate``, or of ``/generate``, needs beside the two prompts.

    The positive request comes first, and the answer is its. Where its ``finish_reason`` has
    ``parted_token_id`` as ``matched``, the pair was parted; the tokens before are right, send both
    again under a new name.

    Args:
        pair_id: a name that no other pair in the server has.
        alpha: weight of the contrast, ``z = positive + alpha (positive - negative)``; Self-CD's
            ratio less one.
        parted_token_id: a token that no answer needs (a reserved one, not eos), which ends a pair
            that can't go on; it is never drawn. None: a RuntimeError, which ends the scheduler and
            all of its requests, and in every step one wait for the device.
        plausibility: as for ``contrastive_sample``, as all up to ``seed``.
        temperature: of the pair's draw; 0 is greedy.
        top_k: of the pair's draw.
        top_p: of the pair's draw.
        min_p: of the pair's draw.
        seed: of the pair's draw; the number of the token is the position.
        stop: strings that end the answer. Only the positive request has them, the negative one then
            ends as parted.
        stop_token_ids: further tokens that end both.
        custom_params: further ones, of both requests.
        sampling_params: the rest of the sampling parameters, of both requests.

    Returns:
        ``sampling_params``, a list of two, and ``custom_logit_processor``.

    Raises:
        ValueError: a value that does not fit, or one that the engine would have to heed when it
            draws.
        TypeError: a type that does not fit.
        ImportError: sglang is missing or too old.
    """
    _check_installed()
    arguments = pair_arguments(
        pair_id, alpha=alpha, parted_token_id=parted_token_id, plausibility=plausibility,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
    )  # fmt: skip
    check_neutral(sampling_params.get, _NEUTRAL)
    if "stop_regex" in sampling_params:
        raise ValueError("stop_regex must be left out of a paired request; use stop")
    ends = list(stop_token_ids or [])
    if parted_token_id is not None:
        ends.append(parted_token_id)
        if sampling_params.get("ignore_eos"):
            raise ValueError(
                "ignore_eos must be False with parted_token_id, got True; with it SGLang heeds no "
                "stop token"
            )
    elif stop is not None:
        raise ValueError(
            f"stop must be None without parted_token_id, got {stop!r}; the negative request needs "
            "that token to end by"
        )
    both = [
        {
            **sampling_params,
            "temperature": 0.0,
            "stop_token_ids": ends,
            "custom_params": {**(custom_params or {}), **own},
        }
        for own in arguments
    ]
    if stop is not None:
        both[0]["stop"] = stop if isinstance(stop, str) else list(stop)
    return {"sampling_params": both, "custom_logit_processor": PairedLogitProcessor.to_str()}


class PairedLogitProcessor(_Base):  # type: ignore[misc]
    """One token for both requests of a pair, in SGLang; requests without it are left alone.

    Both rows of a pair become 0 at the token and -inf elsewhere, so that whatever comes after takes
    it.

    Cost per step: what ``contrastive_sample`` costs for the pairs, one write of their rows, and
    copies of a few numbers per pair to the device, for which nothing waits.

    Raises:
        ImportError: sglang is missing or too old.
        ValueError: the server decodes speculatively, or a request's arguments do not fit.
        RuntimeError: a pair without ``parted_token_id`` is parted; ends the scheduler.
    """

    def __init__(self) -> None:
        _check_installed()
        from sglang.srt.runtime_context import get_server_args

        # Most ways of verifying drafts never call a custom processor.
        algorithm = getattr(get_server_args(), "speculative_algorithm", None)
        if algorithm is not None:
            raise ValueError(
                f"speculative_algorithm must be None for paired requests, got {algorithm!r}; start "
                "the server without it"
            )

    def __call__(
        self,
        logits: Tensor,  # (N, V)
        custom_param_list: Sequence[dict[str, Any] | None] | None = None,
    ) -> Tensor:  # (N, V)
        """The logits of this processor's requests, with the rows of pairs overwritten."""
        rows = [_row(index, params) for index, params in enumerate(custom_param_list or [])]
        return draw_pairs(logits, [row for row in rows if row is not None])


def _row(index: int, params: dict[str, Any] | None) -> Row | None:
    """A row that a token is drawn from; None for one of no pair, or whose token is dropped."""
    side = read_side(params)
    if side is None:
        return None
    request = (params or {})["__req__"]
    # What is in the cache or on its way there, this step's input included. The tokens come later:
    # with overlap, the last step's are not on the host yet.
    length, prompt = request.kv.kv_committed_len, len(request.origin_input_ids)
    if length < prompt + len(request.output_ids):  # a chunk of the prompt, and not the last
        return None
    return Row(index, side, length - prompt, request.output_ids)
