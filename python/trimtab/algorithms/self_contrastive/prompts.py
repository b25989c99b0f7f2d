"""Prompts as models want them: integers, padded on the left, with a mask that says where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Prompts(NamedTuple):
    """Rows of tokens that all end in the last column."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool

    def expand(self, rows: int) -> Prompts:
        """The same with each prompt repeated, in the order that ``generate`` repeats."""
        times = rows // len(self.ids)
        return self if times == 1 else Prompts(*(t.repeat_interleave(times, 0) for t in self))

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        return Prompts(self.ids.to(device), self.mask.to(device))


class SpecialTokens(NamedTuple):
    """What the caller, or else a model's generation config, says about tokens."""

    pad: int | None
    eos: tuple[int, ...]
    pads_are_text: bool
    """Whether the padding token also begins or ends a text, so that ids alone don't tell."""


def special_tokens(
    model: Any,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
) -> SpecialTokens:
    """What the caller gives, or else the model's; the first eos token pads where nothing does."""
    config = getattr(model, "generation_config", None)
    own, bos = (_as_tuple(getattr(config, f"{name}_token_id", None)) for name in ("eos", "bos"))
    eos = own if eos_token_id is None else _as_tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = getattr(config, "pad_token_id", None)
    if pad_token_id is None or int(pad_token_id) < 0:  # some configs say -1 for "none"
        pad_token_id = eos[0] if eos else None
    # Which tokens end the new text changes nothing in what a prompt may hold.
    return SpecialTokens(pad_token_id, eos, pad_token_id in (*eos, *own, *bos))


def _as_tuple(token_ids: Any) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    return tuple(int(token) for token in torch.as_tensor(token_ids).reshape(-1).tolist())


def check_token_ids(name: str, token_ids: Any) -> None:
    """None, one token's id or several; what is in the vocabulary, the model alone knows."""
    if token_ids is None:
        return
    found = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    wrong = [token for token in found if isinstance(token, bool) or not isinstance(token, Integral)]
    if wrong:
        raise TypeError(f"{name} must be of integers, got {type(wrong[0]).__name__}; pass an id")
    if any(token < 0 for token in found):
        raise ValueError(
            f"{name} must be 0 or more, got {min(found)}; leave it out for that of the model"
        )


def check_callables(name: str, callables: Any) -> None:
    """None, or a list of callables."""
    if callables is None:
        return
    if not isinstance(callables, (list, tuple)):
        raise TypeError(
            f"{name} must be a list of callables, got {type(callables).__name__}; use [{name}]"
        )
    for one in callables:
        if not callable(one):
            raise TypeError(f"{name} must be callables, got {type(one).__name__}; pass an instance")


def check_prompts(
    name: str,
    ids: Any,
    mask: Any,
    special: SpecialTokens,
) -> Prompts:
    """Prompts and where they are real.

    Without a mask, a run of padding tokens at the start of a row is padding, if the model pads with
    a token that no text has. If it pads with its bos or eos token, one row is taken as it is, and
    several are an error where the ids leave it open.

    Raises:
        ValueError: empty, not two-dimensional, padded on the right, or ambiguous.
        TypeError: not integers, or not tensors.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(ids).__name__}; use return_tensors='pt'"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}; pass the tokenizer's ids")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"{name} must be (prompts, tokens) and not empty, got shape {tuple(ids.shape)}; "
            f"one prompt is {name}[None], an empty one at least the bos token"
        )
    if mask is None:
        real = _find_padding(name, ids, special)
    else:
        real = _check_mask(name, ids, mask)
    return Prompts(ids.long(), real)


def _mask_name(name: str) -> str:
    return name.replace("input_ids", "attention_mask").replace(
        "prompt_ids", "prompt_attention_mask"
    )


def _check_mask(name: str, ids: Tensor, mask: Tensor) -> Tensor:
    mask_name = _mask_name(name)
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"{mask_name} must be a tensor, got {type(mask).__name__}; use return_tensors='pt'"
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"{mask_name} must have the shape of {name} {tuple(ids.shape)}, got "
            f"{tuple(mask.shape)}; pass the one that came with it"
        )
    real = mask.to(ids.device) != 0
    if not bool(real[:, -1].all()):
        raise _padded_on_the_right(name, real[:, -1])
    gaps = (real[:, :-1] & ~real[:, 1:]).any(1)
    if bool(gaps.any()):
        raise ValueError(
            f"{mask_name} must be one run of ones up to the last column, got gaps in row "
            f"{int(gaps.int().argmax())}; pad on the left only"
        )
    return real


def _find_padding(name: str, ids: Tensor, special: SpecialTokens) -> Tensor:
    everything = torch.ones_like(ids, dtype=torch.bool)
    if special.pad is None:
        return everything
    real = ids != special.pad
    if special.pads_are_text:
        open_rows = ~(real[:, 0] & real[:, -1])
        if len(ids) > 1 and bool(open_rows.any()):
            raise ValueError(
                f"{_mask_name(name)} must be given where the padding token {special.pad} is also "
                f"the bos or eos token, got None and row {int(open_rows.int().argmax())} begins or "
                "ends in it; pass the tokenizer's attention_mask"
            )
        return everything
    if not bool(real[:, -1].all()):
        raise _padded_on_the_right(name, real[:, -1])
    return real.cumsum(1) > 0


def _padded_on_the_right(name: str, last_is_real: Tensor) -> ValueError:
    return ValueError(
        f"{name} must be padded on the left, got padding at the end of row "
        f"{int((~last_is_real).int().argmax())}; set tokenizer.padding_side = 'left'"
    )


def stack(first: Prompts, second: Prompts) -> Prompts:
    """All rows of both, in one width: that of the longest prompt."""
    width = max(int(part.mask.sum(1).max()) for part in (first, second))
    parts = [_to_width(part, width) for part in (first, second)]
    return Prompts(*(torch.cat(pair) for pair in zip(*parts, strict=True)))


def _to_width(prompts: Prompts, width: int) -> Prompts:
    missing = width - prompts.ids.shape[1]
    if missing <= 0:  # what is cut off is padding
        return Prompts(prompts.ids[:, -width:], prompts.mask[:, -width:])
    return Prompts(F.pad(prompts.ids, (missing, 0)), F.pad(prompts.mask, (missing, 0)))


def match_prompts(plain: Prompts, safety: Prompts) -> Prompts:
    """A safety context for each prompt: its own, or the one for all."""
    count = len(plain.ids)
    if len(safety.ids) not in (1, count):
        raise ValueError(
            f"safety_input_ids must have {count} rows as input_ids or one for all, got "
            f"{len(safety.ids)}; the rows of both are the same questions"
        )
    return safety.expand(count)


def check_ratio(ratio: float) -> None:
    """Any finite number."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(
            f"ratio must be a number, got {type(ratio).__name__}; use a float, the paper's is 2.5"
        )
    if not math.isfinite(ratio):
        raise ValueError(f"ratio must be finite, got {ratio}; the paper's is 2.5")


def row_seeds(seed: int | Sequence[int] | Tensor | None, rows: int) -> Tensor:
    """One seed per prompt, (B,) int64."""
    if seed is None:
        return torch.randint(2**63 - 1, (rows,))
    if isinstance(seed, (bool, str)):
        raise TypeError(f"seed must be integers, got {type(seed).__name__}; use a number")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must be of 64 bits, got {seed}; use a smaller number")
        return torch.full((rows,), seed, dtype=torch.int64)
    seeds = torch.as_tensor(seed)
    if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
        raise TypeError(f"seed must be integers, got {seeds.dtype}; use seed.long()")
    if seeds.ndim != 0 and seeds.shape != (rows,):
        raise ValueError(
            f"seed must be a number or of shape ({rows},), got {tuple(seeds.shape)}; the sequences "
            "of one prompt share its seed"
        )
    return seeds.long().expand(rows)
