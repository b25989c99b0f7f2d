"""Pairs of requests in a serving engine: their arguments, their rows, and the token of both.

Knows no engine. ``trimtab.integrations.vllm`` and ``trimtab.integrations.sglang`` say which rows of
a step's logits are whose, and how far each request is; ``draw_pairs`` does the rest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.ops.contrast import contrastive_sample

PREFIX = "trimtab_"
SIDES = ("positive", "negative")
_OFF = {"plausibility": None, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
_NAMES = ("pair", "side", "alpha", *_OFF, "parted_token_id")


class Draw(NamedTuple):
    """How a pair draws its tokens; the names are those of ``contrastive_sample``."""

    alpha: float
    plausibility: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    parted_token_id: int | None = None


class Side(NamedTuple):
    """One request of a pair."""

    pair_id: str
    side: str
    draw: Draw


class Row(NamedTuple):
    """A row of a step's logits that a token is drawn from."""

    place: int
    """Which row of the logits."""
    side: Side
    generated: int
    """How many new tokens the request has: the number of this step."""
    tokens: Sequence[int] = ()
    """The new tokens as far as the host knows them; -1 for one that it doesn't."""


def pair_arguments(
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
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of both requests for the engine to carry: flat, of strings and numbers only.

    Raises:
        ValueError: a value that does not fit.
        TypeError: a type that does not fit.
    """
    given = {
        "pair": pair_id, "alpha": alpha, "parted_token_id": parted_token_id,
        "plausibility": plausibility, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "seed": seed,
    }  # fmt: skip
    flat = {PREFIX + name: value for name, value in given.items() if value is not None}
    both = tuple({**flat, PREFIX + "side": side} for side in SIDES)
    for arguments in both:
        read_side(arguments)
    return both[0], both[1]


def read_side(arguments: Mapping[str, Any] | None) -> Side | None:
    """The side that a request's arguments describe; None where they are of no pair.

    Raises:
        ValueError: a value that does not fit, a missing one, or a name that there isn't.
        TypeError: a type that does not fit.
    """
    ours = [item for item in (arguments or {}).items() if str(item[0]).startswith(PREFIX)]
    for name, value in ours:
        if not isinstance(value, (str, int, float)):
            raise TypeError(
                f"{name} must be a string or a number, got {type(value).__name__}; use paired(...)"
            )
    # The checks cost more than a step should; a request comes by once per token.
    names = tuple(name.removeprefix(PREFIX) for name, _ in ours)
    return _read(names, *(value for _, value in ours)) if ours else None


@functools.lru_cache(maxsize=4096, typed=True)  # 1, 1.0 and True are three values
def _read(names: tuple[str, ...], *values: Any) -> Side:
    given = dict(zip(names, values, strict=True))
    unknown = sorted(set(given) - set(_NAMES))
    if unknown:
        raise ValueError(
            f"{PREFIX}* must be of {', '.join(_NAMES)}, got {', '.join(unknown)}; make both "
            "requests with paired(...)"
        )
    for name in ("pair", "side", "alpha"):
        if name not in given:
            raise ValueError(f"{PREFIX}{name} must be given, got none; use paired(...)")
    pair_id, side = given.pop("pair"), given.pop("side")
    if not isinstance(pair_id, str):
        raise TypeError(f"pair_id must be a string, got {type(pair_id).__name__}; use str(...)")
    if not pair_id:
        raise ValueError("pair_id must be a name, got the empty string; one of its own per pair")
    if side not in SIDES:
        raise ValueError(f"{PREFIX}side must be one of {SIDES}, got {side!r}; use paired(...)")
    parted = given.pop("parted_token_id", None)
    if parted is not None and (isinstance(parted, bool) or not isinstance(parted, int)):
        raise TypeError(
            f"parted_token_id must be an integer or None, got {type(parted).__name__}; use an id "
            "that no answer needs"
        )
    if parted is not None and parted < 0:
        raise ValueError(f"parted_token_id must be 0 or more, got {parted}; None raises instead")
    nothing = torch.empty(0, 1)  # the op's own checks of its arguments
    contrastive_sample(nothing, nothing, **given)
    return Side(pair_id, side, Draw(**{**_OFF, **given, "parted_token_id": parted}))


def check_neutral(given: Callable[[str], Any], neutral: Mapping[str, Any]) -> None:
    """The engine's own sampling has nothing left to do, so that nothing given is ignored.

    Raises:
        ValueError: something else was asked for.
    """
    for name, value in neutral.items():
        found = given(name)
        if found is not None and found != value and found != []:
            raise ValueError(
                f"{name} must be {value} in a paired request, got {found!r}; the pair draws for "
                "itself, give paired(...) what it has to heed"
            )


def too_old(version: str, oldest: tuple[int, ...]) -> bool:
    """Whether a version's leading numbers come before these."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found is None or tuple(int(part) for part in found[0].split(".")) < oldest


@torch.no_grad()
def draw_pairs(
    logits: Tensor,  # (N, V)
    rows: Iterable[Row],
    last_token: Tensor | None = None,  # (N,)
) -> Tensor:  # (N, V)
    """Writes one token into both rows of every pair: 0 there, -inf everywhere else.

    Any sampler takes that token, at any temperature and with any filter. Other rows stay. Where a
    pair is parted (see ``_why_parted``), where both sides' last tokens differ and where the logits
    leave no token, that is ``parted_token_id``, or without one a RuntimeError; the latter two cost
    a wait for the device in every step.

    Args:
        logits: raw logits of the step, written to.
        rows: those that a token is drawn from in this step, in any order.
        last_token: what each row's request was continued with, where the device has it.

    Raises:
        RuntimeError: see above; ``logits`` may be half written.
        ValueError: a ``parted_token_id`` outside the vocabulary.
    """
    groups: dict[tuple[bool, bool], list[tuple[Row, Row]]] = {}
    for found in _by_pair(rows):
        reason = _why_parted(found)
        if reason is not None:
            _part(logits, found, reason)
            continue
        first, second = sorted(found, key=lambda row: SIDES.index(row.side.side))
        draw = first.side.draw
        # What is either on or off can't differ between the rows of one call.
        kind = (draw.plausibility is None, draw.parted_token_id is None)
        groups.setdefault(kind, []).append((first, second))
    for pairs in groups.values():
        _draw(logits, pairs, last_token)
    return logits


def _by_pair(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.side.pair_id, []).append(row)
    return list(found.values())


def _why_parted(rows: list[Row]) -> str | None:
    """What keeps the rows of one id from being a pair at the same step; None if nothing does."""
    if len(rows) == 1:
        return f"its {rows[0].side.side} request alone"
    first, second = rows[:2]
    if len(rows) > 2 or first.side.side == second.side.side:
        return f"{len(rows)} requests, not one of each side; every pair needs an id of its own"
    if first.side.draw != second.side.draw:
        return "two requests with different arguments"
    if first.generated != second.generated:
        return f"requests with {first.generated} and {second.generated} new tokens"
    known = min(len(first.tokens), len(second.tokens))
    ends = {row.tokens[known - 1] for row in rows} if known else set()
    return "requests with different tokens" if len(ends - {-1}) > 1 else None


def _error(pair_id: str, reason: str) -> RuntimeError:
    return RuntimeError(
        f"pair {pair_id!r} must have both requests in every step, got {reason}; give paired(...) a "
        "parted_token_id to end such a pair alone"
    )


def _part(logits: Tensor, rows: list[Row], reason: str) -> None:
    for row in rows:
        token = row.side.draw.parted_token_id
        if token is None:
            raise _error(row.side.pair_id, reason)
        _check_in_vocabulary(token, logits.shape[-1])
        logits[row.place].fill_(-torch.inf)[token] = 0.0


def _check_in_vocabulary(token: int, vocabulary: int) -> None:
    if token >= vocabulary:
        raise ValueError(
            f"parted_token_id must be in [0, {vocabulary}), got {token}; use a token of the model"
        )


def _draw(logits: Tensor, pairs: list[tuple[Row, Row]], last_token: Tensor | None) -> None:
    draws = tuple(first.side.draw for first, _ in pairs)
    how = _columns(draws, logits.device)
    places = [(first.place, second.place, first.generated) for first, second in pairs]
    columns = _to_device(list(zip(*places, strict=True)), torch.int64, logits.device)
    positive, negative, position = columns.unbind()
    parted = None
    if draws[0].parted_token_id is not None:
        for draw in draws:
            _check_in_vocabulary(draw.parted_token_id or 0, logits.shape[-1])
        parted = how["parted_token_id"].expand_as(positive)
        # No answer may end with it by chance; what the positive row rules out stays out.
        logits[positive, parted] = -torch.inf
    token = contrastive_sample(
        logits, logits, positive_rows=positive, negative_rows=negative, position=position,
        **{name: value for name, value in how.items() if name != "parted_token_id"},
    ).token  # fmt: skip
    failed = token < 0
    if last_token is not None:
        failed |= (last_token[positive] != last_token[negative]) & (position > 0)
    if parted is not None:
        token = torch.where(failed, parted, token)
    elif bool(failed.any()):
        names = [pairs[row][0].side.pair_id for row in failed.nonzero()[:, 0].tolist()]
        raise _error(names[0], "logits without a token to choose, or requests parted before")
    rows = torch.cat([positive, negative])
    logits.index_fill_(0, rows, -torch.inf)
    logits[rows, token.repeat(2)] = 0.0


@functools.lru_cache(maxsize=32)
def _columns(draws: tuple[Draw, ...], device: torch.device) -> dict[str, Any]:
    """Each argument as one number where all rows share it, else one per row on the device.

    The pairs of one step are mostly those of the step before.
    """
    columns: dict[str, Any] = {}
    for name, values in zip(Draw._fields, zip(*draws, strict=True), strict=True):
        whole = name in ("top_k", "seed", "parted_token_id")
        dtype = torch.int64 if whole else torch.float64
        if name == "parted_token_id":
            if values[0] is not None:
                columns[name] = _to_device(values, dtype, device)
        elif len(set(values)) == 1:
            columns[name] = values[0]
        else:
            columns[name] = _to_device(values, dtype, device)
    return columns


def _to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for everything that the device has to do.
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
