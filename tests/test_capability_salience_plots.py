"""Pictures of salience: files, colours, escapes, and what an import costs."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from salience_cases import domains
from trimtab.algorithms.capability_salience import CapabilitySalience
from trimtab.algorithms.capability_salience.plots import (
    extreme_tokens,
    plot_predictions,
    plot_tokens,
    tokens_html,
)


def test_plots_are_written(tmp_path: object) -> None:
    nll, accuracy, _ = domains(20, 200, noise=0.05)
    held = torch.arange(20) >= 12
    fit = CapabilitySalience(3).fit(nll[~held], accuracy[~held])
    base = CapabilitySalience(3, regularization=math.inf).fit(nll[~held], accuracy[~held])
    figure = plot_predictions(
        fit, nll, accuracy, held_out=held, baseline=base, names=["code", "law", "$x$"]
    )
    assert len(figure.axes) == 6
    labels = figure.axes[0].get_legend_handles_labels()[1]
    want = float(fit.r2(nll[held], accuracy[held])[0])
    assert labels[1] == f"held out, R² {want:.3f}"
    shown = figure.axes[0].collections[1].get_offsets()
    np.testing.assert_allclose(shown[:, 1], fit.predict(nll[held])[:, 0].numpy())
    figure.savefig(f"{tmp_path}/predictions.png")
    one = plot_predictions(fit, nll, accuracy)
    assert len(one.axes) == 3
    tokens = ["the", " $x$", " <b>", "\n", " zürich", "\t", ""] * 28 + ["a" * 200] * 4
    text = plot_tokens(tokens, fit.salience[1], columns=40, title="law")
    text.savefig(f"{tmp_path}/tokens.png")
    drawn = "".join(t.get_text() for t in text.axes[0].texts)
    assert drawn == "".join("".join(tokens).replace("\n", "\u21b5").split())
    for name in ("predictions.png", "tokens.png"):
        with open(f"{tmp_path}/{name}", "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_html_is_escaped_and_coloured() -> None:
    tokens = ["<script>alert('x')</script>", ' "&', "plain", "\n"]
    salience = torch.tensor([0.7, 0.05, 0.25, 0.0])
    page = tokens_html(tokens, salience)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    assert " &quot;&amp;</span>" in page
    assert 'background-color:#ffffff" title="1 x uniform">plain' in page
    orange = page.split("background-color:#")[2][:6]
    red, blue = int(orange[:2], 16), int(orange[4:], 16)
    assert red > blue, "above uniform is orange"
    assert page.count("<span") == page.count("</span>") == 4
    assert "4 x uniform" in tokens_html(tokens, salience * 4, uniform=0.25 * 0.7)
    assert "#ffffff" in tokens_html(["a", "b"], torch.tensor([0.5, 0.5 + 1e-7]))
    assert tokens_html([], torch.empty(0)).endswith("></div>")


def test_extreme_tokens() -> None:
    most, least = extreme_tokens(list("abcde"), torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25]), 2)
    assert [(t.position, t.token) for t in most] == [(1, "b"), (4, "e")]
    assert [(t.position, t.token) for t in least] == [(3, "d"), (0, "a")]
    assert most[0].ratio == pytest.approx(2.0)
    assert [t.ratio for t in extreme_tokens(["a"], torch.tensor([0.1]), uniform=0.2)[0]] == [
        pytest.approx(0.5)
    ]


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("salience must have one weight", lambda: tokens_html(["a"], torch.ones(2))),
        ("salience must have one weight", lambda: plot_tokens(["a"], torch.ones(1, 1))),
        ("columns must be", lambda: plot_tokens(["a"], torch.ones(1), columns=0)),
    ],
)
def test_plot_errors_name_the_argument(match: str, call: object) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]


def test_matplotlib_is_imported_by_drawing_alone() -> None:
    code = (
        "import sys, trimtab.algorithms.capability_salience.plots as p, torch;"
        "p.tokens_html(['a'], torch.ones(1)); sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
