"""The decoding loop: one forward pass of 2B rows per token, and one op from logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.algorithms.self_contrastive.decoder import Decoder, input_device
from trimtab.algorithms.self_contrastive.prompts import Prompts, stack
from trimtab.ops.contrast import contrastive_logits, contrastive_sample

_ROOM = 256  # new tokens that memory is taken for at first


class Sampling(NamedTuple):
    """How a token is drawn; the names are those of ``contrastive_sample``."""

    alpha: float
    plausibility: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Tensor | None = None  # (B,)
    copies: int = 1  # sequences per prompt
    processors: Sequence[Any] = ()
    impl: str | None = None


class Stopping(NamedTuple):
    """When a row ends, and what comes after."""

    max_new_tokens: int
    eos: tuple[int, ...] = ()
    pad: int | None = None
    criteria: Sequence[Any] = ()


class Stream(NamedTuple):
    """Where the tokens go as they come."""

    streamer: Any = None

    @classmethod
    def of(cls, streamer: Any, rows: int) -> Stream:
        """For so many sequences; a streamer of transformers takes one."""
        if streamer is not None and rows != 1:
            raise ValueError(f"streamer must have one sequence, got {rows}; leave it out")
        return cls(streamer)

    def put(self, tokens: Tensor) -> None:
        """The prompt, then one step's tokens after another, as ``generate`` puts them."""
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())

    def end(self) -> None:
        """Nothing more comes."""
        if self.streamer is not None:
            self.streamer.end()


def _ended_by(criterion: Any, ids: Tensor) -> Tensor:  # (R, T) -> (R,) bool
    ended = criterion(ids, None)
    if not isinstance(ended, (bool, Tensor)):
        raise TypeError(
            f"stopping_criteria must return a mask ({len(ids)},) of the rows that end, got "
            f"{type(ended).__name__} from {type(criterion).__name__}; return a bool tensor"
        )
    mask = torch.as_tensor(ended, device=ids.device)
    if mask.shape not in ((), ids.shape[:1]) or mask.dtype != torch.bool:
        raise ValueError(
            f"stopping_criteria must return a mask ({len(ids)},) of bool, got {tuple(mask.shape)} "
            f"of {mask.dtype} from {type(criterion).__name__}; one value per row, or one for all"
        )
    return mask


class _Draw:
    """Tokens from the logits (2B, V) of the plain rows and, below them, the safety rows."""

    def __init__(self, sampling: Sampling, batch: int, device: torch.device) -> None:
        self.sampling, self.device = sampling, device
        copies = sampling.copies
        rows = torch.arange(batch * copies, device=device)
        # The first step has one row per prompt, whatever the number of sequences.
        prompt_of = rows // copies
        self.maps = ((prompt_of, prompt_of + batch), (rows, rows + len(rows)))
        self.seed: Any = 0
        if sampling.seed is not None:
            self.seed = sampling.seed.to(device)[prompt_of]
        # The sequences of a prompt share its seed and differ in the counter's upper word.
        self.first_position: Any = (rows % copies) << 32 if copies > 1 else 0

        self.filters: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "impl": sampling.impl,
        }
        # What the op says to bad values, it says before the model runs.
        nothing = torch.empty(0, 1, device=device)
        contrast: dict[str, Any] = {"alpha": sampling.alpha, "plausibility": sampling.plausibility}
        contrastive_sample(nothing, nothing, **contrast, **self.filters)

    def __call__(self, logits: Tensor, ids: Tensor, step: int) -> Tensor:
        how = self.sampling
        maps = self.maps[0 if step == 0 else 1]
        logits = logits.to(self.device)
        filters = {
            **self.filters,
            "seed": self.seed,
            "position": self.first_position + step,
        }
        if not how.processors:
            return contrastive_sample(
                logits, logits, alpha=how.alpha, plausibility=how.plausibility,
                positive_rows=maps[0], negative_rows=maps[1], **filters,
            ).token  # fmt: skip
        plain, safety = (logits[rows] for rows in maps)
        scores = contrastive_logits(
            plain, safety, alpha=how.alpha, plausibility=how.plausibility, impl=how.impl
        )
        ids = ids.contiguous()
        for processor in how.processors:
            scores = processor(ids, scores)
        return contrastive_sample(scores, scores, alpha=0.0, **filters).token


@torch.no_grad()
def decode(
    model: Any,
    plain: Prompts,  # (B, T)
    safety: Prompts,  # (B, S)
    sampling: Sampling,
    stopping: Stopping,
    stream: Stream,
    use_cache: bool,
) -> Tensor:  # (B * copies, T + new)
    """Prompt and new tokens of every sequence, on the prompt's device.

    Raises:
        ValueError: the model's logits, or what a processor made of them, have NaN or leave nothing;
            the decoder can't run the prompts as they are.
        TypeError: a stopping criterion returns something else than a mask.
    """
    batch, copies = len(plain.ids), sampling.copies
    rows, width = batch * copies, plain.ids.shape[1]
    home, device = plain.ids.device, input_device(model, plain.ids.device)
    plain, safety = plain.to(device), safety.to(device)

    draw = _Draw(sampling, batch, device)
    decoder = Decoder(model, use_cache=use_cache)
    logits = decoder.prefill(stack(plain, safety))
    fill = 0 if stopping.pad is None else stopping.pad
    ids = plain.ids.repeat_interleave(copies, 0)  # and room for new tokens, more when it is full
    eos = torch.tensor(stopping.eos, dtype=torch.int64, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    failed = torch.zeros_like(finished)
    stream.put(ids)

    for step in range(stopping.max_new_tokens):
        token = draw(logits, ids[:, :width], step)
        failed |= (token < 0) & ~finished
        # Without a padding token, as in `generate`, rows go on until all have ended.
        over = token < 0 if stopping.pad is None else (token < 0) | finished
        token = torch.where(over, fill, token)
        if width == ids.shape[1]:
            room = min(max(width, _ROOM), stopping.max_new_tokens - step)
            ids = torch.nn.functional.pad(ids, (0, room), value=fill)
        ids[:, width] = token
        width += 1
        stream.put(token)
        if stopping.eos or stopping.criteria:
            finished |= failed | torch.isin(token, eos)
            for criterion in stopping.criteria:
                finished |= _ended_by(criterion, ids[:, :width].contiguous())
            if bool(finished.all()):
                break
        if step + 1 == stopping.max_new_tokens:
            break
        if step == 0 and copies > 1:
            decoder.select(torch.cat(draw.maps[0]))
        logits = decoder.append(token.repeat(2))
    stream.end()
    if bool(failed.any()):
        raise ValueError(
            "model must give logits without NaN that leave a token to choose, got none for the "
            f"rows {failed.nonzero()[:, 0].tolist()}; look at its dtype and the logits processors"
        )
    return ids[:, :width].contiguous().to(home)
