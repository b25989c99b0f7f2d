"""Capability Salience Vector: which tokens of a validation text tell what a language model can do.

Ge et al., "Capability Salience Vector: Fine-grained Alignment of Loss and Capabilities for Downstream
Task Scaling Law", ACL 2025 (long.1157), arXiv 2506.13216. Two data mixtures can give two models the same
mean loss and different accuracies; the mean hides which tokens each of them has learnt. The paper weighs
the tokens per capability, so that the weighted loss, through a sigmoid, gives the accuracy.

For model m, token n with NLL ``l_{m,n}`` and capability (benchmark) c::

    S_c(m) = sum_n w_{c,n} l_{m,n}                                          capability score
    a_c(m) = gamma_c + (1 - gamma_c) sigmoid(alpha_c (S_c(m) - beta_c))     predicted accuracy

Sure, from the paper's abstract: the overall loss is decomposed and tokens get different importance weights
per meta-capability, to align validation loss with downstream accuracy. From texts that report on it, not
from its own: the two formulas above, and Levenberg-Marquardt as the solver of the law. The full text was
not available to us, so the following is our reading, each item an argument where it can be:

- ``w_c = softmax(u_c)`` over the tokens: not negative, sums to one, ``S`` stays in nats per token, and
  ``u = 0`` is the mean loss, so that the ordinary loss-to-accuracy law is nested (``regularization=inf``);
- models are far fewer than tokens, so free weights fit any accuracies: KL(w || uniform) is penalised;
- gamma is the chance level, given (``floor``) or fitted; alpha <= 0, more loss is less accuracy
  (``decreasing``);
- the fit minimises ``(1 - R2) + regularization * KL`` per capability: one nat of concentration must buy
  ``regularization`` of training R2.

The free weights need no table of N numbers while they are fitted. Setting the objective's gradient in w to
zero gives ``log w_n = -1/regularization * sum_m (dF/dS_m) l_{m,n} + const``: at every stationary point the
log-weights are a combination of the matrix's M rows. M numbers per capability hold the exact solution,
and Levenberg-Marquardt fits them together with the law (``salience_solver``).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from trimtab.algorithms.salience_solver import Block, LawFit, Task, solve

__all__ = [
    "CapabilitySalience",
    "HeadWeights",
    "RegularizationChoice",
    "TableWeights",
    "TokenWeights",
    "choose_regularization",
    "row_token_ids",
    "token_nll",
]


class TokenWeights(Protocol):
    """A model of the token weights whose log is linear in P parameters: ``w = softmax(basis^T p)``.

    Write your own by giving a class these two members, and pass an instance as ``weights=``. Fitting costs
    ``2 P (P + M) N`` FLOP a step and capability, so keep P at some hundreds.
    """

    transfers: bool
    """Whether the weights of another text follow from its features; then ``basis`` must not use ``nll``."""

    def basis(
        self,
        nll: Tensor,  # (M, n)
        features: Tensor | None,  # (n, F)
    ) -> Tensor:  # (P, n)
        """Basis of a block of n tokens; ``nll`` is centred over the models of the fit."""
        ...


class TableWeights:
    """One free weight per token (``weights="table"``), held by M numbers: the basis is the matrix."""

    transfers = False

    def basis(self, nll: Tensor, features: Tensor | None) -> Tensor:
        """The centred NLL itself."""
        return nll


class HeadWeights:
    """A linear head on features of the tokens (``weights="head"``), for instance a frozen LM's hidden states."""

    transfers = True

    def basis(self, nll: Tensor, features: Tensor | None) -> Tensor:
        """The features."""
        if features is None:
            raise ValueError("features must be given with weights='head', got None; pass (N, F) features")
        return features.mT


class _Matrix:
    """Rows by tokens of a tensor, array or memmap, handed out as blocks of float32 (float64 if it is)."""

    def __init__(self, values: Any, name: str, rows: Tensor | None = None) -> None:
        floating = values.is_floating_point() if isinstance(values, Tensor) else (
            isinstance(values, np.ndarray) and values.dtype.kind == "f"
        )
        if not floating:
            kind = getattr(values, "dtype", type(values).__name__)
            raise TypeError(f"{name} must be a floating tensor or NumPy array, got {kind}; convert it")
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(
                f"{name} must be a matrix with at least one entry, got shape {tuple(values.shape)}; "
                "stack one row per model"
            )
        self.values, self.name, self.rows = values, name, rows
        self.shape = (values.shape[0] if rows is None else len(rows), values.shape[1])
        double = values.dtype in (torch.float64, np.dtype(np.float64))
        self.dtype = torch.float64 if double else torch.float32
        self.device = values.device if isinstance(values, Tensor) else torch.device("cpu")

    def columns(self, low: int, high: int) -> Tensor:
        block = self.values[:, low:high]
        if self.rows is not None:
            block = block[self.rows.to(self.device) if isinstance(block, Tensor) else self.rows.numpy()]
        if isinstance(block, Tensor):
            return block.to(self.dtype)
        return torch.from_numpy(np.array(block, dtype=str(self.dtype)[6:]))
