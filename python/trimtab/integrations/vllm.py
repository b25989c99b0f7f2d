"""Contrastive decoding of paired requests in vLLM: ``PairedLogitsProcessor`` and ``paired``.

One request has the prompt that is amplified (Self-CD: without the safety prompt), the other the one
that is pushed away (with it). In every step both get the same token, that of
``trimtab.contrastive_sample`` on their two rows of logits::

    llm = LLM(model, logits_processors=["trimtab.integrations.vllm:PairedLogitsProcessor"])
    both = paired("q1", alpha=1.5, parted_token_id=reserved, max_tokens=200)
    answer, _ = llm.generate([plain_prompt, safety_prompt], list(both))

A request's row can't be held back until its partner's comes: a row that is there gets a token. So
where only one of a pair is in a step, or one is further on than the other, there is no right token,
and both requests end with ``parted_token_id`` or, without one, the engine ends with an error. How
to keep pairs together and what a logits processor can't do at all is in docs/serving.md.

Both interfaces of vLLM are served by the one class: that of the first model runner (``V1``, rows of
a persistent batch) and of the second (``V2``, slots of requests). Written against the sources of
vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from trimtab.integrations._pairs import (
    Row,
    Side,
    check_neutral,
    draw_pairs,
    pair_arguments,
    read_side,
    too_old,
)

__all__ = ["PairedLogitsProcessor", "paired"]

_OLDEST = (0, 32)
_NEEDS = "trimtab.integrations.vllm needs vllm >= 0.32"

# What the engine would do to one row's logits, or instead of the pair's draw.
_NEUTRAL: dict[str, Any] = {
    "n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
    "bad_words": None, "thinking_token_budget": None, "trace_decode_token_ids": None,
}  # fmt: skip

_missing: str | None = None
try:
    import vllm as _vllm
    from vllm.v1.sample.logits_processor import LogitsProcessor as _PersistentBatch
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as _RequestSlots

    if too_old(_vllm.__version__, _OLDEST):
        _missing = f"{_NEEDS}, got {_vllm.__version__}; upgrade it"
except ImportError as error:
    _missing = f"{_NEEDS}, which can't be imported ({error}); install vllm"

    class _PersistentBatch:  # type: ignore[no-redef]
        pass

    class _RequestSlots:  # type: ignore[no-redef]
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
    extra_args: dict[str, Any] | None = None,
    **sampling_params: Any,
) -> tuple[Any, Any]:
    """``SamplingParams`` of the positive and of the negative request, in this order.

    The answer is that of the positive request. Where its ``stop_reason`` is ``parted_token_id`` the
    pair was parted; the tokens before that one are right, send both again under a new name.

    Args:
        pair_id: a name that no other pair in the engine has.
        alpha: weight of the contrast, ``z = positive + alpha (positive - negative)``; Self-CD's
            ratio less one.
        parted_token_id: a token that no answer needs (a reserved one, not eos), which ends a pair
            that can't go on; it is never drawn. None: a RuntimeError, which ends the engine and all
            of its requests, and in every step one wait for the device.
        plausibility: as for ``contrastive_sample``, as all up to ``seed``.
        temperature: of the pair's draw; 0 is greedy.
        top_k: of the pair's draw.
        top_p: of the pair's draw.
        min_p: of the pair's draw.
        seed: of the pair's draw; the number of the token is the position.
        stop: strings that end the answer. Only the positive request has them, the negative one then
            ends as parted.
        stop_token_ids: further tokens that end both.
        extra_args: further ones, of both requests.
        sampling_params: the rest of ``SamplingParams``, of both requests, as ``max_tokens``.

    Raises:
        ValueError: a value that does not fit, or one that the engine would have to heed when it
            draws.
        TypeError: a type that does not fit.
        ImportError: vllm is missing or too old.
    """
    _check_installed()
    from vllm import SamplingParams

    arguments = pair_arguments(
        pair_id, alpha=alpha, parted_token_id=parted_token_id, plausibility=plausibility,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
    )  # fmt: skip
    ends = list(stop_token_ids or [])
    if parted_token_id is not None:
        ends.append(parted_token_id)
    params = [
        SamplingParams(
            temperature=0.0,
            stop=None if stop is None or side else stop,
            stop_token_ids=ends,
            extra_args={**(extra_args or {}), **own},
            **sampling_params,
        )
        for side, own in enumerate(arguments)
    ]
    for one, asked in zip(params, (stop, None), strict=True):
        _check_params(one)
        if asked is not None and parted_token_id is None:
            raise ValueError(
                f"stop must be None without parted_token_id, got {asked!r}; the negative request "
                "needs that token to end by"
            )
    return params[0], params[1]


def _check_params(params: Any) -> Side | None:
    side = read_side(params.extra_args)
    if side is None:
        return None
    check_neutral(lambda name: getattr(params, name, None), _NEUTRAL)
    parted = side.draw.parted_token_id
    if parted is not None and parted not in (params.stop_token_ids or []):
        raise ValueError(
            f"stop_token_ids must have parted_token_id {parted}, got {params.stop_token_ids}; "
            "use paired(...)"
        )
    return side


class _Request(NamedTuple):
    side: Side
    tokens: Sequence[int]  # the engine's own list, which grows


class _BatchRows:
    """Which requests the rows of the first model runner's persistent batch are."""

    def __init__(self) -> None:
        self._requests: dict[int, _Request] = {}

    def update(self, change: Any) -> None:
        """Follows the batch: requests removed, then added, then moved."""
        for index in change.removed:
            self._requests.pop(index, None)
        for index, params, _, tokens in change.added:
            self._requests.pop(index, None)
            side = _check_params(params)
            if side is not None:
                self._requests[index] = _Request(side, tokens)
        for source, target, how in change.moved:
            moved, replaced = (self._requests.pop(index, None) for index in (source, target))
            if moved is not None:
                self._requests[target] = moved
            if replaced is not None and how.name == "SWAP":
                self._requests[source] = replaced

    def rows(self) -> list[Row]:
        """All of them: without chunked prefill every row gives a token."""
        return [
            Row(index, side, len(tokens), tokens)
            for index, (side, tokens) in self._requests.items()
        ]


class _SlotRows:
    """Which requests stand in the second model runner's slots, and how far they are."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._sides: dict[int, Side] = {}

    def add(self, slot: int, params: Any) -> bool:
        """A request in a slot that another may have had; whether it is one of a pair."""
        self._sides.pop(slot, None)
        side = _check_params(params)
        if side is not None:
            self._sides[slot] = side
        return side is not None

    def rows(self, context: Any) -> list[Row]:
        """Those that are through with their prompt (and, resumed, with what came after it)."""
        if not self._sides:
            return []
        slots = context.idx_mapping_np.tolist()
        lengths = context.seq_lens_upper_bound_np[: len(slots)].tolist()
        found = []
        for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            side = self._sides.get(slot)
            if side is not None and length >= int(self._state.prefill_len.np[slot]):
                generated = length - int(self._state.prompt_len.np[slot])
                found.append(Row(index, side, generated))
        return found


class PairedLogitsProcessor(_PersistentBatch, _RequestSlots):  # type: ignore[misc]
    """One token for both requests of a pair, in vLLM; other requests are left alone.

    For ``logits_processors`` of ``LLM``, or the server's ``--logits-processors``, as
    ``"trimtab.integrations.vllm:PairedLogitsProcessor"``. Works with either model runner. Both rows
    of a pair become 0 at the token and -inf elsewhere, so that whatever comes after takes it.

    Cost per step: what ``contrastive_sample`` costs for the pairs, one write of their rows, and
    copies of a few numbers per pair to the device, for which nothing waits.

    Raises:
        ImportError: vllm is missing or too old.
        ValueError: speculative decoding or batch-sharded sampling is on, or, with the first model
            runner, chunked prefill, where a row whose prompt isn't through looks like one with its
            first token.
        RuntimeError: a pair without ``parted_token_id`` is parted; ends the engine.
    """

    def __init__(self, vllm_config: Any, *arguments: Any) -> None:
        _check_installed()
        _refuse(vllm_config, "speculative_config", None)
        _refuse(vllm_config, "parallel_config.enable_batch_sharded_sampling", False)
        # V1 passes a device and whether memory is pinned, V2 the state of its requests.
        self._slots = _SlotRows(arguments[0]) if len(arguments) == 1 else None
        if self._slots is None:
            _refuse(vllm_config, "scheduler_config.enable_chunked_prefill", False)
        self._batch = _BatchRows()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a paired request before it is taken in.

        Raises:
            ValueError: arguments that do not fit.
        """
        try:
            _check_params(sampling_params)
        except TypeError as error:  # only a ValueError becomes an answer to the client
            raise ValueError(str(error)) from error

    def is_argmax_invariant(self) -> bool:
        """False: greedy requests need it too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: what has changed in the persistent batch."""
        if batch_update is not None:
            self._batch.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request has come into a slot."""
        assert self._slots is not None, "only the second model runner has slots"
        return self._slots.add(req_idx, sampling_params)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:  # (N, V)
        """The step's logits, with the rows of pairs overwritten."""
        if self._slots is None:
            return draw_pairs(logits, self._batch.rows())
        return draw_pairs(logits, self._slots.rows(ctx), ctx.input_ids)


def _refuse(config: Any, name: str, wanted: Any) -> None:
    found = config
    for part in name.split("."):
        found = getattr(found, part, wanted)
    if found is not None and found != wanted:
        raise ValueError(
            f"{name} must be {wanted} for paired requests, got {found!r}; turn it off in the engine"
        )
