"""Fused kernels for the small levers that steer language models, behind thin PyTorch functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimtab._version import __version__

if TYPE_CHECKING:
    from trimtab._choose import Choice
    from trimtab.algorithms.capability_salience import (
        CapabilitySalience,
        HeadWeights,
        TokenWeights,
        choose_regularization,
        row_token_ids,
        token_nll,
    )
    from trimtab.algorithms.gradient_projection import GradientProjection
    from trimtab.algorithms.inverse_q import (
        ClippedSurrogate,
        GivenPolicy,
        Imitation,
        InverseQ,
        InverseQConfig,
        InverseQTrainer,
        PrinciplePrompt,
        ReverseKL,
    )
    from trimtab.algorithms.olora import OLoRA
    from trimtab.algorithms.self_contrastive import (
        HELPFUL_PROMPT,
        SAFETY_PROMPT,
        ContrastiveBranch,
        ContrastiveLogitsProcessor,
        SelfContrastiveDecoding,
        self_contrastive_generate,
        self_contrastive_inputs,
    )
    from trimtab.integrations.peft import OLoRACallback
    from trimtab.ops import explain
    from trimtab.ops.contrast import (
        Sampled,
        contrastive_logits,
        contrastive_logp,
        contrastive_sample,
        linear_contrastive_logp,
        linear_contrastive_sample,
    )
    from trimtab.ops.orthogonal import orthogonal_penalty, project_out
    from trimtab.ops.token_loss import (
        LogpRatio,
        TokenLogp,
        TokenLossOptions,
        cross_entropy,
        linear_cross_entropy,
        linear_logp,
        linear_logp_ratio,
    )

_HOME = {
    "Choice": "trimtab._choose",
    "explain": "trimtab.ops",
    "Sampled": "trimtab.ops.contrast",
    "contrastive_logits": "trimtab.ops.contrast",
    "contrastive_logp": "trimtab.ops.contrast",
    "contrastive_sample": "trimtab.ops.contrast",
    "linear_contrastive_logp": "trimtab.ops.contrast",
    "linear_contrastive_sample": "trimtab.ops.contrast",
    "orthogonal_penalty": "trimtab.ops.orthogonal",
    "project_out": "trimtab.ops.orthogonal",
    "LogpRatio": "trimtab.ops.token_loss",
    "TokenLogp": "trimtab.ops.token_loss",
    "TokenLossOptions": "trimtab.ops.token_loss",
    "cross_entropy": "trimtab.ops.token_loss",
    "linear_cross_entropy": "trimtab.ops.token_loss",
    "linear_logp": "trimtab.ops.token_loss",
    "linear_logp_ratio": "trimtab.ops.token_loss",
    "CapabilitySalience": "trimtab.algorithms.capability_salience",
    "HeadWeights": "trimtab.algorithms.capability_salience",
    "TokenWeights": "trimtab.algorithms.capability_salience",
    "choose_regularization": "trimtab.algorithms.capability_salience",
    "row_token_ids": "trimtab.algorithms.capability_salience",
    "token_nll": "trimtab.algorithms.capability_salience",
    "GradientProjection": "trimtab.algorithms.gradient_projection",
    "OLoRA": "trimtab.algorithms.olora",
    "OLoRACallback": "trimtab.integrations.peft",
    "HELPFUL_PROMPT": "trimtab.algorithms.self_contrastive",
    "SAFETY_PROMPT": "trimtab.algorithms.self_contrastive",
    "ContrastiveBranch": "trimtab.algorithms.self_contrastive",
    "ContrastiveLogitsProcessor": "trimtab.algorithms.self_contrastive",
    "SelfContrastiveDecoding": "trimtab.algorithms.self_contrastive",
    "self_contrastive_generate": "trimtab.algorithms.self_contrastive",
    "self_contrastive_inputs": "trimtab.algorithms.self_contrastive",
    "ClippedSurrogate": "trimtab.algorithms.inverse_q",
    "GivenPolicy": "trimtab.algorithms.inverse_q",
    "Imitation": "trimtab.algorithms.inverse_q",
    "InverseQ": "trimtab.algorithms.inverse_q",
    "InverseQConfig": "trimtab.algorithms.inverse_q",
    "InverseQTrainer": "trimtab.algorithms.inverse_q",
    "PrinciplePrompt": "trimtab.algorithms.inverse_q",
    "ReverseKL": "trimtab.algorithms.inverse_q",
}

__all__ = [
    "HELPFUL_PROMPT",
    "SAFETY_PROMPT",
    "CapabilitySalience",
    "Choice",
    "ClippedSurrogate",
    "ContrastiveBranch",
    "ContrastiveLogitsProcessor",
    "GivenPolicy",
    "GradientProjection",
    "HeadWeights",
    "Imitation",
    "InverseQ",
    "InverseQConfig",
    "InverseQTrainer",
    "LogpRatio",
    "OLoRA",
    "OLoRACallback",
    "PrinciplePrompt",
    "ReverseKL",
    "Sampled",
    "SelfContrastiveDecoding",
    "TokenLogp",
    "TokenLossOptions",
    "TokenWeights",
    "__version__",
    "choose_regularization",
    "contrastive_logits",
    "contrastive_logp",
    "contrastive_sample",
    "cross_entropy",
    "explain",
    "linear_contrastive_logp",
    "linear_contrastive_sample",
    "linear_cross_entropy",
    "linear_logp",
    "linear_logp_ratio",
    "orthogonal_penalty",
    "project_out",
    "row_token_ids",
    "self_contrastive_generate",
    "self_contrastive_inputs",
    "token_nll",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
