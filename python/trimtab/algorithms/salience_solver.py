"""Solver behind ``CapabilitySalience``: Levenberg-Marquardt on the weights' parameters and the law together.

For one capability, with D the NLL matrix centred over the models of the fit, token by token::

    F(p, law) = sum_m (a_m - y_m)**2 / sum_m (y_m - mean y)**2  +  regularization * KL(w || uniform)
    w = softmax(basis^T p),   a_m = gamma + (1 - gamma) sigmoid(alpha (D w)_m + offset)

Centring loses nothing: a token that is hard for every model alike moves every score by the same amount, which
``offset`` absorbs. One pass over the matrix, in blocks of tokens, gives all that a step needs for all capabilities:
the scores, KL, and the weighted covariances ``Cov_w(basis, basis)`` and ``Cov_w(D, basis)``, through which KL and
the scores move when p does. The step itself is a linear system of P + 3 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Block = tuple[Tensor, Tensor, Tensor]  # centred NLL (M, n), its mean over models (n,), basis (P, n)

_LAST_GAMMA = 0.999  # gamma < 1, or the law is flat


class Moments(NamedTuple):
    """What one pass over the matrix says about B weight vectors; float64, on the CPU."""

    score: Tensor  # (B, M) weighted mean of the centred NLL
    level: Tensor  # (B,) weighted mean of the mean NLL over models
    kl: Tensor  # (B,) KL(w || uniform) in nats
    log_norm: Tensor  # (B,) log sum_n exp(u_n)
    basis_mean: Tensor  # (B, P)
    basis_cov: Tensor  # (B, P, P)
    cross_cov: Tensor  # (B, M, P)
    eps: float  # rounding of the sums: eigenvalues of basis_cov below eps * the largest are noise


def moments(blocks: Iterator[Block], params: Tensor) -> Moments:  # params (B, P)
    """Moments under ``w = softmax(basis^T params)``, with a running maximum as in online softmax.

    Cost: one read of the matrix and ``2 B P (P + M) N`` FLOP (half of it where the basis is the matrix itself).
    """
    peak = torch.full((len(params),), -torch.inf, dtype=torch.float64)
    total: list[Tensor] = []
    count, eps = 0, 0.0
    for contrast, mean, basis in blocks:
        u = params.to(basis) @ basis  # (B, n)
        new_peak = torch.maximum(peak, u.amax(1).cpu().double())
        sums = _block_sums(contrast, mean, basis, torch.exp(u - new_peak.to(u)[:, None]))
        keep = torch.exp(peak - new_peak)
        old = total or [torch.zeros_like(s) for s in sums]
        total = [
            torch.addcmul(new, keep.view(-1, *[1] * (new.ndim - 1)), was)
            for new, was in zip(sums, old, strict=True)
        ]
        peak, count, eps = new_peak, count + u.shape[1], torch.finfo(u.dtype).eps
    mass, level, score, basis_mean, basis_cov, cross_cov = total
    score, basis_mean = score / mass[:, None], basis_mean / mass[:, None]
    log_norm = peak + mass.log()
    return Moments(
        score=score,
        level=level / mass,
        kl=(params * basis_mean).sum(1) - log_norm + math.log(count),
        log_norm=log_norm,
        basis_mean=basis_mean,
        basis_cov=basis_cov / mass[:, None, None] - basis_mean[:, :, None] * basis_mean[:, None],
        cross_cov=cross_cov / mass[:, None, None] - score[:, :, None] * basis_mean[:, None],
        eps=eps,
    )


def _block_sums(contrast: Tensor, mean: Tensor, basis: Tensor, e: Tensor) -> list[Tensor]:
    """Sums over one block's tokens, weighted by ``e`` (B, n)."""
    (size, width), rank = e.shape, len(basis)
    weighted = (e[:, None] * basis).view(size * rank, width)
    basis_sum = e @ basis.mT
    basis_cov = (weighted @ basis.mT).view(size, rank, rank)
    if contrast is basis:
        score, cross = basis_sum, basis_cov
    else:
        score = e @ contrast.mT
        cross = (weighted @ contrast.mT).view(size, rank, -1).mT
    return [s.cpu().double() for s in (e.sum(1), e @ mean, score, basis_sum, basis_cov, cross)]


def law_value(theta: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:  # (3,), (M,) -> (M,), (M, 3)
    """``a = gamma + (1 - gamma) sigmoid(alpha score + offset)`` and its gradient in (alpha, offset, gamma).

    The gradient in ``score`` is ``alpha`` times the one in ``offset``.
    """
    alpha, offset, gamma = theta
    z = alpha * score + offset
    rise, fall = torch.sigmoid(z), torch.sigmoid(-z)
    slope = (1 - gamma) * rise * fall
    return gamma + (1 - gamma) * rise, torch.stack([slope * score, slope, fall], 1)


@dataclass
class LawFit:
    """The law of one capability: what it is fitted to, and what it may be."""

    accuracy: Tensor  # (M,) float64
    floor: float
    fit_floor: bool
    decreasing: bool
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        spread = float((self.accuracy - self.accuracy.mean()).square().sum())
        self.scale = 1.0 / spread if spread > 0 else 1.0
        self.free = torch.tensor([0, 1, 2] if self.fit_floor else [0, 1])

    def loss(self, theta: Tensor, score: Tensor) -> float:
        """``1 - R2`` on the models of the fit."""
        return float((law_value(theta, score)[0] - self.accuracy).square().sum()) * self.scale

    def move(self, theta: Tensor, step: Tensor) -> Tensor:
        """``theta`` plus a step of its free entries, back on the allowed side of its bounds."""
        alpha, offset, gamma = theta.index_add(0, self.free, step)
        alpha = alpha.clamp(max=0.0) if self.decreasing else alpha
        return torch.stack([alpha, offset, gamma.clamp(0.0, _LAST_GAMMA)])

    def start(self, score: Tensor) -> Tensor:
        """Linear regression of the accuracy's logit on the score, which is centred."""
        y = ((self.accuracy - self.floor) / (1 - self.floor)).clamp(0.02, 0.98).logit()
        alpha = (score * y).sum() / score.square().sum().clamp(min=1e-300)
        alpha = alpha.clamp(max=0.0) if self.decreasing else alpha
        return torch.stack([alpha, y.mean(), y.new_tensor(self.floor)])

    def polish(self, theta: Tensor, score: Tensor) -> tuple[Tensor, float]:
        """Levenberg-Marquardt on the law alone, to convergence; it touches M numbers, not the matrix."""
        loss, damping = self.loss(theta, score), 1e-3
        for _ in range(200):
            value, jacobian = law_value(theta, score)
            jacobian = jacobian[:, self.free]
            gradient, normal = jacobian.mT @ (value - self.accuracy), jacobian.mT @ jacobian
            step = -_solve(normal, damping * normal.diagonal(), gradient)
            trial = self.move(theta, step)
            trial_loss = self.loss(trial, score)
            if trial_loss < loss:
                gain, theta, loss, damping = loss - trial_loss, trial, trial_loss, damping / 8
                if gain < 1e-13:
                    break
            elif damping > 1e8:
                break
            else:
                damping *= 8
        return theta, loss


def _solve(normal: Tensor, damping: Tensor, right: Tensor) -> Tensor:
    """Solution of the damped normal equations; a direction without any curvature stays where it is."""
    diagonal = damping + 1e-14 * normal.diagonal().max() + 1e-300
    return torch.linalg.solve(normal + diagonal.diag(), right)


@dataclass
class Task:
    """One capability on its way: where it stands, and what the matrix says there."""

    law: LawFit
    regularization: float
    params: Tensor  # (P,)
    theta: Tensor  # (3,) alpha, offset, gamma on the centred score
    at: Moments  # of this capability alone, without the leading B
    objective: float
    damping: float = 1e-2
    steps: int = 0
    done: bool = False

    def propose(self) -> tuple[Tensor, Tensor]:
        """One damped Gauss-Newton step of the parameters and the law.

        In the coordinates z that whiten ``Cov_w(basis, basis)``, KL(w || uniform) has the identity as its
        Gauss-Newton matrix, so the damping is a trust region in KL. For a table of weights the terms left out cancel
        at the optimum, and the last steps converge about as fast as Newton's.
        """
        values, vectors = torch.linalg.eigh(self.at.basis_cov)
        seen = values > self.at.eps * values[-1]
        whiten = vectors[:, seen] / values[seen].sqrt()  # p = whiten @ z
        accuracy, jacobian = law_value(self.theta, self.at.score)
        by_score = self.theta[0] * jacobian[:, 1:2]
        jacobian = torch.cat(
            [by_score * (self.at.cross_cov @ whiten), jacobian[:, self.law.free]], 1
        )
        gradient = jacobian.mT @ (accuracy - self.law.accuracy) * self.law.scale
        normal = jacobian.mT @ jacobian * self.law.scale
        rank = whiten.shape[1]
        gradient[:rank] += (
            0.5 * self.regularization * (whiten.mT @ (self.at.basis_cov @ self.params))
        )
        extra = self.damping * normal.diagonal()
        extra[:rank] = 0.5 * self.regularization + self.damping
        step = -_solve(normal, extra, gradient)
        return self.params + whiten @ step[:rank], self.law.move(self.theta, step[rank:])

    def take(self, params: Tensor, theta: Tensor, at: Moments, tolerance: float) -> None:
        """Moves to a proposal if the objective falls there, with the law fitted anew."""
        theta, loss = self.law.polish(theta, at.score)
        objective = loss + self.regularization * float(at.kl)
        self.steps += 1
        if objective < self.objective:
            self.done = self.objective - objective < tolerance
            self.params, self.theta, self.at, self.objective = params, theta, at, objective
            self.damping /= 8
        else:
            self.damping *= 8
            self.done = self.damping > 1e4


def _one(at: Moments, index: int) -> Moments:
    return Moments(*(part[index] for part in at[:-1]), at.eps)


def solve(
    read: Callable[[int], Iterator[Block]],
    laws: Sequence[LawFit],
    regularization: Sequence[float],
    start: Tensor,  # (C, P)
    *,
    steps: int,
    tolerance: float,
) -> list[Task]:
    """Fits all capabilities side by side; each pass over the matrix serves those that have not converged.

    Args:
        read: gives the blocks of one pass; its argument is how many weight vectors share the pass.
        laws: one per capability.
        regularization: one per capability; infinite keeps its weights at ``start``.
        start: parameters to start from, zeros for uniform weights.
        steps: most passes after the first.
        tolerance: a step that lowers the objective, which is on the scale of R2, by less is the last one.
    """
    at = moments(read(len(laws)), start)
    if not bool(torch.isfinite(at.score).all() and torch.isfinite(at.level).all()):
        raise ValueError("nll must be finite, got NaN or infinity; leave out such tokens or models")
    tasks = []
    for index, (law, strength) in enumerate(zip(laws, regularization, strict=True)):
        here = _one(at, index)
        theta, loss = law.polish(law.start(here.score), here.score)
        objective = loss + (strength * float(here.kl) if math.isfinite(strength) else 0.0)
        task = Task(law, strength, start[index], theta, here, objective, done=math.isinf(strength))
        if not task.done and law.decreasing and theta[0] == 0:
            # A flat law gives the weights no gradient: look for tokens whose loss falls where accuracy rises.
            spread = here.score.square().mean().sqrt().clamp(min=1e-300)
            task.theta = torch.stack([-1.0 / spread, theta[1], theta[2]])
        tasks.append(task)
    for _ in range(steps):
        active = [task for task in tasks if not task.done]
        if not active:
            break
        proposals = [task.propose() for task in active]
        at = moments(read(len(active)), torch.stack([params for params, _ in proposals]))
        for index, (task, (params, theta)) in enumerate(zip(active, proposals, strict=True)):
            task.take(params, theta, _one(at, index), tolerance)
    return tasks
