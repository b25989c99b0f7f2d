"""What the reports have to know of each family: its axes, its floors, and its modes in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Rate(NamedTuple):
    """A column that follows from the time: its heading, the row's field, and its format."""

    heading: str
    field: str
    how: str


GFLOPS = Rate("GFLOP/s", "gflops", ".0f")
GBPS = Rate("GB/s", "gbps", ".1f")
TOKENS = Rate("tokens/s", "tokens_per_s", ".4g")


class Family(NamedTuple):
    """One family of operators."""

    axes: tuple[str, ...]
    floors: tuple[str, ...]  # the providers that others are judged by
    about: str
    modes: Mapping[str, str]
    rate: Rate = GFLOPS
    axes_of: Mapping[str, tuple[str, ...]] = {}  # where an operator's differ
    rates_of: Mapping[str, Rate] = {}

    def axes_for(self, op: str) -> tuple[str, ...]:
        return self.axes_of.get(op, self.axes)

    def rate_for(self, op: str) -> Rate:
        return self.rates_of.get(op, self.rate)


_SPREAD = "Times are medians over interleaved rounds, with the 20th and 80th percentile; `x floor` "

TOKEN_LOSS = Family(
    axes=("N", "D", "V"),
    floors=("products alone",),
    about=_SPREAD
    + (
        "is the time over that of the products the case can't do without, measured in the same "
        "rounds; `extra` is the peak of one call beyond inputs and gradients; `error` is the "
        "largest against float64, relative to the largest true value, over the loss and the "
        "gradients."
    ),
    modes={
        "weighted": "scalar loss with token weights, forward + backward",
        "mean": "plain mean without weights, forward + backward",
        "half": "the same as weighted with half the tokens ignored or of weight 0",
        "none": "one loss per token with an upstream known only in backward, forward + backward",
        "frozen": "head frozen, one loss per token with an arbitrary upstream, forward + backward",
        "logp": "log-probabilities, forward only",
        "rows": "logits made already, one loss per token, forward + backward; floor: one copy of "
        "them",
    },
)

_HEAD = ("N", "D", "V")
_CONTRAST_MODES = {
    "topk_topp": "top-k 50 and top-p 0.9",
    "greedy": "temperature 0 with plausibility 0.1",
    "free": "no filter",
    "topp": "top-p 0.9 alone",
    "minp": "min-p 0.05 alone",
    "all": "temperature 0.7, top-k 50, top-p 0.9 and min-p 0.05",
    "plausible": "plausibility 0.1, temperature 1",
    "three_rows": "a third row as anchor, top-k 50 and top-p 0.9",
    "flat": "top-k 50 and top-p 0.9 on logits without likely tokens",
    "flat_topp": "top-p 0.9 alone on logits without likely tokens: a third of them is kept",
    "logits": "contrasted logits with plausibility 0.1; floor: one read of the rows, one write of "
    "float32",
    "logp": "forward + backward for both rows; floor: one read of the rows, one write of their "
    "gradients",
    "linear_logp": "forward only; floor: one product",
    "linear_logp_grad": "forward + backward for hidden states and head; floor: four products, "
    "as the upstream is known only in backward",
    "linear_topk_topp": "top-k 50 and top-p 0.9; floor: one product",
    "self_cd": "Self-CD with ratio 2.5, greedy, on a random model; times are those of one new "
    "token; floor: the forward passes of both contexts as one batch",
}

CONTRAST = Family(
    axes=("B", "V"),
    floors=("one read", "products alone", "forwards alone"),
    about=_SPREAD
    + (
        "is the time over that of one read of the rows (the largest of their bits, as integers), "
        "unless said otherwise, measured in the same rounds; every round goes round copies of the "
        "rows; `extra` is the peak of one call beyond inputs and results; `error` is against "
        "float64: of samplers the largest total variation of a row's filtered distribution (ours "
        "report one probability, that of the token drawn), of greedy the largest shortfall in "
        "logits, otherwise the largest relative to the largest true value."
    ),
    modes=_CONTRAST_MODES,
    rate=GBPS,
    axes_of={
        "linear_contrastive_logp": _HEAD,
        "linear_contrastive_sample": ("B", "D", "V"),
        "self_contrastive_generate": ("B", "prompt", "new tokens"),
    },
    rates_of={
        "linear_contrastive_logp": GFLOPS,
        "linear_contrastive_sample": GFLOPS,
        "self_contrastive_generate": TOKENS,
    },
)

ORTHOGONAL = Family(
    axes=("M", "R", "r", "d"),
    floors=("one read",),
    about=_SPREAD
    + (
        "is the time over that of one read of all earlier rows from one block of memory (the "
        "largest of their bits, as integers), unless said otherwise, measured in the same rounds; "
        "the read tensor by tensor has a call for each. M modules have R earlier rows and r new "
        "ones of width d, each the largest where they differ; every round goes round copies of "
        "them; `GB/s` counts what the floor moves; `extra` is the peak of one call beyond inputs "
        "and results; `error` is the largest against float64, relative to the largest true value, "
        "over the value and the gradients. No product of the data is so close to 0 that rounding "
        "decides its sign."
    ),
    modes={
        "l1": "sum of absolute products, value + gradient; R 8 times the number of earlier tasks",
        "all_linear": "the same for all seven products of a LLaMA layer, of which the last is of "
        "width d and the others of width 4096 / 11008 d",
        "tasks": "the same with one tensor of r rows for each earlier task, as PEFT keeps them",
        "frobenius2": "sum of squared products, value + gradient",
        "value": "sum of absolute products, value alone",
        "both": "value + gradient for the new and the earlier rows; floor: one read of the "
        "earlier rows, one write of their gradients",
        "side_b": "the other factor of the update: columns of (d, R) and (d, r), value + gradient",
        "ragged": "ranks and widths that differ from module to module, R/4 to R, r/4 to r, d/4 and "
        "d, value + gradient",
        "adapters": "gradients of n rows, as of adapters, without what lies in the span of k "
        "orthonormal rows; floor: one read of both, one write of the results",
        "gpm": "the same for gradients of square layers, as in GPM",
    },
    rate=GBPS,
    axes_of={"project_out": ("M", "k", "n", "d")},
)

FAMILIES = {"token_loss": TOKEN_LOSS, "contrast": CONTRAST, "orthogonal": ORTHOGONAL}
