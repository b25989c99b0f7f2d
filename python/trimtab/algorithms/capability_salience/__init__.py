"""Capability Salience Vector: which tokens of a validation text tell what a language model can do.

Ge et al., "Capability Salience Vector: Fine-grained Alignment of Loss and Capabilities for
Downstream Task Scaling Law", ACL 2025 (long.1157), arXiv 2506.13216. Two data mixtures can give two
models the same mean loss and different accuracies: the mean hides which tokens each has learnt. The
paper weighs the tokens, per capability, so that the weighted loss gives the accuracy.

For model m, token n with NLL ``l_{m,n}``, and capability (benchmark) c::

    S_c(m) = sum_n w_{c,n} l_{m,n}                                        capability score
    a_c(m) = gamma_c + (1 - gamma_c) sigmoid(alpha_c (S_c(m) - beta_c))   predicted accuracy

Sure, from the paper's abstract: the overall loss is decomposed, and tokens get different importance
weights per meta-capability, so as to align validation loss with downstream accuracy. From texts
that report on the paper: the two formulas, and Levenberg-Marquardt as a solver. Its full text was
not available to us, so what follows is our reading, each choice an argument where it can be one:

- ``w_c = softmax(u_c)`` over the tokens (``weights``): not negative, and S stays in nats per token.
  ``u = 0`` is the mean loss, so the ordinary law from loss to accuracy is nested
  (``regularization=math.inf``).
- Models are far fewer than tokens, so free weights would fit any accuracies. The fit minimises
  ``(1 - R2) + regularization * KL(w_c || uniform)``: each nat of concentration must buy
  ``regularization`` of the training R2.
- gamma is the level of chance, given or fitted (``floor``, ``fit_floor``). alpha <= 0, more loss is
  less accuracy (``decreasing``).

Free weights do not need N free numbers. Where the gradient of the objective in w is zero,
``log w_n = -(1 / regularization) sum_m (dF/dS_m) l_{m,n} + const``: at every stationary point the
log-weights are a combination of the M rows of the matrix. So M numbers per capability hold the
exact solution, and Levenberg-Marquardt fits them together with the law (``solver``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.algorithms.capability_salience.solver import LawFit, solve
from trimtab.algorithms.capability_salience.token_rows import row_token_ids, token_nll
from trimtab.algorithms.capability_salience.token_weights import (
    HeadWeights,
    TableWeights,
    TokenBlocks,
    TokenMatrix,
    TokenWeights,
    feature_matrix,
)

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

_WEIGHTS: dict[str, type[TokenWeights]] = {"table": TableWeights, "head": HeadWeights}


class CapabilitySalience:
    """Token weights, and the sigmoidal law from weighted loss to accuracy, of C capabilities.

    Cost of ``fit``: some ten passes over the matrix, shared by all capabilities, each
    ``2 C M**2 N`` FLOP with the table; nothing of the matrix's size is allocated. Measured with 100
    models, 1,000,000 tokens, 6 capabilities in float32: 8 steps, 13 s of one AVX-512 core, peak
    resident memory of the whole process 0.76 GiB, of which 0.37 are the matrix. Deterministic: the
    same inputs on the same machine give the same bits.

    The mean-loss law, the baseline of the same class, is ``regularization=math.inf``.

    Args:
        n_capabilities: C.
        floor: gamma, the accuracy of chance (0.25 for four choices); a number or one each.
        fit_floor: fit gamma too, starting from ``floor``.
        regularization: training R2 that one nat of KL(w || uniform) must buy; a positive number or
            one each. ``choose_regularization`` finds it by cross-validation.
        decreasing: hold alpha <= 0. (Its size is bounded too: 100 logits over the spread of a
            token's NLL between models, or ten times the mean-loss law's alpha if that is more.)
        weights: "table" (one weight per token of this text), "head" (a linear head on features,
            which weighs new text as well), or your own ``TokenWeights``.
        steps: most steps of the solver, each one pass over the matrix. A fit takes about ten.
        tolerance: the fit ends when a step would lower the objective, on the scale of R2, by less.

    Attributes:
        salience: weights (C, N), each row sums to 1.
        params: parameters of the weights (C, P), float64; of the table, one per model.
        alpha, beta, gamma: the law (C,), float64. A flat law (alpha 0) has an infinite beta.
        kl: KL(w || uniform) in nats (C,), float64.
        objective: (C,) ``(1 - R2) + regularization * kl`` on the models of the fit, float64.
        steps_taken: (C,) int64.
    """

    salience: Tensor
    params: Tensor
    alpha: Tensor
    gamma: Tensor
    kl: Tensor
    objective: Tensor
    steps_taken: Tensor
    _offset: Tensor  # (C,) of the raw score: -alpha * beta

    def __init__(
        self,
        n_capabilities: int = 1,
        *,
        floor: float | Sequence[float] | Tensor = 0.0,
        fit_floor: bool = False,
        regularization: float | Sequence[float] | Tensor = 0.03,
        decreasing: bool = True,
        weights: str | TokenWeights = "table",
        steps: int = 50,
        tolerance: float = 1e-7,
    ) -> None:
        if n_capabilities < 1:
            raise ValueError(
                f"n_capabilities must be at least 1, got {n_capabilities}; one per task"
            )
        if isinstance(weights, str) and weights not in _WEIGHTS:
            raise ValueError(
                f"weights must be 'table', 'head' or an object, got {weights!r}; see TokenWeights"
            )
        if steps < 0 or tolerance < 0:
            raise ValueError(
                f"steps and tolerance must not be negative, got {steps} and {tolerance}; "
                "leave them out for the defaults"
            )
        self.n_capabilities = n_capabilities
        self.floor = _per_capability(floor, n_capabilities, "floor")
        if any(not 0.0 <= value < 1.0 for value in self.floor):
            raise ValueError(
                f"floor must be in [0, 1), got {self.floor}; give chance as a fraction"
            )
        self.regularization = _per_capability(regularization, n_capabilities, "regularization")
        if any(not value > 0.0 for value in self.regularization):
            raise ValueError(
                f"regularization must be positive, got {self.regularization}; free weights fit any "
                "accuracies without it (math.inf is the mean-loss law)"
            )
        self.fit_floor, self.decreasing = fit_floor, decreasing
        self.steps, self.tolerance = steps, tolerance
        self.weights = weights
        self._provider: TokenWeights = _WEIGHTS[weights]() if isinstance(weights, str) else weights

    @property
    def beta(self) -> Tensor:  # (C,)
        """Score at the law's inflection, in nats per token."""
        return -self._offset / self.alpha

    def fit(self, nll: Any, accuracy: Any, *, features: Any = None) -> CapabilitySalience:
        """Fits the weights and the law.

        Args:
            nll: (M, N) rows of ``token_nll``, float16, bfloat16, float32 or float64; a tensor on
                any device, an array or a memmap. Read in blocks of tokens; computed in float32
                (float64 for float64). A constant added to a token's column changes only beta.
            accuracy: (M,) or (M, C), in [0, 1].
            features: (N, F) for weights that need them.

        Raises:
            ValueError: shapes do not fit, nll is not finite, or accuracy is not in [0, 1].
            TypeError: nll or features are not floating numbers.
        """
        matrix = TokenMatrix(nll, "nll")
        return self._fit(matrix, self._check_accuracy(accuracy, matrix.shape[0]), features)

    def _laws(self, accuracy: Tensor) -> list[LawFit]:
        return [
            LawFit(accuracy[:, c].contiguous(), self.floor[c], self.fit_floor, self.decreasing)
            for c in range(self.n_capabilities)
        ]

    @torch.no_grad()
    def _fit(self, matrix: TokenMatrix, accuracy: Tensor, features: Any) -> CapabilitySalience:
        blocks = TokenBlocks(matrix, self._provider, features)
        tasks = solve(
            blocks.read,
            self._laws(accuracy),
            self.regularization,
            blocks.rank,
            steps=self.steps,
            tolerance=self.tolerance,
        )
        late = [c for c, task in enumerate(tasks) if not task.done]
        if late and self.steps:
            warnings.warn(
                f"the fit of capabilities {late} has not converged; raise steps", stacklevel=3
            )
        theta = torch.stack([task.theta for task in tasks])
        level = torch.stack([task.at.level for task in tasks])
        scaled = torch.stack([task.params for task in tasks])
        self.params = scaled / blocks.scale
        self.alpha, self.gamma = theta[:, 0].clone(), theta[:, 2].clone()
        self._offset = theta[:, 1] - self.alpha * level
        self.kl = torch.stack([task.at.kl for task in tasks])
        self.objective = torch.tensor([task.objective for task in tasks], dtype=torch.float64)
        self.steps_taken = torch.tensor([task.steps for task in tasks])
        self.salience = blocks.weights(scaled, torch.stack([task.at.log_norm for task in tasks]))
        return self

    @torch.no_grad()
    def weigh(self, features: Any) -> Tensor:
        """Weights (C, N') of a new text from its ``features`` (N', F); each row sums to 1."""
        self._check_fitted()
        if not self._provider.transfers:
            raise ValueError(
                "features must be None for weights that belong to one text, got features; fit with "
                "weights='head' to weigh new text"
            )
        matrix = feature_matrix(features)
        no_nll = torch.empty(0, 0)
        parts = [
            self.params @ self._provider.basis(no_nll, part.mT).cpu().double()
            for _, part in matrix.blocks()
        ]
        u = torch.cat(parts, 1)
        return torch.softmax(u, 1).to(self.salience.dtype)

    def score(self, nll: Any, *, features: Any = None) -> Tensor:  # (M', C)
        """Capability score of each model in nats per token, on the text of the fit or a new one.

        Args:
            nll: (M', N) on the tokens of the fit, or with ``features`` (M', N') on others.
            features: (N', F) of the new text.

        Returns:
            float32 on the CPU, float64 for float64 nll.
        """
        return self._score(TokenMatrix(nll, "nll"), features)

    @torch.no_grad()
    def _score(self, matrix: TokenMatrix, features: Any) -> Tensor:
        self._check_fitted()
        weights = self.salience if features is None else self.weigh(features)
        if matrix.shape[1] != weights.shape[1]:
            raise ValueError(
                f"nll must have one column per weighed token ({weights.shape[1]}), got "
                f"{matrix.shape[1]}; evaluate the models on the same text, or pass its features"
            )
        total = torch.zeros(matrix.shape[0], self.n_capabilities, dtype=torch.float64)
        for low, part in matrix.blocks():
            total += (part @ weights[:, low : low + part.shape[1]].to(part).mT).cpu()
        if not bool(torch.isfinite(total).all()):
            raise ValueError("nll must be finite, got NaN or infinity; leave out such models")
        return total.to(matrix.dtype)

    def predict(self, nll: Any, *, features: Any = None) -> Tensor:  # (M', C)
        """Predicted accuracy of each model; arguments and dtype as in ``score``."""
        return self._law(self.score(nll, features=features))

    def _law(self, score: Tensor) -> Tensor:
        rise = torch.sigmoid(self.alpha * score.double() + self._offset)
        return (self.gamma + (1.0 - self.gamma) * rise).to(score.dtype)

    def calibrate(self, nll: Any, accuracy: Any, *, features: Any = None) -> CapabilitySalience:
        """Fits the law anew and leaves the weights: for another text, or another kind of model.

        Beta is a loss, and every text has its own: after weighing a new text, calibrate on models
        whose accuracy is known. Arguments as in ``score`` and ``fit``. The objective stays that of
        the fit.
        """
        score = self.score(nll, features=features).double()
        measured = self._check_accuracy(accuracy, len(score))
        level = score.mean(0)
        for c, law in enumerate(self._laws(measured)):
            centred = score[:, c] - level[c]
            theta, _ = law.polish(law.start(centred), centred)
            self.alpha[c], self.gamma[c] = theta[0], theta[2]
            self._offset[c] = theta[1] - theta[0] * level[c]
        return self

    def r2(self, nll: Any, accuracy: Any, *, features: Any = None) -> Tensor:  # (C,)
        """``1 - sum (a - y)**2 / sum (y - mean y)**2`` over these models; NaN if y is constant."""
        predicted = self.predict(nll, features=features).double()
        measured = self._check_accuracy(accuracy, len(predicted))
        spread = (measured - measured.mean(0)).square().sum(0)
        error = (predicted - measured).square().sum(0)
        return torch.where(spread > 0, 1.0 - error / spread, torch.nan)

    def mse(self, nll: Any, accuracy: Any, *, features: Any = None) -> Tensor:  # (C,)
        """Mean squared error of the predicted accuracy over these models."""
        predicted = self.predict(nll, features=features).double()
        return (predicted - self._check_accuracy(accuracy, len(predicted))).square().mean(0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes settings and result to one file of tensors and plain values."""
        self._check_fitted()
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings["weights"] = self.weights if isinstance(self.weights, str) else None
        torch.save({"settings": settings, **{k: getattr(self, k) for k in _RESULTS}}, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, weights: TokenWeights | None = None
    ) -> CapabilitySalience:
        """Reads what ``save`` wrote, without running code from the file.

        Args:
            path: the file.
            weights: your own ``TokenWeights``, if it was fitted with one.
        """
        state = torch.load(path, weights_only=True)
        settings = state.pop("settings")
        kind = settings["weights"]
        if (kind is None) != (weights is not None):
            wanted = "left out" if kind else "the object of the fit"
            raise ValueError(
                f"weights must be {wanted}, got {weights!r}; the file holds {kind or 'own'} weights"
            )
        loaded = cls(**{**settings, "weights": kind or weights})
        for name, value in state.items():
            setattr(loaded, name, value)
        return loaded

    def _check_fitted(self) -> None:
        if not hasattr(self, "salience"):
            raise RuntimeError("fit must be called first, got an unfitted CapabilitySalience")

    def _check_accuracy(self, accuracy: Any, models: int) -> Tensor:  # (M, C)
        table = torch.as_tensor(accuracy).detach().cpu().double()
        table = table[:, None] if table.ndim == 1 else table
        if table.shape != (models, self.n_capabilities):
            raise ValueError(
                f"accuracy must have shape {(models, self.n_capabilities)} (models, capabilities), "
                f"got {tuple(table.shape)}; set n_capabilities to the number of columns"
            )
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(
                f"accuracy must be in [0, 1], got {float(table.min())} to {float(table.max())}; "
                "divide percentages by 100 and leave out models without a measurement"
            )
        return table


_SETTINGS = (
    "n_capabilities", "floor", "fit_floor", "regularization", "decreasing", "steps", "tolerance",
)  # fmt: skip
_RESULTS = (
    "salience", "params", "alpha", "gamma", "kl", "objective", "steps_taken", "_offset",
)  # fmt: skip


def _per_capability(value: float | Sequence[float] | Tensor, count: int, name: str) -> list[float]:
    values = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    if len(values) not in (1, count):
        raise ValueError(
            f"{name} must be one number or {count} of them, got {len(values)}; one per capability"
        )
    return values * count if len(values) == 1 else values


class RegularizationChoice(NamedTuple):
    """What ``choose_regularization`` found."""

    regularization: Tensor
    """Best of the grid per capability (C,); ``math.inf`` where the mean-loss law predicts best."""
    grid: Tensor
    """The values tried (G,), largest first."""
    mse: Tensor
    """Mean squared error on held-out models (G, C)."""


def choose_regularization(
    nll: Any,  # (M, N)
    accuracy: Any,  # (M,) or (M, C)
    *,
    grid: Sequence[float] = (float("inf"), 0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
    folds: int | Tensor = 5,
    features: Any = None,
    **settings: Any,
) -> RegularizationChoice:
    """Cross-validation of the regularization over models, per capability.

    Pass the result on as ``CapabilitySalience(..., regularization=choice.regularization)``.

    Args:
        nll: as in ``fit``.
        accuracy: as in ``fit``.
        grid: values to try; infinity is the mean-loss law.
        folds: how many folds, model m falling in fold ``m % folds`` (M of them leave one out); or M
            labels, a fold each. Checkpoints of one run resemble each other: to learn what holds for
            a new run or data mixture, give the run's label and not a number.
        features: as in ``fit``.
        **settings: of ``CapabilitySalience``, other than the regularization.

    Cost: ``folds * len(grid)`` fits.
    """
    table = torch.as_tensor(accuracy)
    count = 1 if table.ndim == 1 else table.shape[-1]
    matrix = TokenMatrix(nll, "nll")
    models = matrix.shape[0]
    labels = torch.arange(models) % folds if isinstance(folds, int) else torch.as_tensor(folds)
    if labels.shape != (models,) or len(labels.unique()) < 2:
        raise ValueError(
            f"folds must be 2 to {models}, or {models} labels of at least two kinds, got {folds}; "
            "each fold is held out once"
        )
    values = sorted((float(value) for value in grid), reverse=True)
    error = torch.zeros(len(values), count, dtype=torch.float64)
    for label in labels.unique():
        held, kept = (labels == label).nonzero()[:, 0], (labels != label).nonzero()[:, 0]
        for index, value in enumerate(values):
            model = CapabilitySalience(count, regularization=value, **settings)
            measured = model._check_accuracy(table, models)
            model._fit(matrix.select(kept), measured[kept], features)
            predicted = model._law(model._score(matrix.select(held), None)).double()
            error[index] += (predicted - measured[held]).square().sum(0)
    best = torch.tensor(values, dtype=torch.float64)[error.argmin(0)]
    return RegularizationChoice(best, torch.tensor(values, dtype=torch.float64), error / models)
