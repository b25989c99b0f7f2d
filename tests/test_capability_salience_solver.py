"""The solver of CapabilitySalience against autograd, and against free weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from salience_cases import DOUBLE, domains
from trimtab.algorithms.capability_salience import CapabilitySalience, HeadWeights
from trimtab.algorithms.capability_salience.solver import LawFit, law_value, moments, solve
from trimtab.algorithms.capability_salience.token_weights import (
    TableWeights,
    TokenBlocks,
    TokenMatrix,
)


def table(nll: Tensor) -> TokenBlocks:
    return TokenBlocks(TokenMatrix(nll, "nll"), TableWeights(), None)


def objective(u: Tensor, theta: Tensor, nll: Tensor, y: Tensor, strength: float) -> Tensor:
    """The objective written out, for N free log-weights ``u``."""
    log_w = torch.log_softmax(u, 0)
    a = theta[2] + (1 - theta[2]) * torch.sigmoid(theta[0] * (nll @ log_w.exp()) + theta[1])
    kl = (log_w.exp() * (log_w + math.log(len(u)))).sum()
    return (a - y).square().sum() / (y - y.mean()).square().sum() + strength * kl


def fitted_state(fit: CapabilitySalience, c: int = 0) -> tuple[Tensor, Tensor]:
    """Log-weights and raw law of a fitted capability, as ``objective`` takes them."""
    theta = torch.stack([fit.alpha[c], -fit.alpha[c] * fit.beta[c], fit.gamma[c]])
    return fit.salience[c].double().log(), theta


def test_law_gradient_is_that_of_autograd() -> None:
    score = torch.linspace(-2, 2, 7, dtype=DOUBLE)
    theta = torch.tensor([-1.7, 0.3, 0.2], dtype=DOUBLE)
    want = torch.autograd.functional.jacobian(lambda t: law_value(t, score)[0], theta)
    torch.testing.assert_close(law_value(theta, score)[1], want)
    by_score = torch.autograd.functional.jacobian(lambda s: law_value(theta, s)[0], score)
    torch.testing.assert_close(theta[0] * law_value(theta, score)[1][:, 1], by_score.diagonal())


@pytest.mark.parametrize("kind", ["table", "head"])
def test_covariances_are_the_derivatives_of_score_and_kl(kind: str) -> None:
    nll, _, _ = domains(5, 40)
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    provider, given = (TableWeights(), None) if kind == "table" else (HeadWeights(), features)
    blocks = TokenBlocks(TokenMatrix(nll, "nll"), provider, given)
    contrast, _, basis = next(blocks.read(1))
    params = torch.randn(1, blocks.rank, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    at = moments(blocks.read(1), params)

    def score(p: Tensor) -> Tensor:
        return contrast @ torch.softmax(p @ basis, 0)

    def kl(p: Tensor) -> Tensor:
        log_w = torch.log_softmax(p @ basis, 0)
        return (log_w.exp() * (log_w + math.log(40))).sum()

    torch.testing.assert_close(at.score[0], score(params[0]))
    torch.testing.assert_close(at.kl[0], kl(params[0]))
    w = torch.softmax(params[0] @ basis, 0)
    torch.testing.assert_close(at.spread[0], (contrast.square().mean(0) @ w).sqrt())
    torch.testing.assert_close(at.level[0], nll.mean(0) @ w)
    torch.testing.assert_close(
        at.cross_cov[0], torch.autograd.functional.jacobian(score, params[0])
    )
    torch.testing.assert_close(
        at.basis_cov[0] @ params[0], torch.autograd.functional.jacobian(kl, params[0])
    )


def test_moments_do_not_depend_on_the_blocks() -> None:
    nll, _, _ = domains(6, 300)
    params = 4.0 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    contrast = nll - nll.mean(0)
    whole = moments(iter([(contrast, nll.mean(0), contrast)]), params)
    cuts = [0, 1, 8, 100, 300]
    parts = [
        (contrast[:, a:b], nll[:, a:b].mean(0), contrast[:, a:b])
        for a, b in itertools.pairwise(cuts)
    ]
    cut = moments(iter(parts), params)
    for name in (
        "score",
        "level",
        "spread",
        "kl",
        "log_norm",
        "basis_mean",
        "basis_cov",
        "cross_cov",
    ):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name))


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_m_numbers_hold_the_stationary_point_of_n_free_weights(floor: float) -> None:
    nll, accuracy, _ = domains(12, 400, noise=0.05, gamma=floor)
    y, strength = accuracy[:, 0].clamp(min=floor), 0.05
    fit = CapabilitySalience(floor=floor, regularization=strength, tolerance=1e-14).fit(nll, y)
    u, theta = (t.clone().requires_grad_() for t in fitted_state(fit))
    loss = objective(u, theta, nll, y, strength)
    torch.testing.assert_close(loss.detach(), fit.objective[0])
    by_u, by_theta = torch.autograd.grad(loss, (u, theta))

    # Where the fit begins, with uniform weights and the law of the mean loss, for the scale.
    base = CapabilitySalience(floor=floor, regularization=math.inf).fit(nll, y)
    u0, theta0 = (t.clone().requires_grad_() for t in fitted_state(base))
    (start,) = torch.autograd.grad(objective(u0, theta0, nll, y, strength), u0)
    # A step is left out once it promises less than the tolerance: the root of it, for a gradient.
    assert by_u.norm() < 1e-6 * start.norm()
    assert by_theta[:2].abs().max() < 1e-6

    # The same, in the dual: the parameters are the gradient in the scores, centred.
    score = (nll @ u.exp()).detach().requires_grad_()
    a = theta[2] + (1 - theta[2]) * torch.sigmoid(theta[0] * score + theta[1])
    error = (a - y).square().sum() / (y - y.mean()).square().sum()
    (by_score,) = torch.autograd.grad(error, score)
    params = fit.params[0] - fit.params[0].mean()
    torch.testing.assert_close(params, -by_score / strength, rtol=1e-4, atol=1e-6)


def test_gradient_descent_on_n_free_weights_ends_at_the_same_weights() -> None:
    nll, accuracy, _ = domains(10, 60, noise=0.05)
    y, strength = accuracy[:, 1], 0.1
    fit = CapabilitySalience(regularization=strength, tolerance=1e-13).fit(nll, y)
    base = CapabilitySalience(regularization=math.inf).fit(nll, y)
    u, theta = (t.clone().requires_grad_() for t in fitted_state(base))
    centred = nll - nll.mean(0)
    theta.data[1] += theta.data[0] * nll.mean()
    optimizer = torch.optim.LBFGS([u, theta], max_iter=3000, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-16)  # fmt: skip
    gamma = torch.zeros(1, dtype=DOUBLE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(u, torch.cat([theta[:2], gamma]), centred, y, strength)
        loss.backward()
        return loss

    optimizer.step(closure)
    free = closure().detach()
    assert fit.objective[0] <= free + 1e-12
    torch.testing.assert_close(fit.objective[0], free, rtol=1e-7, atol=0)
    torch.testing.assert_close(fit.salience[0], torch.softmax(u.detach(), 0), rtol=1e-3, atol=0)


def test_the_objective_falls_from_the_mean_loss_law_as_regularization_does() -> None:
    nll, accuracy, _ = domains(20, 500, noise=0.03)
    values = [math.inf, 1e6, 1.0, 0.1, 0.01]
    fits = [CapabilitySalience(3, regularization=v).fit(nll, accuracy) for v in values]
    torch.testing.assert_close(fits[1].salience, fits[0].salience, rtol=1e-4, atol=0)
    for more, less in itertools.pairwise(fits):
        assert (less.objective <= more.objective + 1e-7).all()
        assert (less.kl >= more.kl - 1e-7).all()


def test_solver_takes_no_step_uphill() -> None:
    nll, accuracy, _ = domains(10, 100, noise=0.1)
    blocks, law = table(nll), LawFit(accuracy[:, 0], 0.0, False, True)
    before = math.inf
    for steps in range(8):
        (task,) = solve(blocks.read, [law], [0.01], 10, steps=steps, tolerance=0.0)
        assert task.objective <= before
        assert task.steps <= steps
        before = task.objective
