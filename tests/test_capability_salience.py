"""CapabilitySalience: what it finds, what it reads, what it refuses, what it costs."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from salience_cases import DOUBLE, domains
from trimtab.algorithms.capability_salience import CapabilitySalience, choose_regularization


def test_infinite_regularization_is_the_mean_loss_law() -> None:
    nll, accuracy, _ = domains(20, 500, noise=0.03)
    base = CapabilitySalience(3, regularization=math.inf).fit(nll.float(), accuracy)
    assert torch.equal(base.salience, torch.full((3, 500), 1 / 500))
    mean = nll.float().double().mean(1)
    # Weights and score are rounded to float32, the products of a block are summed in it.
    torch.testing.assert_close(base.score(nll.float())[:, 0].double(), mean, rtol=5e-6, atol=0)
    for c in range(3):
        theta = torch.tensor([-1.0, 1.0], dtype=DOUBLE, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-12, tolerance_change=1e-16)  # fmt: skip

        def closure(theta: Tensor = theta, y: Tensor = accuracy[:, c]) -> Tensor:
            theta.grad = None
            predicted = torch.sigmoid(theta[0] * (mean - mean.mean()) + theta[1])
            loss = (predicted - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        want = float(closure().detach())
        assert float(base.mse(nll.float(), accuracy)[c]) == pytest.approx(want, rel=1e-4)
        assert float(base.objective[c]) == pytest.approx(
            float(1 - base.r2(nll, accuracy)[c]), rel=1e-4
        )


@pytest.mark.parametrize(("models", "tokens"), [(40, 6000), (120, 60)])
def test_planted_tokens_get_the_mass_and_predict_held_out_models(models: int, tokens: int) -> None:
    nll, accuracy, kind = domains(2 * models, tokens, noise=0.02)
    fitted, held = slice(0, models), slice(models, None)
    fit = CapabilitySalience(3).fit(nll[fitted].float(), accuracy[fitted])
    base = CapabilitySalience(3, regularization=math.inf).fit(nll[fitted].float(), accuracy[fitted])
    new, old = (f.r2(nll[held].float(), accuracy[held]) for f in (fit, base))
    assert (new > 0.9).all()
    assert (old < 0.8).all()
    for c in range(3):
        mass = float(fit.salience[c, kind == c].sum())
        assert mass > 0.65, "a third of the tokens are of the planted kind"
    torch.testing.assert_close(fit.salience.sum(1), torch.ones(3), rtol=1e-5, atol=0)
    assert (fit.salience >= 0).all()


def test_capabilities_are_fitted_as_if_alone() -> None:
    nll, accuracy, _ = domains(15, 300, noise=0.05)
    settings = {"floor": [0.0, 0.1, 0.2], "regularization": [0.3, 0.05, math.inf]}
    accuracy = accuracy.clamp(min=0.2)
    together = CapabilitySalience(3, **settings).fit(nll, accuracy)
    for c in range(3):
        own = {name: values[c] for name, values in settings.items()}
        alone = CapabilitySalience(**own).fit(nll, accuracy[:, c])
        # Products of another shape round in another order; some ten steps carry that on.
        torch.testing.assert_close(together.salience[c], alone.salience[0], rtol=1e-9, atol=0)
        # The law is polished until a step gains less than 1e-13, that is up to about its root.
        torch.testing.assert_close(together.alpha[c], alone.alpha[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(together.beta[c], alone.beta[0], rtol=1e-6, atol=0)


def test_order_of_tokens_and_of_models_does_not_matter() -> None:
    nll, accuracy, _ = domains(15, 300, noise=0.05)
    g = torch.Generator().manual_seed(3)
    tokens, models = torch.randperm(300, generator=g), torch.randperm(15, generator=g)
    fit = CapabilitySalience(3).fit(nll, accuracy)
    other = CapabilitySalience(3).fit(nll[models][:, tokens], accuracy[models])
    torch.testing.assert_close(other.salience, fit.salience[:, tokens], rtol=1e-9, atol=0)
    torch.testing.assert_close(other.predict(nll[:, tokens]), fit.predict(nll), rtol=1e-9, atol=0)


def test_unit_of_loss_and_difficulty_of_tokens_do_not_change_the_weights() -> None:
    nll, accuracy, _ = domains(15, 300, noise=0.05)
    harder = 5.0 * torch.rand(300, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    fit = CapabilitySalience(3).fit(nll, accuracy)
    other = CapabilitySalience(3).fit(nll / math.log(2) + harder, accuracy)
    torch.testing.assert_close(other.salience, fit.salience, rtol=1e-7, atol=0)
    torch.testing.assert_close(other.alpha, fit.alpha * math.log(2), rtol=1e-7, atol=0)
    moved = fit.beta / math.log(2) + fit.salience @ harder
    torch.testing.assert_close(other.beta, moved, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    nll, accuracy, _ = domains(12, 5000)
    short = nll.to(dtype)
    fit = CapabilitySalience(3).fit(short, accuracy)
    want = CapabilitySalience(3).fit(short.float(), accuracy)
    assert torch.equal(fit.salience, want.salience)
    assert torch.equal(fit.predict(short), want.predict(short.float()))
    assert fit.salience.dtype == fit.predict(short).dtype == torch.float32


def test_arrays_memmaps_and_strides_give_the_same_bits(tmp_path: Path) -> None:
    nll, accuracy, _ = domains(12, 5000)
    nll = nll.float()
    want = CapabilitySalience(3).fit(nll, accuracy)
    np.save(f"{tmp_path}/nll.npy", nll.numpy())
    memmap = np.load(f"{tmp_path}/nll.npy", mmap_mode="r")
    for same in (nll.numpy(), memmap, nll.T.contiguous().T, nll.clone().requires_grad_()):
        fit = CapabilitySalience(3).fit(same, accuracy.numpy())
        assert torch.equal(fit.salience, want.salience)
        assert torch.equal(fit.predict(same), want.predict(nll))


def test_float64_is_computed_in_float64() -> None:
    nll, accuracy, _ = domains(12, 500)
    fit = CapabilitySalience(3).fit(nll, accuracy)
    assert fit.salience.dtype == fit.predict(nll).dtype == DOUBLE
    assert torch.equal(CapabilitySalience(3).fit(nll.numpy(), accuracy).salience, fit.salience)


def test_same_inputs_same_bits() -> None:
    nll, accuracy, _ = domains(12, 5000, noise=0.05)
    fits = [CapabilitySalience(3).fit(nll.float(), accuracy) for _ in range(3)]
    assert all(torch.equal(fit.salience, fits[0].salience) for fit in fits)
    assert all(torch.equal(fit.alpha, fits[0].alpha) for fit in fits)


def against(strength: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """A benchmark that needs a third of the text, with the rest of it going the other way.

    With ``strength`` None the two cancel, and the mean loss is not correlated with the accuracy.
    """
    nll, accuracy, kind = domains(80, 3000)
    y = accuracy[:, 0]
    rest, moved = (kind != 0).double(), y - y[:40].mean()
    if strength is None:
        strength = -float((moved * nll.mean(1))[:40].sum() / (moved**2)[:40].sum() / rest.mean())
    return nll + strength * moved[:, None] * rest, y, kind


@pytest.mark.parametrize("strength", [None, 1.5, 6.0, 20.0])
@pytest.mark.parametrize("decreasing", [True, False])
def test_tokens_are_found_where_the_mean_loss_misleads(
    strength: float | None, decreasing: bool
) -> None:
    nll, y, kind = against(strength)
    base = CapabilitySalience(regularization=math.inf).fit(nll[:40], y[:40])
    assert float(base.r2(nll[:40], y[:40])) < 0.05
    if strength:
        free = CapabilitySalience(regularization=math.inf, decreasing=False).fit(nll[:40], y[:40])
        assert float(base.alpha) == 0
        assert float(free.alpha) > 0
    fit = CapabilitySalience(decreasing=decreasing).fit(nll[:40], y[:40])
    assert float(fit.r2(nll[40:], y[40:])) > 0.9
    if decreasing:
        assert float(fit.alpha) < 0
        assert float(fit.salience[0, kind == 0].sum()) > 0.7


def test_nothing_better_than_the_mean_loss_leaves_its_law() -> None:
    skill = torch.linspace(-1, 1, 10, dtype=DOUBLE)[:, None]
    nll, y = 2 + 0.1 * skill.expand(10, 50), torch.sigmoid(3 * skill[:, 0])
    fit = CapabilitySalience().fit(nll, y)
    base = CapabilitySalience(regularization=math.inf).fit(nll, y)
    assert float(fit.alpha) == 0, "more loss goes with more accuracy on every token"
    assert torch.equal(fit.salience, base.salience)
    assert torch.equal(fit.objective, base.objective)


@pytest.mark.filterwarnings("ignore:the fit of capabilities")  # of coin tosses
def test_a_fit_is_never_worse_than_the_mean_loss() -> None:
    g = torch.Generator().manual_seed(6)
    for _ in range(20):
        nll, coins = torch.rand(5, 12, generator=g, dtype=DOUBLE), torch.rand(5, 3, generator=g)
        base = CapabilitySalience(3, regularization=math.inf).fit(nll, coins)
        fit = CapabilitySalience(3, regularization=[3.0, 0.3, 0.03]).fit(nll, coins)
        assert (fit.objective <= base.objective).all()
        got = 1 - fit.r2(nll, coins) + torch.tensor([3.0, 0.3, 0.03], dtype=DOUBLE) * fit.kl
        torch.testing.assert_close(got, fit.objective, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the fit of capabilities")  # it goes along the bound
def test_the_slope_is_bounded_where_weights_could_cancel_all_but_a_trace() -> None:
    g = torch.Generator().manual_seed(7)
    steepest = 0.0
    for _ in range(20):
        nll, coins = torch.rand(4, 9, generator=g, dtype=DOUBLE), torch.rand(4, generator=g)
        base = CapabilitySalience(regularization=math.inf).fit(nll, coins)
        bound = max(
            100 / float((nll - nll.mean(0)).square().mean().sqrt()), 10 * -float(base.alpha)
        )
        fit = CapabilitySalience().fit(nll, coins)
        assert -float(fit.alpha) <= bound * (1 + 1e-12)
        steepest = max(steepest, -float(fit.alpha) / bound)
    assert steepest > 0.5, "some of them would have gone on"


def test_a_slope_that_the_mean_loss_needs_is_allowed() -> None:
    skill = torch.linspace(-1, 1, 20, dtype=DOUBLE)[:, None]
    noise = torch.randn(20, 200, generator=torch.Generator().manual_seed(8), dtype=DOUBLE)
    nll = 2 - 1e-3 * skill + 0.3 * (noise - noise.mean(1, keepdim=True))
    y = torch.sigmoid(2 * skill[:, 0] + noise[:, 0])
    base = CapabilitySalience(regularization=math.inf).fit(nll, y)
    fit = CapabilitySalience(regularization=0.1).fit(nll, y)
    assert float(fit.objective) < float(base.objective) - 0.01
    # Hundred logits over the spread of a token's NLL, 0.3, would be 333.
    assert float(base.alpha) < -1000
    assert float(fit.alpha) < -1000


def test_fit_floor_finds_the_level_of_chance() -> None:
    nll, accuracy, _ = domains(300, 500, gamma=0.25)
    fit = CapabilitySalience(3, floor=0.1, fit_floor=True, regularization=0.01).fit(nll, accuracy)
    torch.testing.assert_close(fit.gamma, torch.full((3,), 0.25, dtype=DOUBLE), rtol=0, atol=0.03)
    fixed = CapabilitySalience(3, floor=0.1, regularization=0.01).fit(nll, accuracy)
    assert torch.equal(fixed.gamma, torch.full((3,), 0.1, dtype=DOUBLE))
    assert (fit.objective <= fixed.objective + 1e-7).all()


def test_constant_accuracy_gives_a_flat_law_and_no_r2() -> None:
    nll, _, _ = domains(8, 100)
    fit = CapabilitySalience().fit(nll, torch.full((8,), 0.3))
    torch.testing.assert_close(
        fit.predict(nll), torch.full((8, 1), 0.3, dtype=DOUBLE), rtol=1e-4, atol=0
    )
    assert torch.isnan(fit.r2(nll, torch.full((8,), 0.3))).all()


def test_head_weighs_new_text() -> None:
    nll, accuracy, kind = domains(60, 4000, noise=0.02)
    features = torch.nn.functional.one_hot(kind, 3).double()
    features = torch.cat([features + 1e4, torch.ones(4000, 1)], 1).float()
    nll, old, new = nll.float(), slice(0, 2000), slice(2000, None)
    fit = CapabilitySalience(3, weights="head").fit(
        nll[:30, old], accuracy[:30], features=features[old]
    )
    torch.testing.assert_close(fit.weigh(features[old]), fit.salience, rtol=1e-3, atol=0)
    weights = fit.weigh(features[new])
    assert all(float(weights[c, kind[new] == c].sum()) > 0.6 for c in range(3))
    score = fit.score(nll[:, new], features=features[new])
    torch.testing.assert_close(score, nll[:, new] @ weights.T, rtol=1e-5, atol=0)
    # The new text is easier or harder by some amount, which models of known accuracy tell.
    fit.calibrate(nll[:30, new], accuracy[:30], features=features[new])
    assert (fit.r2(nll[30:, new], accuracy[30:], features=features[new]) > 0.95).all()


def test_calibrating_on_the_models_of_the_fit_changes_nothing() -> None:
    nll, accuracy, _ = domains(20, 300, noise=0.05)
    fit = CapabilitySalience(3).fit(nll, accuracy)
    before = fit.alpha.clone(), fit.beta.clone(), fit.predict(nll), fit.salience.clone()
    fit.calibrate(nll, accuracy)
    # The law is polished until a step gains less than 1e-13, that is up to about its root.
    for value, now in zip(
        before, (fit.alpha, fit.beta, fit.predict(nll), fit.salience), strict=True
    ):
        torch.testing.assert_close(now, value, rtol=1e-6, atol=0)
    moved = fit.calibrate(nll + 1.0, accuracy).beta
    torch.testing.assert_close(moved, before[1] + 1.0, rtol=1e-6, atol=0)


class Misshapen:
    """A basis with a row per token, where it must have a column."""

    transfers = False

    def basis(self, nll: Tensor, features: Tensor | None) -> Tensor:
        return nll.mT


class DomainWeights:
    """One weight per domain of the token, the domain given as its number."""

    transfers = True

    def basis(self, nll: Tensor, features: Tensor | None) -> Tensor:
        assert features is not None
        return torch.nn.functional.one_hot(features[:, 0].long(), 3).T.to(features)


def test_your_own_weights_equal_a_head_on_the_same_basis(tmp_path: Path) -> None:
    nll, accuracy, kind = domains(30, 500, noise=0.02)
    number = kind[:, None].double()
    onehot = torch.nn.functional.one_hot(kind, 3).double()
    own = CapabilitySalience(3, weights=DomainWeights()).fit(nll, accuracy, features=number)
    head = CapabilitySalience(3, weights="head").fit(nll, accuracy, features=onehot)
    torch.testing.assert_close(own.salience, head.salience, rtol=1e-9, atol=0)
    torch.testing.assert_close(own.weigh(number), own.salience, rtol=1e-9, atol=0)
    own.save(f"{tmp_path}/own.pt")
    loaded = CapabilitySalience.load(f"{tmp_path}/own.pt", weights=DomainWeights())
    assert torch.equal(loaded.weigh(number), own.weigh(number))
    with pytest.raises(ValueError, match="weights must be the object of the fit"):
        CapabilitySalience.load(f"{tmp_path}/own.pt")


def test_save_and_load(tmp_path: Path) -> None:
    nll, accuracy, _ = domains(12, 300)
    settings = {"floor": [0.0, 0.1, 0.0], "regularization": [0.1, math.inf, 0.2], "steps": 20}
    fit = CapabilitySalience(3, **settings).fit(nll.float(), accuracy.clamp(min=0.1))
    fit.save(f"{tmp_path}/fit.pt")
    loaded = CapabilitySalience.load(f"{tmp_path}/fit.pt")
    assert torch.equal(loaded.predict(nll.float()), fit.predict(nll.float()))
    for name in ("salience", "params", "alpha", "beta", "gamma", "kl", "objective", "steps_taken"):
        assert torch.equal(getattr(loaded, name), getattr(fit, name))
    assert loaded.regularization == fit.regularization
    assert loaded.steps == 20
    again = loaded.fit(nll.float(), accuracy.clamp(min=0.1))
    assert torch.equal(again.salience, fit.salience)
    with pytest.raises(ValueError, match="weights must be left out"):
        CapabilitySalience.load(f"{tmp_path}/fit.pt", weights=DomainWeights())


class Touch:
    """Pickles as a call that writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    torch.save({"settings": Touch(str(tmp_path / "touched"))}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        CapabilitySalience.load(tmp_path / "bad.pt")
    assert not (tmp_path / "touched").exists()


def test_cross_validation_is_what_a_loop_gives() -> None:
    nll, accuracy, _ = domains(24, 400, noise=0.1)
    runs = torch.arange(24) // 6
    grid = [0.03, math.inf, 0.3]
    choice = choose_regularization(nll, accuracy, grid=grid, folds=runs)
    assert choice.grid.tolist() == [math.inf, 0.3, 0.03]
    for row, value in enumerate(choice.grid.tolist()):
        error = torch.zeros(3, dtype=DOUBLE)
        for run in range(4):
            held = runs == run
            fit = CapabilitySalience(3, regularization=value)
            fit.fit(nll[~held], accuracy[~held])
            error += 6 * fit.mse(nll[held], accuracy[held])
        # The same fits; only the errors are added up in another order.
        torch.testing.assert_close(choice.mse[row], error / 24, rtol=1e-12, atol=0)
    best = choice.mse.argmin(0)
    assert torch.equal(choice.regularization, choice.grid[best])


@pytest.mark.filterwarnings("ignore:the fit of capabilities")  # of coin tosses
def test_cross_validation_tells_signal_from_noise() -> None:
    nll, accuracy, _ = domains(40, 1000, noise=0.02)
    coins = torch.rand(40, 1, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    choice = choose_regularization(nll, torch.cat([accuracy, coins], 1), folds=4)
    assert (choice.regularization[:3] < 0.3).all()
    assert choice.regularization[3] == math.inf
    fit = CapabilitySalience(4, regularization=choice.regularization)
    assert fit.fit(nll, torch.cat([accuracy, coins], 1)).kl[3] == pytest.approx(0, abs=1e-12)


def test_a_fit_cut_short_says_so() -> None:
    nll, accuracy, _ = domains(12, 300, noise=0.05)
    with pytest.warns(UserWarning, match="has not converged; raise steps"):
        CapabilitySalience(3, steps=1).fit(nll, accuracy)


NLL, ACCURACY = torch.rand(4, 9), torch.rand(4)


def fit(
    nll: object = NLL, accuracy: object = ACCURACY, features: object = None, **settings: object
):
    return CapabilitySalience(**settings).fit(nll, accuracy, features=features)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "n_capabilities must be", lambda: CapabilitySalience(0)),
        (ValueError, "floor must be in", lambda: CapabilitySalience(floor=1.0)),
        (ValueError, "floor must be one number or 2", lambda: CapabilitySalience(2, floor=[0] * 3)),
        (ValueError, "regularization must be", lambda: CapabilitySalience(regularization=0)),
        (ValueError, "weights must be 'table'", lambda: CapabilitySalience(weights="list")),
        (ValueError, "steps and tolerance", lambda: CapabilitySalience(steps=-1)),
        (TypeError, "nll must be a floating", lambda: fit(NLL.long())),
        (TypeError, "nll must be a floating", lambda: fit([[1.0]])),
        (ValueError, "nll must be a matrix", lambda: fit(NLL[0])),
        (ValueError, "nll must be a matrix", lambda: fit(NLL[:0])),
        (ValueError, "nll must be finite", lambda: fit(NLL / 0)),
        (ValueError, "accuracy must have shape", lambda: fit(n_capabilities=2)),
        (ValueError, "accuracy must be in", lambda: fit(accuracy=100 * ACCURACY)),
        (ValueError, "accuracy must be in", lambda: fit(accuracy=ACCURACY * math.nan)),
        (ValueError, "features must be None", lambda: fit(features=NLL.T)),
        (ValueError, "features must be given", lambda: fit(weights="head")),
        (ValueError, "features must have one row", lambda: fit(features=NLL, weights="head")),
        (ValueError, "features must be finite", lambda: fit(features=NLL.T / 0, weights="head")),
        (TypeError, "features must be a float", lambda: fit(features=[[1.0]], weights="head")),
        (ValueError, "weights must give a basis", lambda: fit(weights=Misshapen())),
        (RuntimeError, "fit must be called", lambda: CapabilitySalience().predict(NLL)),
        (RuntimeError, "fit must be called", lambda: CapabilitySalience().save("nowhere")),
        (ValueError, "nll must have one column", lambda: fit().score(NLL[:, :5])),
        (ValueError, "nll must be finite", lambda: fit().score(NLL / 0)),
        (ValueError, "features must be None", lambda: fit().weigh(NLL.T)),
        (ValueError, "folds must be", lambda: choose_regularization(NLL, ACCURACY, folds=1)),
        (ValueError, "folds must be", lambda: choose_regularization(NLL, ACCURACY, folds=NLL[0])),
    ],
)
def test_errors_name_the_argument(error: type[Exception], match: str, call: object) -> None:
    with pytest.raises(error, match=match):
        call()  # type: ignore[operator]


MEMORY = """
import resource, torch
from trimtab.algorithms.capability_salience import CapabilitySalience
torch.set_num_threads(1)
M, N, C = 100, 200_000, 6
g = torch.Generator().manual_seed(0)
skill = torch.randn(M, C, generator=g)
nll = torch.empty(M, N)
for low in range(0, N, 10_000):
    kind = torch.randint(0, C, (10_000,), generator=g)
    noise = torch.randn(M, 10_000, generator=g)
    nll[:, low : low + 10_000] = 2 - 0.3 * skill[:, kind] + 0.2 * noise
accuracy = torch.sigmoid(skill)
CapabilitySalience(C).fit(nll[:, :5000], accuracy)  # the libraries' own buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit = CapabilitySalience(C).fit(nll, accuracy)
r2 = fit.r2(nll, accuracy)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, float(r2.min()))
"""


@pytest.mark.slow
def test_a_fit_allocates_blocks_and_not_the_matrix() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    )
    kibibytes, r2 = done.stdout.split()
    # The matrix has 78 MiB. Twice the weights (C, N) have 9, a block's weighted copies 10.
    assert int(kibibytes) < 32 * 1024
    assert float(r2) > 0.95
