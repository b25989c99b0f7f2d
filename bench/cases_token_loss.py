"""What the token loss is measured on: modes, shapes, data, and the float64 truth.

Costs are counted in products: one N x D x V product is 2 N D V FLOP. ``Case.flop`` is what the
maths needs, not what a contender happens to run; ``Case.bytes`` is one read of every input and one
write of every result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
SWEEP_WIDTH = 512
# Rows and classes on which gradients are compared with the truth; losses are compared everywhere.
SAMPLED = 64
# Standard deviation of the logits: few classes hold most of the probability, as in a trained model.
LOGIT_SPREAD = 3.0
_TRUTH_BYTES = 256 * 2**20


class Mode(NamedTuple):
    """One way in which the loss is used."""

    op: str
    products: int
    words: str
    scalar: bool = False
    active: float = 1.0  # share of the tokens that count


MODES = {
    "weighted": Mode("linear_cross_entropy", 3, "scalar loss with token weights", scalar=True),
    "mean": Mode("linear_cross_entropy", 3, "plain mean, no weights", scalar=True),
    "half": Mode("linear_cross_entropy", 3, "half the tokens ignored or of weight 0", True, 0.5),
    "none": Mode("linear_cross_entropy", 4, "one loss per token, upstream known only in backward"),
    "frozen": Mode(
        "linear_cross_entropy", 2, "head frozen, one loss per token, arbitrary upstream"
    ),
    "logp": Mode("linear_logp", 1, "log-probabilities, forward only"),
    "rows": Mode("cross_entropy", 0, "logits made already, one loss per token"),
}


class Case(NamedTuple):
    """One mode at one shape."""

    mode: str
    dtype_name: str
    rows: int  # N
    width: int  # D
    classes: int  # V
    device: str

    family = "token_loss"

    @property
    def id(self) -> str:
        return f"{self.mode}-{self.dtype_name}-{self.rows}x{self.width}x{self.classes}"

    @property
    def about(self) -> Mode:
        return MODES[self.mode]

    @property
    def op(self) -> str:
        return self.about.op

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph does the same: none leaves out work by looking at the data."""
        return self.mode != "half"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def active_rows(self) -> int:
        return int(self.rows * self.about.active)

    @property
    def sweep(self) -> bool:
        """Whether it is a point of a curve on a CPU, which is timed for less long."""
        return self.device == "cpu" and self.width == SWEEP_WIDTH

    @property
    def flop(self) -> int:
        return self.about.products * 2 * self.active_rows * self.width * self.classes

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        if self.mode == "rows":
            return 2 * self.rows * self.classes * size
        directions = 1 if self.mode == "logp" else 2
        head = self.classes * self.width * (1 if self.mode == "frozen" else directions)
        return (self.active_rows * self.width * directions + head) * size

    @property
    def wants_head_grad(self) -> bool:
        return self.mode not in ("frozen", "logp", "rows")

    def describe(self) -> dict[str, object]:
        """The fields that name this case in a result row."""
        return {
            "family": self.family, "op": self.op, "mode": self.mode, "dtype": self.dtype_name,
            "shape": [self.rows, self.width, self.classes], "device": self.device,
        }  # fmt: skip


class Inputs(NamedTuple):
    """The tensors of a case; what is differentiated requires grad."""

    x: Tensor  # (N, D)
    head: Tensor  # (V, D)
    target: Tensor  # (N,)
    token_weight: Tensor  # (N,)
    upstream: Tensor  # (N,)
    logits: Tensor | None  # (N, V), for mode "rows"
    active: Tensor  # (N active, D), for the products alone
    classes: Tensor  # those whose part of the head's gradient is compared

    def copy(self) -> Inputs:
        """The same values in memory of their own."""
        return Inputs(
            *(
                None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
                for t in self
            )
        )


Outputs = dict[str, Tensor]


def make_inputs(case: Case) -> Inputs:
    """Deterministic data of the case; ``x`` and ``head`` depend on shape and dtype alone."""
    n, d, v = case.rows, case.width, case.classes
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device, generator=generator)

    x = normal(n, d).to(case.dtype)
    head = (normal(v, d) * (LOGIT_SPREAD / d**0.5)).to(case.dtype)
    target = torch.randint(v, (n,), device=case.device, generator=generator)
    token_weight = 2 * torch.rand(n, device=case.device, generator=generator)
    upstream = normal(n)
    if case.mode == "half":
        order = torch.randperm(n, device=case.device, generator=generator)
        target[order[: n // 4]] = IGNORED
        token_weight[order[n // 4 : n - case.active_rows]] = 0.0
    logits = None
    if case.mode == "rows":
        logits = torch.nn.functional.linear(x, head).requires_grad_()
    elif case.mode != "logp":
        x.requires_grad_()
        head.requires_grad_(case.wants_head_grad)
    active = x.detach()[: case.active_rows]
    # Half of them somebody's target, half all over the vocabulary.
    classes = torch.cat(
        [target[target != IGNORED][: SAMPLED // 2], _spread(v, case.device)]
    ).unique()
    return Inputs(x, head, target, token_weight, upstream, logits, active, classes)


def sample(case: Case, inputs: Inputs, outputs: Outputs) -> Outputs:
    """The part of a contender's outputs that is compared."""
    picked = dict(outputs)
    for name in ("grad_input", "grad_logits"):
        if name in picked:
            picked[name] = picked[name][_spread(case.rows, case.device)]
    if "grad_weight" in picked:
        picked["grad_weight"] = picked["grad_weight"][inputs.classes]
    return picked


def truth(case: Case, inputs: Inputs) -> Outputs:
    """What ``sample`` should hold, in float64."""
    keep = inputs.target != IGNORED
    target = inputs.target.where(keep, 0)
    rows = _spread(case.rows, case.device)
    if inputs.logits is not None:
        lse, chosen = _rows_lse(inputs.logits.detach(), target)
        z = inputs.logits.detach()[rows].double()
    else:
        head = inputs.head.detach().double()
        lse = _exact_lse(case.dtype_name, case.rows, case.width, case.classes, case.device)
        chosen = (inputs.x.detach().double() * head[target]).sum(-1)
        z = inputs.x.detach()[rows].double() @ head.T
    loss = (lse - chosen).masked_fill(~keep, 0.0)
    if case.mode == "logp":
        return {"loss": -loss}
    coef = coefficients(case, inputs).masked_fill(~keep, 0.0)
    probability = (z - lse[rows, None]).exp()
    probability.scatter_add_(1, target[rows, None], probability.new_full((len(rows), 1), -1.0))
    unit = probability * coef[rows, None]
    results = {"loss": (coef * loss).sum() if case.about.scalar else loss}
    if inputs.logits is not None:
        return {**results, "grad_logits": unit}
    results["grad_input"] = unit @ head
    if case.wants_head_grad:
        x = inputs.x.detach().double()
        grad = (x @ head[inputs.classes].T - lse[:, None]).exp()
        grad = grad - (target[:, None] == inputs.classes).double()
        results["grad_weight"] = (grad * coef[:, None]).T @ x
    return results


def coefficients(case: Case, inputs: Inputs) -> Tensor:
    """``d loss / d l_t`` in float64."""
    if not case.about.scalar:
        return inputs.upstream.double()
    count = (inputs.target != IGNORED).sum()
    if case.mode == "mean":
        return torch.ones_like(inputs.upstream, dtype=torch.float64) / count
    return inputs.token_weight.double() / count


def _spread(count: int, device: str) -> Tensor:
    """At most ``SAMPLED`` indices from the first to the last: every chunk has some."""
    return torch.linspace(0, count - 1, min(SAMPLED, count), device=device).round().long()


@lru_cache(maxsize=4)
def _exact_lse(dtype_name: str, rows: int, width: int, classes: int, device: str) -> Tensor:
    """Log-sum-exp of every row in float64, one block of logits at a time; modes share it."""
    case = Case("logp", dtype_name, rows, width, classes, device)
    inputs = make_inputs(case)
    head = inputs.head.double()
    return torch.cat([torch.logsumexp(x.double() @ head.T, -1) for x in _blocks(inputs.x, classes)])


def _rows_lse(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    lse = [torch.logsumexp(block.double(), -1) for block in _blocks(logits, logits.shape[1])]
    chosen = logits.gather(1, target[:, None]).squeeze(1).double()
    return torch.cat(lse), chosen


def _blocks(tensor: Tensor, classes: int) -> Iterator[Tensor]:
    yield from tensor.split(max(1, _TRUTH_BYTES // (8 * classes)))


def cases(device: str, *, quick: bool = False) -> list[Case]:
    """The suite: the rows of the targets, then a sweep over V and one over N."""
    if quick:
        modes = [Case(mode, dtype, 48, 32, 512, device)
                 for dtype in ("bfloat16", "float32") for mode in MODES]  # fmt: skip
        return [*modes, *(Case("weighted", "bfloat16", 48, 32, v, device) for v in (256, 1024))]
    suite = _cuda_cases() if device == "cuda" else _cpu_cases()
    return list(dict.fromkeys(suite))


def _cpu_cases() -> Iterator[Case]:
    for mode in ("weighted", "mean", "half", "none", "frozen", "logp", "rows"):
        yield Case(mode, "bfloat16", 2048, 1024, 32000, "cpu")
    for mode in ("weighted", "half", "none", "frozen", "logp", "rows"):
        yield Case(mode, "float32", 2048, 1024, 32000, "cpu")
    for classes in (8192, 16384, 32768, 65536, 131072):
        yield Case("weighted", "bfloat16", 1024, SWEEP_WIDTH, classes, "cpu")
    for rows in (512, 1024, 2048, 4096):
        yield Case("weighted", "bfloat16", rows, SWEEP_WIDTH, 32768, "cpu")


def _cuda_cases() -> Iterator[Case]:
    for mode in MODES:
        yield Case(mode, "bfloat16", 8192, 4096, 128256, "cuda")
    yield Case("weighted", "bfloat16", 8192, 2304, 256000, "cuda")
    yield Case("weighted", "float32", 4096, 2048, 32000, "cuda")
    for classes in (32000, 64000, 128256, 256000):
        yield Case("weighted", "bfloat16", 8192, 4096, classes, "cuda")
    for rows in (1024, 2048, 4096, 8192, 16384):
        yield Case("weighted", "bfloat16", rows, 4096, 128256, "cuda")
