"""The contrast as a logits processor, for those who keep ``generate`` with all that it can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.self_contrastive.decoder import Decoder, input_device, model_arguments
from trimtab.algorithms.self_contrastive.prompts import (
    Prompts,
    check_prompts,
    check_ratio,
    special_tokens,
)
from trimtab.ops.contrast import contrastive_logits

try:
    from transformers import LogitsProcessor as _Base
except ImportError:  # the class is then a callable like any other
    _Base = object


class ContrastiveBranch:
    """The other side of a contrast: a model and what it reads before the tokens that are generated.

    Args:
        model: Hugging Face causal LM with the vocabulary of the one that generates, or that one.
        input_ids: prompts of this branch (B, S), padded on the left, each for as many rows of
            ``generate`` as follow from beams and returned sequences; (1, S) is shared by all rows.
            None: the prompt of ``generate`` itself.
        attention_mask: 1 for the real tokens of this branch's prompts, or of ``generate``'s. None:
            leading padding tokens are padding where they can't be text, else it is an error
            (several rows that begin or end with a padding token that is also the bos or eos token).
        last_token: without ``input_ids``, only the last token of ``generate``'s prompt.
        model_inputs: further inputs of the forward pass over the prompts, as ``pixel_values``; a
            tensor has one row per prompt.
        pad_token_id: None for that of the model.
        use_cache: False runs the whole context again for every token.
        name: what errors call ``input_ids``.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor | None = None,  # (B, S)
        attention_mask: Tensor | None = None,
        *,
        last_token: bool = False,
        model_inputs: Mapping[str, Any] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        name: str = "input_ids",
    ) -> None:
        model_arguments(model)  # refuses what can't be run
        self.name = name
        self.model, self.attention_mask = model, attention_mask
        self.last_token, self.use_cache = last_token, use_cache
        self.model_inputs = dict(model_inputs or {})
        self.special = special_tokens(model, None, pad_token_id)
        self.prompts: Prompts | None = None
        if input_ids is not None:
            self.prompts = check_prompts(name, input_ids, attention_mask, self.special)
        self.reset()

    def reset(self) -> None:
        """Forget the cache."""
        self._decoder: Decoder | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether there is a cache to go on from."""
        return self._decoder is not None

    def labels(self, rows: int, device: torch.device) -> Tensor:  # (rows, L)
        """What tells the contexts of two rows apart, if not the tokens of ``generate``."""
        columns = []
        if self.prompts is not None:
            whole = torch.cat([self.prompts.ids * self.prompts.mask, self.prompts.mask], 1)
            _, label = torch.unique(whole, dim=0, return_inverse=True)
            columns.append(_repeat(self.name, label, rows))
        for name, value in self.model_inputs.items():
            if isinstance(value, Tensor):
                columns.append(_repeat(name, torch.arange(len(value)), rows))
        if not columns:
            return torch.zeros(rows, 0, dtype=torch.int64, device=device)
        return torch.stack([column.to(device) for column in columns], 1)

    def start(self, ids: Tensor, prompt_width: int) -> Tensor:
        """Logits (R, V) behind the prompts and what of ``ids`` is not prompt, from nothing."""
        rows = len(ids)
        prompts = self._prompts(ids[:, :prompt_width])
        new = ids[:, prompt_width:]
        context = Prompts(
            torch.cat([prompts.ids.to(ids.device), new], 1),
            torch.cat([prompts.mask.to(ids.device), torch.ones_like(new, dtype=torch.bool)], 1),
        )
        inputs = {
            name: _repeat(name, value, rows) if isinstance(value, Tensor) else value
            for name, value in self.model_inputs.items()
        }
        self._decoder = Decoder(self.model, use_cache=self.use_cache, model_inputs=inputs)
        return self._decoder.prefill(context.to(input_device(self.model, ids.device)))

    def go_on(self, tokens: Tensor, source: Tensor | None) -> Tensor:
        """Logits after one more token each; row i continues row ``source[i]`` of the last call."""
        assert self._decoder is not None, "start comes first"
        if source is not None:
            self._decoder.select(source)
        return self._decoder.append(tokens)

    def _prompts(self, given: Tensor) -> Prompts:  # (R, T)
        rows = len(given)
        if self.prompts is not None:
            return Prompts(*(_repeat(self.name, part, rows) for part in self.prompts))
        if self.last_token:
            return Prompts(given[:, -1:], torch.ones_like(given[:, -1:], dtype=torch.bool))
        mask = self.attention_mask
        mask = None if mask is None else _repeat("attention_mask", mask, rows)
        return check_prompts("input_ids", given, mask, self.special)


class ContrastiveLogitsProcessor(_Base):  # type: ignore[misc]
    """Contrastive decoding inside ``generate``: ``z = anchor + alpha * (positive - negative)``.

    What ``generate`` hands over (the ``scores``) is ``positive``, or, with a ``positive`` branch,
    the anchor; the branches run in here, with caches of their own. The result is
    ``log_softmax(z)`` in float32, made from raw logits on both sides: normalised, so that the
    scores of beams add up. Greedy search, sampling, beams, several returned sequences and assisted
    decoding work; the classmethods carry the methods' own parameter names. Where beams are not
    needed, ``SelfContrastiveDecoding`` runs both sides in one forward pass, this does not.

    Contexts follow the ids: a call whose ids continue what an earlier call has seen, beams in
    whatever order, goes on from there; where they don't, a new prompt has begun and the branches
    begin anew. So one object serves many calls of ``generate``, and ``generate`` on its own output
    goes on as one longer call would, the branches included, also where those ids are meant as a new
    prompt; ``reset`` ends that. The branches' caches stay in memory until ``reset`` or the next
    prompt. An object has one text at a time: each thread needs one of its own.

    ``generate`` applies the penalties and biases that its config asks for before the processors
    that it is given, so to ``scores`` alone and not to the contrast. For the contrast, leave them
    out of the config and put their processors behind this one in ``logits_processor``; what asks
    for the sign of a score, as a repetition penalty does, then sees log-probabilities.

    Cost per token: a forward pass of every branch, over all of ``generate``'s rows, and one
    comparison of the ids, for which the host waits. A rollback of assisted decoding, and a step
    without cache, runs the branch's whole context again.

    Args:
        negative: what is pushed away.
        alpha: weight of the contrast.
        positive: what is pulled towards; None for the scores themselves.
        plausibility: beta in (0, 1]: keep ``scores >= max(scores) + log(beta)``; None keeps all.
        impl: implementation of ``contrastive_logits``; None for the fastest available.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        negative: ContrastiveBranch,
        *,
        alpha: float,
        positive: ContrastiveBranch | None = None,
        plausibility: float | None = None,
        impl: str | None = None,
    ) -> None:
        self.negative, self.positive = negative, positive
        self.alpha, self.plausibility, self.impl = alpha, plausibility, impl
        nothing = torch.empty(0, 1)  # the op's checks of its arguments
        contrastive_logits(nothing, nothing, alpha=alpha, plausibility=plausibility)
        self.reset()

    @classmethod
    def classifier_free_guidance(
        cls,
        model: Any,
        guidance_scale: float,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **branch: Any,
    ) -> ContrastiveLogitsProcessor:
        """Sanchez et al., arXiv 2306.17806: ``z = z_n + guidance_scale (z_p - z_n)``.

        ``guidance_scale`` is the paper's and that of transformers' text classes: 1 is no guidance.
        (``DiaClassifierFreeGuidanceLogitsProcessor`` calls guidance_scale what is one less.)
        Without a negative prompt the negative side sees the prompt's last token alone.
        """
        alone = negative_prompt_ids is None
        negative = ContrastiveBranch(
            model,
            negative_prompt_ids,
            negative_prompt_attention_mask,
            last_token=alone,
            name="negative_prompt_ids",
            **branch,
        )
        return cls(negative, alpha=guidance_scale - 1.0)

    @classmethod
    def context_aware(
        cls,
        model: Any,
        no_context_ids: Tensor,
        no_context_attention_mask: Tensor | None = None,
        *,
        alpha: float = 0.5,
        **branch: Any,
    ) -> ContrastiveLogitsProcessor:
        """CAD (Shi et al., NAACL 2024): ``z = (1 + alpha) z_context - alpha z_question``.

        ``generate`` gets context and question, this class the question alone.
        """
        negative = ContrastiveBranch(
            model, no_context_ids, no_context_attention_mask, name="no_context_ids", **branch
        )
        return cls(negative, alpha=alpha)

    @classmethod
    def visual_contrastive(
        cls,
        model: Any,
        model_inputs: Mapping[str, Any] | None = None,
        *,
        cd_alpha: float = 0.5,
        cd_beta: float | None = 0.1,
        **branch: Any,
    ) -> ContrastiveLogitsProcessor:
        """VCD (Leng et al., CVPR 2024): ``z = (1 + cd_alpha) z - cd_alpha z_distorted``, masked.

        The prompt is ``generate``'s own; ``model_inputs`` are the distorted picture's inputs, a row
        for each prompt. Only tokens with ``z >= max(z) + log(cd_beta)`` stay. Not for models with
        positions in several dimensions (M-RoPE, as Qwen2-VL) or that take the patches of all
        pictures in one flat tensor: positions count along the text here, rows are prompts.
        """
        negative = ContrastiveBranch(model, model_inputs=model_inputs, **branch)
        return cls(negative, alpha=cd_alpha, plausibility=cd_beta)

    @classmethod
    def dexperts(
        cls,
        expert: Any,
        antiexpert: Any,
        attention_mask: Tensor | None = None,
        *,
        alpha: float = 1.0,
        **branch: Any,
    ) -> ContrastiveLogitsProcessor:
        """DExperts (Liu et al., ACL 2021): ``z = z_base + alpha (z_expert - z_antiexpert)``.

        The model that generates is the base. Proxy tuning (Liu et al., COLM 2024) is this with a
        small tuned expert, the same model untuned as antiexpert, and ``alpha=1``.
        """
        positive = ContrastiveBranch(expert, None, attention_mask, **branch)
        negative = ContrastiveBranch(antiexpert, None, attention_mask, **branch)
        return cls(negative, alpha=alpha, positive=positive)

    @classmethod
    def self_contrastive(
        cls,
        model: Any,
        safety_input_ids: Tensor,
        safety_attention_mask: Tensor | None = None,
        *,
        ratio: float = 2.5,
        **branch: Any,
    ) -> ContrastiveLogitsProcessor:
        """Self-CD: ``generate`` gets the question, this class the question with the safety prompt.

        For beams and the like; else ``SelfContrastiveDecoding`` is the faster way.
        """
        check_ratio(ratio)
        negative = ContrastiveBranch(
            model, safety_input_ids, safety_attention_mask, name="safety_input_ids", **branch
        )
        return cls(negative, alpha=ratio - 1.0)

    def reset(self) -> None:
        """Take the next call's ids as a new prompt, whatever they are."""
        self._seen: Tensor | None = None
        self._prompt_width = 0
        for branch in self._branches():
            branch.reset()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities (R, V) of the contrast, after ids (R, T) and scores (R, V)."""
        source = self._source(input_ids)
        if source is None:
            self._prompt_width, self._seen = input_ids.shape[1], None
        one_more = self._seen is not None and input_ids.shape[1] == self._seen.shape[1] + 1
        in_place = source is not None and torch.equal(source, torch.arange(len(source)))
        logits = {}
        try:
            for branch in self._branches():
                if one_more and branch.is_under_way:
                    order = None if in_place else source
                    logits[branch] = branch.go_on(input_ids[:, -1], order)
                else:
                    logits[branch] = branch.start(input_ids, self._prompt_width)
        except BaseException:
            # A cache that half a step has gone into fits no ids; the next call makes a new one.
            for branch in self._branches():
                branch.reset()
            raise
        self._seen = input_ids.clone()
        rows = {branch: self._as_scores(value, scores) for branch, value in logits.items()}
        z = contrastive_logits(
            scores if self.positive is None else rows[self.positive],
            rows[self.negative],
            alpha=self.alpha,
            anchor=None if self.positive is None else scores,
            plausibility=self.plausibility,
            impl=self.impl,
        )
        return torch.log_softmax(z, -1)

    def _branches(self) -> list[ContrastiveBranch]:
        return [self.negative] if self.positive is None else [self.positive, self.negative]

    def _source(self, ids: Tensor) -> Tensor | None:
        """Which row of the last call each row continues, (R,) on the CPU; None for a new prompt."""
        seen, (rows, width) = self._seen, ids.shape
        if seen is None or len(seen) != rows:
            return None
        if not self._prompt_width < width <= seen.shape[1] + 1:
            return None
        before, now = seen[:, : width - 1].to(ids.device), ids[:, :-1]
        if torch.equal(before, now):
            return torch.arange(rows)
        # Beams have changed places, or one has become two. Rows of one history and one label have
        # one context; two prompts of one batch may have the same history by chance.
        labels = torch.cat([branch.labels(rows, ids.device) for branch in self._branches()], 1)
        known = torch.cat([torch.cat([labels, part], 1) for part in (before, now)])
        _, kind = torch.unique(known, dim=0, return_inverse=True)
        first = torch.full((2 * rows,), rows, device=ids.device)
        places = torch.arange(rows, device=ids.device)
        first.scatter_reduce_(0, kind[:rows], places, "amin")
        source = first[kind[rows:]].cpu()
        return None if bool((source == rows).any()) else source

    def _as_scores(self, logits: Tensor, scores: Tensor) -> Tensor:
        if logits.shape != scores.shape:
            raise ValueError(
                f"scores must have the rows and vocabulary of the contrasted model's logits "
                f"{tuple(logits.shape)}, got {tuple(scores.shape)}; the models need one vocabulary"
            )
        return logits.to(scores)


def _repeat(name: str, value: Tensor, rows: int) -> Tensor:
    """Each row repeated, in the order of ``generate``, to so many rows."""
    if len(value) == 0 or rows % len(value):
        raise ValueError(
            f"{name} must have a number of rows that divides the {rows} of generate, got "
            f"{len(value)}; one row per prompt, or one for all"
        )
    return value.repeat_interleave(rows // len(value), 0)
