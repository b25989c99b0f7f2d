"""Solver behind ``CapabilitySalience``: the weights' parameters and the law, fitted together.

For one capability, with D the NLL matrix centred over the models of the fit, token by token::

    F = sum_m (a_m - y_m)**2 / sum_m (y_m - mean y)**2  +  regularization * KL(w || uniform)
    w = softmax(basis^T p),   a_m = gamma + (1 - gamma) sigmoid(alpha (D w)_m + offset)

Centring loses nothing: a token that is hard for every model alike moves every score by the same
amount, which ``offset`` absorbs. One pass over the matrix, in blocks of tokens, gives all that a
step needs for all capabilities: the scores, KL, and the covariances ``Cov_w(basis, basis)`` and
``Cov_w(D, basis)`` under the weights, through which KL and the scores move when p does. The step
itself is a linear system of P + 3 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.algorithms.capability_salience.token_weights import Block

_LAST_GAMMA = 0.999  # gamma < 1, or the law is flat
_STEEPEST = 100.0  # logits
_FLAT = 0.95  # 1 - R2 of a mean-loss law that is as good as none


class Moments(NamedTuple):
    """What one pass over the matrix says about B weight vectors; float64, on the CPU."""

    score: Tensor  # (B, M) weighted mean of the centred NLL
    level: Tensor  # (B,) weighted mean of the mean NLL over models
    spread: Tensor  # (B,) root of the weighted mean of the centred NLL's square
    kl: Tensor  # (B,) KL(w || uniform) in nats
    log_norm: Tensor  # (B,) log sum_n exp(u_n)
    basis_mean: Tensor  # (B, P)
    basis_cov: Tensor  # (B, P, P)
    cross_cov: Tensor  # (B, M, P)
    eps: float  # rounding of the sums: eigenvalues of basis_cov below eps * the largest are noise

    def of(self, index: int) -> Moments:
        """Those of one of the B weight vectors, without the leading dimension."""
        return self._replace(**{name: getattr(self, name)[index] for name in self._fields[:-1]})


def moments(blocks: Iterator[Block], params: Tensor) -> Moments:  # params (B, P)
    """Moments under ``w = softmax(basis^T params)``, with a running maximum as in online softmax.

    Cost: one read of the matrix and ``2 B P (P + M) N`` FLOP, half of that with a table.
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
    mass, level, square, score, basis_mean, basis_cov, cross_cov = total
    score, basis_mean = score / mass[:, None], basis_mean / mass[:, None]
    log_norm = peak + mass.log()
    return Moments(
        score=score,
        level=level / mass,
        spread=(square / mass).sqrt(),
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
    square = e @ contrast.square().mean(0)
    sums = (e.sum(1), e @ mean, square, score, basis_sum, basis_cov, cross)
    return [s.cpu().double() for s in sums]


def law_value(theta: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:  # (3,), (M,) -> (M,), (M, 3)
    """The law ``a = gamma + (1 - gamma) sigmoid(alpha score + offset)`` and its gradient.

    The gradient is in (alpha, offset, gamma); the one in ``score`` is ``alpha`` times that in
    ``offset``.
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
    steepest: float = math.inf  # bound of |alpha|

    def __post_init__(self) -> None:
        spread = float((self.accuracy - self.accuracy.mean()).square().sum())
        self.scale = 1.0 / spread if spread > 0 else 1.0

    def bounds(self) -> Tensor:  # (2, 3)
        """Least and greatest alpha, offset and gamma."""
        gammas = (0.0, _LAST_GAMMA) if self.fit_floor else (self.floor, self.floor)
        alphas = (-self.steepest, 0.0 if self.decreasing else self.steepest)
        pairs = (alphas, (-math.inf, math.inf), gammas)
        return torch.tensor(pairs, dtype=torch.float64).T

    def free(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """Which of alpha, offset and gamma are not held at a bound that the gradient pushes at."""
        least, greatest = self.bounds()
        held = ((theta <= least) & (gradient >= 0)) | ((theta >= greatest) & (gradient <= 0))
        return (~held).nonzero()[:, 0]

    def move(self, theta: Tensor, free: Tensor, step: Tensor) -> Tensor:
        """``theta`` after a step of its free entries, inside its bounds."""
        least, greatest = self.bounds()
        return theta.index_add(0, free, step).clamp(least, greatest)

    def loss(self, theta: Tensor, score: Tensor) -> float:
        """``1 - R2`` on the models of the fit."""
        return float((law_value(theta, score)[0] - self.accuracy).square().sum()) * self.scale

    def start(self, score: Tensor) -> Tensor:
        """Linear regression of the accuracy's logit on the score, which is centred."""
        y = ((self.accuracy - self.floor) / (1 - self.floor)).clamp(0.02, 0.98).logit()
        alpha = (score * y).sum() / score.square().sum().clamp(min=1e-300)
        least, greatest = self.bounds()
        return torch.stack([alpha, y.mean(), y.new_tensor(self.floor)]).clamp(least, greatest)

    def polish(self, theta: Tensor, score: Tensor) -> tuple[Tensor, float]:
        """Levenberg-Marquardt on the law alone, to convergence: M numbers, no pass."""
        loss, damping = self.loss(theta, score), 1e-3
        for _ in range(200):
            value, jacobian = law_value(theta, score)
            gradient = jacobian.mT @ (value - self.accuracy)
            free = self.free(theta, gradient)
            normal = (jacobian.mT @ jacobian)[free][:, free]
            step = -_solve(normal, damping * normal.diagonal(), gradient[free])
            trial = self.move(theta, free, step)
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
    """Solution of the damped normal equations; a direction without curvature stays where it is."""
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
    promised: float = 0.0  # fall of the objective that the last proposal expects
    steps: int = 0
    done: bool = False

    def whiten(self) -> Tensor:  # (P, rank)
        """Map from coordinates z, in which ``Cov_w(basis, basis)`` is the identity, to p."""
        values, vectors = torch.linalg.eigh(self.at.basis_cov)
        seen = values > self.at.eps * values[-1]
        return vectors[:, seen] / values[seen].sqrt()

    def against_accuracy(self) -> Tensor:  # (P,)
        """Step that weighs tokens by how their loss falls with accuracy, one nat as deviation."""
        whiten = self.whiten()
        covariance = self.at.cross_cov.mT @ (self.law.accuracy - self.law.accuracy.mean())
        z = whiten.mT @ covariance
        return -(whiten @ z) / z.norm().clamp(min=1e-300)

    def propose(self, tolerance: float) -> tuple[Tensor, Tensor] | None:
        """One damped Gauss-Newton step of the parameters and the law, or None once converged.

        In the coordinates z that whiten ``Cov_w(basis, basis)``, KL(w || uniform) has the identity
        as its Gauss-Newton matrix, so the damping is a trust region in KL. For a table of weights
        the third cumulants that this leaves out cancel at the optimum, where
        ``dF/dS + regularization * p = 0``.
        """
        strength = 0.5 * self.regularization
        whiten = self.whiten()
        rank = whiten.shape[1]
        accuracy, by_law = law_value(self.theta, self.at.score)
        by_z = self.theta[0] * by_law[:, 1:2] * (self.at.cross_cov @ whiten)
        free = self.law.free(self.theta, by_law.mT @ (accuracy - self.law.accuracy))
        jacobian = torch.cat([by_z, by_law[:, free]], 1)
        gradient = jacobian.mT @ (accuracy - self.law.accuracy) * self.law.scale
        gradient[:rank] += strength * (whiten.mT @ (self.at.basis_cov @ self.params))
        normal = jacobian.mT @ jacobian * self.law.scale
        normal.diagonal()[:rank] += strength
        damping = self.damping * torch.cat([torch.ones(rank), normal.diagonal()[rank:]])
        step = -_solve(normal, damping, gradient)
        self.promised = -float(step @ (2.0 * gradient + normal @ step))
        if self.promised < tolerance and self.damping <= self.regularization:
            self.done = True
            return None
        moved = self.params + whiten @ step[:rank]
        return moved, self.law.move(self.theta, free, step[rank:])

    def take(self, params: Tensor, theta: Tensor, at: Moments, tolerance: float) -> None:
        """Moves to a proposal if the objective, with the law fitted anew, is lower there."""
        theta, loss = self.law.polish(theta, at.score)
        gain = self.objective - loss - self.regularization * float(at.kl)
        self.steps += 1
        if gain > 0:
            self.params, self.theta, self.at = params, theta, at
            self.objective -= gain
            kept = gain / max(self.promised, 1e-300)
            self.damping *= 0.125 if kept > 0.75 else 1.0 if kept > 0.25 else 4.0
        else:
            self.damping *= 8
            self.done = self.damping > 1e4 or -gain < 0.01 * tolerance


def _begin(law: LawFit, regularization: float, at: Moments, tolerance: float) -> Task:
    """A capability at uniform weights, with the law of the mean loss.

    Weights could cancel what the models' losses have in common, and a law without bound then turn
    the rest, however small, into any accuracies. So the slope is held to ``_STEEPEST`` over the
    spread of a token's NLL, or to ten times that of the mean-loss law where this is more.
    """
    theta, loss = law.polish(law.start(at.score), at.score)
    done = math.isinf(regularization) or loss < tolerance
    unit = 1.0 / max(float(at.spread), 1e-300)
    law.steepest = max(_STEEPEST * unit, 10.0 * abs(float(theta[0])))
    params = torch.zeros_like(at.basis_mean)
    return Task(law, regularization, params, theta, at, loss, done=done)


def _tilt_flat(read: Callable[[int], Iterator[Block]], tasks: Sequence[Task]) -> None:
    """Starts off uniform where the mean loss says nothing of the accuracy, or the wrong thing.

    A flat law gives the weights no gradient. The log-weights are tilted down the covariance of each
    token's loss with the accuracy, twice as far each time, until the score falls with accuracy.
    """
    flat = [task for task in tasks if not task.done and task.objective > _FLAT]
    directions = [t.against_accuracy() for t in flat]
    for power in range(6):
        if not flat:
            return
        tilted = torch.stack([2.0**power * direction for direction in directions])
        at = moments(read(len(flat)), tilted)
        left = []
        for index, task in enumerate(flat):
            here = at.of(index)
            theta, loss = task.law.polish(task.law.start(here.score), here.score)
            if theta[0] < 0:
                task.params, task.theta, task.at = tilted[index], theta, here
                task.objective = loss + task.regularization * float(here.kl)
            else:
                left.append(index)
        flat, directions = [flat[i] for i in left], [directions[i] for i in left]


def solve(
    read: Callable[[int], Iterator[Block]],
    laws: Sequence[LawFit],
    regularization: Sequence[float],
    rank: int,
    *,
    steps: int,
    tolerance: float,
) -> list[Task]:
    """Fits all capabilities side by side; a pass serves all those that have not converged.

    Args:
        read: gives the blocks of one pass; its argument is how many weight vectors share the pass.
        laws: one per capability.
        regularization: one per capability; infinite keeps its weights uniform.
        rank: P.
        steps: most passes after the first.
        tolerance: a step that lowers the objective, on the scale of R2, by less is the last one.
    """
    at = moments(read(len(laws)), torch.zeros(len(laws), rank, dtype=torch.float64))
    if not bool(torch.isfinite(at.score).all() and torch.isfinite(at.level).all()):
        raise ValueError("nll must be finite, got NaN or infinity; leave out such tokens or models")
    tasks = [
        _begin(law, strength, at.of(index), tolerance)
        for index, (law, strength) in enumerate(zip(laws, regularization, strict=True))
    ]
    uniform = [replace(task) for task in tasks]
    if steps > 0:
        _tilt_flat(read, tasks)
    for _ in range(steps):
        proposals = [
            (t, p) for t in tasks if not t.done and (p := t.propose(tolerance)) is not None
        ]
        if not proposals:
            break
        at = moments(read(len(proposals)), torch.stack([params for _, (params, _) in proposals]))
        for index, (task, (params, theta)) in enumerate(proposals):
            task.take(params, theta, at.of(index), tolerance)
    return [
        task
        if task.objective <= start.objective
        else replace(start, steps=task.steps, done=task.done)
        for task, start in zip(tasks, uniform, strict=True)
    ]
