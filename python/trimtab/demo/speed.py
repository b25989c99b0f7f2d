"""Section: trimtab's token loss against the usual lines of PyTorch, on a model of the family."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import trimtab
from trimtab.demo.corpus import DOMAINS, windows
from trimtab.demo.section import Context, Figure, Paragraph, Result, Section, Table
from trimtab.testing import error_budget, max_error

_EAGER, _OURS = "eager PyTorch", "trimtab"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """One way to make the loss and its gradients."""

    seconds: float  # forward and backward, median
    peak: int  # bytes allocated at a time beyond inputs and gradients
    errors: dict[str, float]  # largest error against float64, per output
    over: list[str]  # outputs whose error is beyond twice eager's plus one rounding


def eager_loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """The loss as transformers makes it: all logits, in float32."""
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def trimtab_loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """The loss without logits."""
    return trimtab.linear_cross_entropy(hidden, head, target)


_LOSSES: dict[str, Loss] = {_EAGER: eager_loss, _OURS: trimtab_loss}


def run(context: Context) -> Result:
    """Time, extra memory and error of both, in float32 and bfloat16, and a whole training step."""
    settings = context.settings
    family = context.family
    size = settings.plan.sizes[-1]
    mixture = settings.plan.mixtures[0]
    checkpoint = next(
        c for c in reversed(family.checkpoints) if c.run.size == size and c.run.mixture == mixture
    )
    model = family.model(checkpoint)
    rows = _rows(context)
    with torch.no_grad():
        hidden = model.model(input_ids=rows[:, :-1]).last_hidden_state
    head, target = model.lm_head.weight.detach(), rows[:, 1:]
    found: dict[str, dict[str, Measured]] = {}
    with context.timed("ours against eager"), context.bar(3, "ours against eager", "case") as bar:
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            inputs = hidden.to(dtype), head.to(dtype), target
            found[name] = compare(*inputs, rounds=settings.speed_rounds)
            bar.update()
        step = _training_step(model.train(), rows, 1 + settings.speed_rounds // 4)
        bar.update()
    return _result(context, found, step, hidden, head)


def compare(hidden: Tensor, head: Tensor, target: Tensor, rounds: int) -> dict[str, Measured]:
    """Both losses on the same tensors, timed in turns."""
    truth = _values(eager_loss_64, hidden.double(), head.double(), target)
    calls = {name: partial(_values, loss, hidden, head, target) for name, loss in _LOSSES.items()}
    seconds = interleaved(calls, rounds)
    values = {name: call() for name, call in calls.items()}
    budget = {k: error_budget(values[_EAGER][k], truth[k], hidden.dtype) for k in truth}
    found = {}
    for name, call in calls.items():
        errors = {what: max_error(values[name][what], truth[what]) for what in truth}
        over = [what for what in truth if errors[what] > budget[what]]
        found[name] = Measured(seconds[name], extra_memory(call), errors, over)
    return found


def eager_loss_64(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """The truth: float64 throughout."""
    return F.cross_entropy(F.linear(hidden, head).flatten(0, -2), target.flatten())


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every call, taken in turns after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def extra_memory(call: Callable[[], dict[str, Tensor]]) -> int:
    """Most bytes that torch had allocated at a time during a call, beyond what the call returns.

    Read from the profiler's trace of allocations, so that it is exact and the same every time.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = peak = 0
    for _, change in memory:
        now += change
        peak = max(peak, now)
    return peak - sum(value.untyped_storage().nbytes() for value in kept.values())


def _values(loss: Loss, hidden: Tensor, head: Tensor, target: Tensor) -> dict[str, Tensor]:
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    value = loss(hidden, head, target)
    grads = torch.autograd.grad(value, [hidden, head])
    return {"loss": value.detach(), "hidden gradient": grads[0], "head gradient": grads[1]}


def _training_step(model: Any, rows: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of forward and backward of the whole model under each loss."""

    def step(loss: Loss) -> None:
        hidden = model.model(input_ids=rows[:, :-1]).last_hidden_state
        loss(hidden, model.lm_head.weight, rows[:, 1:]).backward()
        model.zero_grad(set_to_none=True)

    return interleaved({name: partial(step, loss) for name, loss in _LOSSES.items()}, rounds)


def _rows(context: Context) -> Tensor:  # (B, T + 1)
    length = context.settings.plan.context + 1
    half = context.settings.speed_windows // 2
    parts = [windows(context.corpus.splits["train"][d].ids, length)[:half] for d in DOMAINS]
    return torch.cat([torch.from_numpy(part.copy()) for part in parts])


def _result(
    context: Context,
    found: dict[str, dict[str, Measured]],
    step: dict[str, float],
    hidden: Tensor,
    head: Tensor,
) -> Result:
    tokens, (vocabulary, width) = hidden[..., 0].numel(), head.shape
    rows = [
        [
            dtype,
            name,
            f"{1e3 * one.seconds:.1f}",
            f"{one.peak / 2**20:.1f}",
            *(f"{error:.1e}" for error in one.errors.values()),
        ]
        for dtype, both in found.items()
        for name, one in both.items()
    ]
    columns = [f"error: {what}" for what in found["float32"][_OURS].errors]
    table = Table(
        f"Loss and its two gradients for {tokens} tokens, width {width}, {vocabulary} token ids. "
        "Time is the median of turns taken one after the other; memory is the most that was "
        "allocated at a time beyond inputs and gradients; errors are the largest ones against "
        "float64 on the same inputs.",
        ["dtype", "loss", "time, ms", "extra memory, MiB", *columns],
        rows,
        labels=2,
    )
    whole = Paragraph(
        "Forward and backward of the whole model in float32 take "
        f"{1e3 * step[_EAGER]:.0f} ms with eager PyTorch's loss and "
        f"{1e3 * step[_OURS]:.0f} ms with trimtab's."
    )
    numbers = {
        "tokens": tokens,
        "width": width,
        "vocabulary": vocabulary,
        "loss": {
            dtype: {
                name: {
                    "seconds": m.seconds,
                    "extra_bytes": m.peak,
                    "largest_error": m.errors,
                    "over_budget": m.over,
                }
                for name, m in both.items()
            }
            for dtype, both in found.items()
        },
        "whole_step_seconds": step,
    }
    verdict = [sentence(dtype, both[_OURS], both[_EAGER]) for dtype, both in found.items()]
    return Result(verdict, table, [_figure(context, found), whole], numbers)


def sentence(dtype: str, ours: Measured, eager: Measured) -> str:
    """What the numbers of one dtype say, whichever way they went."""
    time_ratio, memory_ratio = eager.seconds / ours.seconds, eager.peak / max(1, ours.peak)
    time = (
        f"{time_ratio:.2f} times as fast as"
        if time_ratio >= 1
        else f"{1 / time_ratio:.2f} times slower than"
    )
    memory = (
        f"{memory_ratio:.1f} times less"
        if memory_ratio >= 1
        else f"{1 / memory_ratio:.1f} times more"
    )
    error = (
        f"its error is beyond twice eager's and one rounding in the {' and the '.join(ours.over)}"
        if ours.over
        else "its errors are within twice eager's and one rounding"
    )
    return (
        f"In {dtype}, trimtab's loss is {time} eager PyTorch and takes {memory} extra memory; "
        f"{error}."
    )


def _figure(context: Context, found: dict[str, dict[str, Measured]]) -> Figure:
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(7.2, 2.6), layout="constrained")
    panels = (
        ("time, ms", lambda m: 1e3 * m.seconds),
        ("extra memory, MiB", lambda m: m.peak / 2**20),
    )
    for axis, (label, value) in zip(figure.subplots(1, 2), panels, strict=True):
        for offset, (name, colour) in enumerate(((_EAGER, "0.6"), (_OURS, "#c2571a"))):
            heights = [value(both[name]) for both in found.values()]
            places = [index + 0.38 * offset - 0.19 for index in range(len(found))]
            bars = axis.bar(places, heights, width=0.34, color=colour, label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axis.set_xticks(range(len(found)), list(found))
        axis.set_ylabel(label)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return context.save(figure, "speed", "Loss and gradients on the same model and batch.")


SECTION = Section("speed", "The loss itself: trimtab against eager PyTorch", run)
