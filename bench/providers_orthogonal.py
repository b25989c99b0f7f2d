"""Who takes part in the orthogonal benchmark, and how each is called.

Loops get their gradients from autograd, as in a trainer. The batched and grouped products get
theirs by hand, which saves them a pass: autograd would multiply the signs by ones first. Nobody is
asked for more than the value and the gradients, or the projected tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import trimtab
from cases_orthogonal import Case, Inputs, Outputs, named
from measure import Step
from released_orthogonal import walked_penalty
from suite import Provider, always, not_here

READ = "one read"
READS = "one read, tensor by tensor"
LOOP = "flattened loop"
PUBLISHED = "published loop"

_LLAMA_MODULES = 64


def finish(inputs: Inputs, value: Tensor) -> Outputs:
    """The value and the gradients that the case asks for."""
    outputs = {"value": value.detach()}
    due = inputs.due()
    if not due:
        return outputs
    grads = iter(torch.autograd.grad(value, [t for leaves in due.values() for t in leaves]))
    for kind, leaves in due.items():
        outputs |= named(kind, [next(grads) for _ in leaves])
    return outputs


# Ours


def ours_step(impl: str) -> Callable[[Case], Step]:
    """The operator of trimtab for the case."""

    def step(case: Case) -> Step:
        def penalty(inputs: Inputs) -> Outputs:
            value = trimtab.orthogonal_penalty(
                inputs.previous, inputs.current(), norm=case.about.norm, impl=impl
            )
            return finish(inputs, value)

        def project(inputs: Inputs) -> Outputs:
            return named("out", trimtab.project_out(inputs.current(), inputs.previous, impl=impl))

        return project if case.projects else penalty

    return step


def ours_why_not(impl: str) -> Callable[[Case], str | None]:
    """The package's own reason, for tensors of the case's dtype and device."""

    def why_not(case: Case) -> str | None:
        x = [torch.empty(1, 1, dtype=case.dtype, device=case.device)]
        return not_here(case.op, case.device, impl, x, x)

    return why_not


def _reference_is_slow(case: Case) -> str | None:
    shown = {"l1": "float32", "ragged": "float32", "adapters": "float32"}
    if shown.get(case.mode) == case.dtype_name and not case.sweep:
        return None
    return "the oracle is not made for speed; other cases show it"


# Reads


def read_step(case: Case) -> Step:
    """The largest of the earlier rows' bits, as integers: a read that costs any dtype the same.

    What the case has to write is written, zeros, into fresh memory; of gradients only those of the
    earlier rows count, the others are small.
    """

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        outputs = {"largest": _largest(inputs.flat_previous)}
        if case.about.grad_previous:
            outputs["grad_previous"] = torch.empty_like(inputs.flat_previous).zero_()
        if case.projects:
            outputs["largest_current"] = _largest(inputs.flat_current)
            outputs["out"] = torch.empty_like(inputs.flat_current).zero_()
        return outputs

    return step


def reads_step(case: Case) -> Step:
    """The same read with a call for every tensor."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        tensors = [t for stored in inputs.stored_previous for t in stored]
        return named("largest", [_largest(t) for t in tensors])

    return step


def _largest(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32).amax()


# Loops


def size(case: Case, products: Tensor) -> Tensor:
    """The norm of the products."""
    return products.abs().sum() if case.about.norm == "l1" else products.square().sum()


def looped_penalty(case: Case, inputs: Inputs) -> Tensor:
    """The sum over all pairs of earlier and new rows."""
    value: Tensor | int = 0
    for p, c in inputs.pairs():
        value = value + size(case, p @ c.T)
    return value


def loop_step(case: Case, wrap: Callable[[Callable], Callable] = lambda f: f) -> Step:
    """A loop over the modules, or what ``wrap`` makes of it."""
    if case.projects:

        @torch.no_grad()
        def project(inputs: Inputs) -> Outputs:
            return named("out", [t - (t @ q.T) @ q for q, t in inputs.pairs()])

        return project
    value = wrap(lambda inputs: looped_penalty(case, inputs))
    return lambda inputs: finish(inputs, value(inputs))


def compiled_step(case: Case) -> Step:
    """torch.compile of the loop, anew for every case."""
    torch._dynamo.reset()
    return loop_step(case, lambda function: torch.compile(function, dynamic=False))


def published_step(case: Case) -> Step:
    """The released code's loop, which finds the partners by walking over all parameters."""
    return lambda inputs: finish(inputs, walked_penalty(inputs.model))


def projector_step(case: Case) -> Step:
    """GPM's released code: a product with a (d, d) matrix, which it makes ahead, per module."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        pairs = zip(inputs.current(), inputs.projectors, strict=True)
        return named("out", [t - t @ projector for t, projector in pairs])

    return step


# All modules in one product


def slope(case: Case, products: Tensor) -> Tensor:
    """The derivative of the norm with respect to the products."""
    return products.sign() if case.about.norm == "l1" else 2 * products


def batched(case: Case, p: Tensor, c: Tensor) -> Outputs:  # (M, R, d), (M, r, d)
    """Value and gradients, or projected tensors, with torch.bmm."""
    if case.projects:
        out = torch.baddbmm(c, torch.bmm(c, p.mT), p, alpha=-1)
        return named("out", out.unbind())
    products = torch.bmm(p, c.mT)
    outputs = {"value": size(case, products)}
    if case.about.backward:
        s = slope(case, products)
        columns = case.about.layout == "columns"
        grad = torch.bmm(p.mT, s) if columns else torch.bmm(s.mT, p)
        outputs |= named("grad_current", grad.unbind())
        if case.about.grad_previous:
            outputs |= named("grad_previous", torch.bmm(s, c).unbind())
    return outputs


def bmm_step(case: Case) -> Step:
    """Copies of the parameters, stacked in every call."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        p, c = [p for p, _ in inputs.pairs()], torch.stack(inputs.current())
        together = torch.stack(p)
        if case.about.layout == "tasks":
            together = together.view(len(c), -1, c.shape[-1])
        return batched(case, together, c)

    return step


def bmm_ahead_step(case: Case) -> Step:
    """Parameters that a user keeps as views of stacked ones."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        return batched(case, *inputs.stacks())

    return step


def grouped_step(case: Case) -> Step:
    """``F.grouped_mm`` over rows that are kept one module after the other."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        previous, c = inputs.stacks()
        p = previous.flatten(0, 1)
        products = F.grouped_mm(p, c.mT, offs=inputs.ends)
        outputs = {"value": size(case, products)}
        if case.about.backward:
            s = slope(case, products)
            grad = F.grouped_mm(s.t(), p, offs=inputs.ends)
            outputs |= named("grad_current", grad.unbind())
            if case.about.grad_previous:
                grad = F.grouped_mm(s, c, offs=inputs.ends)
                outputs |= named("grad_previous", grad.view_as(previous).unbind())
        return outputs

    return step


def foreach_step(case: Case) -> Step:
    """``torch._foreach_mm`` over lists of parameters."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        p, c = inputs.previous, inputs.current()
        if case.projects:
            inside = torch._foreach_mm(torch._foreach_mm(c, [q.mT for q in p]), p)
            return named("out", torch._foreach_sub(c, inside))
        products = torch._foreach_mm(p, [t.mT for t in c])
        l1 = case.about.norm == "l1"
        norms = torch.stack(torch._foreach_norm(products, 1 if l1 else 2))
        outputs = {"value": (norms if l1 else norms.square()).sum()}
        if case.about.backward:
            s = torch._foreach_sign(products) if l1 else torch._foreach_mul(products, 2)
            left, right = [t.mT for t in s], p
            if case.about.layout == "columns":
                left, right = [t.mT for t in p], s
            outputs |= named("grad_current", torch._foreach_mm(left, right))
            if case.about.grad_previous:
                outputs |= named("grad_previous", torch._foreach_mm(s, c))
        return outputs

    return step


# Who can't


def _bmm_why_not(case: Case) -> str | None:
    return None if case.equal else "a batch needs equal shapes"


def _ahead_why_not(case: Case) -> str | None:
    if case.about.layout == "tasks":
        return "the tasks' tensors of a module are kept apart, so that they are stacked in the call"
    return _bmm_why_not(case)


def _grouped_why_not(case: Case) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if case.about.layout == "columns":
        return "needs the rows of all modules one after the other"
    if case.device == "cuda" and case.dtype != torch.bfloat16:
        return "takes bfloat16 alone on a GPU"
    return _ahead_why_not(case)


def _foreach_why_not(case: Case) -> str | None:
    if not hasattr(torch, "_foreach_mm"):
        return f"torch {torch.__version__} has no _foreach_mm"
    if case.about.layout == "tasks":
        return "makes one product for each task, whose gradients would have to be added up"
    return None


def _compile_why_not(case: Case) -> str | None:
    if case.mode == "l1" and case.shape[0] <= _LLAMA_MODULES and not case.sweep:
        return None
    return "unrolls the loop, which takes minutes to compile; LLaMA's q, v with l1 shows it"


def _compiles(case: Case) -> str:
    return "takes a minute to compile"


def _shows_launches(case: Case) -> bool:
    """Where a graph would hide what the host takes for the launches."""
    return case.device == "cuda" and bool(case.model)


def _penalises(case: Case) -> bool:
    return not case.projects


PROVIDERS = (
    Provider(READ, read_step, always, checked=False),
    Provider(READS, reads_step, always, checked=False,
             concerns=lambda case: case.mode in ("l1", "all_linear", "tasks")),
    Provider(LOOP, loop_step, always),
    *(
        Provider(f"trimtab {impl}", ours_step(impl), ours_why_not(impl), impl=impl,
                 costly=_reference_is_slow if impl == "reference" else always)
        for impl in ("native", "triton", "reference")
    ),
    Provider("trimtab triton, launched", ours_step("triton"), ours_why_not("triton"),
             impl="triton", capturable=False, concerns=_shows_launches),
    Provider(LOOP + ", launched", loop_step, always, capturable=False, concerns=_shows_launches),
    Provider(PUBLISHED, published_step, always, capturable=False,
             concerns=lambda case: bool(case.model)),
    Provider("bmm", bmm_step, _bmm_why_not),
    Provider("bmm, stacked ahead", bmm_ahead_step, _ahead_why_not),
    Provider("grouped_mm, stacked ahead", grouped_step, _grouped_why_not, concerns=_penalises),
    Provider("foreach_mm", foreach_step, _foreach_why_not),
    Provider("torch.compile", compiled_step, _compile_why_not, compiles=True, costly=_compiles,
             concerns=_penalises),
    Provider("GPM's projectors", projector_step, always,
             concerns=lambda case: case.mode == "gpm"),
)  # fmt: skip
