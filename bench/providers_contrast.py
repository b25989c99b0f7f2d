"""Who takes part in the contrast benchmark, and how each is called.

Samplers are asked for a token per row and nothing else; their probes hand over the distribution
that the token was drawn from, for the check, untimed. Peers that know one row of logits get the
contrasted one from eager's line.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import trimtab
from cases_contrast import ALPHA, Case, Inputs
from measure import Outputs, Step
from suite import Provider, always, not_here
from truth_contrast import sampling_arguments

READ = "one read"
PRODUCTS = "products alone"
EAGER = "eager"
CHAIN = "Hugging Face chain"


def floor_of(case: Case) -> str:
    """The name of the case's floor."""
    return PRODUCTS if case.about.products else READ


def finish(inputs: Inputs, logp: Tensor) -> Outputs:
    """The log-probabilities and the gradients that the case asks for."""
    leaves = {"grad_positive": inputs.positive, "grad_negative": inputs.negative,
              "grad_head": inputs.head}  # fmt: skip
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    outputs = {"logp": logp.detach()}
    if not wanted:
        return outputs
    grads = torch.autograd.grad(logp, list(wanted.values()), inputs.upstream.to(logp.dtype))
    return {**outputs, **dict(zip(wanted, grads, strict=True))}


# Ours


def ours_step(impl: str) -> Callable[[Case], Step]:
    """The operator of trimtab for the case."""

    def step(case: Case) -> Step:
        filters = sampling_arguments(case.about.filters)

        def logits(inputs: Inputs) -> Outputs:
            made = trimtab.contrastive_logits(
                inputs.positive, inputs.negative, alpha=ALPHA,
                plausibility=case.about.filters.plausibility, impl=impl,
            )  # fmt: skip
            return {"logits": made}

        def logp(inputs: Inputs) -> Outputs:
            p, n, target = inputs.positive, inputs.negative, inputs.target
            if inputs.head is None:
                return finish(
                    inputs, trimtab.contrastive_logp(p, n, target, alpha=ALPHA, impl=impl)
                )
            head = inputs.head
            return finish(
                inputs, trimtab.linear_contrastive_logp(p, n, head, target, alpha=ALPHA, impl=impl)
            )

        def draw(inputs: Inputs) -> Outputs:
            p, n = inputs.positive, inputs.negative
            if inputs.head is not None:
                drawn = trimtab.linear_contrastive_sample(
                    p, n, inputs.head, alpha=ALPHA, **filters, impl=impl
                )
            else:
                drawn = trimtab.contrastive_sample(
                    p, n, anchor=inputs.anchor, alpha=ALPHA, **filters, impl=impl
                )
            return drawn._asdict()

        if case.about.draws:
            return draw
        return logits if case.op == "contrastive_logits" else logp

    return step


def ours_why_not(impl: str) -> Callable[[Case], str | None]:
    """The package's own reason, for tensors of the case's dtype and device."""

    def why_not(case: Case) -> str | None:
        x = torch.empty(1, 1, dtype=case.dtype, device=case.device)
        target = torch.zeros(1, dtype=torch.int64, device=case.device)
        arguments = [x, x]
        if case.about.products:
            arguments.append(x)
        if case.op.endswith("logp"):
            arguments.append(target)
        return not_here(case.op, case.device, impl, *arguments, alpha=ALPHA)

    return why_not


def _reference_is_slow(case: Case) -> str | None:
    shown = {"topk_topp": "float32", "logits": "bfloat16", "logp": "float32"}
    if shown.get(case.mode) == case.dtype_name and not case.sweep:
        return None
    return "the oracle is not made for speed; other cases show it"


# Torch


def logits_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Both rows of logits; with a head two products."""
    if inputs.head is None:
        return inputs.positive, inputs.negative
    return F.linear(inputs.positive, inputs.head), F.linear(inputs.negative, inputs.head)


def contrasted(case: Case, inputs: Inputs) -> Tensor:
    """The contrast and the mask, in the dtype of the rows."""
    p, n = logits_of(inputs)
    if inputs.anchor is not None:
        return inputs.anchor + ALPHA * (p - n)
    z = (1 + ALPHA) * p - ALPHA * n
    beta = case.about.filters.plausibility
    if beta is None:
        return z
    return z.masked_fill(p < p.amax(-1, keepdim=True) + math.log(beta), -math.inf)


def candidates(case: Case, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the tokens that the filters leave, and which tokens they are.

    Sorting the whole row is saved where top-k comes first.
    """
    filters = case.about.filters
    if filters.temperature != 1.0:
        z = z / filters.temperature
    index = None
    if filters.top_k is not None:
        z, index = z.topk(filters.top_k)
    elif filters.top_p is not None:
        z, index = z.sort(descending=True)
    probability = z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    if filters.top_p is not None:
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= filters.top_p, 0.0)
    if filters.min_p is not None:
        least = filters.min_p * probability.amax(-1, keepdim=True)
        probability = probability.masked_fill(probability < least, 0.0)
    return probability, index


def eager_draw(case: Case, inputs: Inputs) -> Tensor:
    """A token per row, in the least torch code."""
    z = contrasted(case, inputs)
    if case.about.filters.temperature == 0.0:
        return z.argmax(-1)
    probability, index = candidates(case, z)
    token = torch.multinomial(probability, 1)
    return (token if index is None else index.gather(1, token)).squeeze(1)


def eager_values(case: Case, inputs: Inputs) -> Tensor:
    """Contrasted logits or log-probabilities; the contrast in float32, as its results are."""
    p, n = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in logits_of(inputs))
    z = (1 + ALPHA) * p - ALPHA * n
    beta = case.about.filters.plausibility
    if beta is not None:
        z = z.masked_fill(p < p.amax(-1, keepdim=True) + math.log(beta), -math.inf)
    if case.op == "contrastive_logits":
        return z
    return z.log_softmax(-1).gather(1, inputs.target[:, None]).squeeze(1)


def eager_step(case: Case, wrap: Callable[[Callable], Callable] = lambda f: f) -> Step:
    """Eager, or what ``wrap`` makes of it."""
    if case.about.draws:
        draw = wrap(lambda inputs: eager_draw(case, inputs))
        return lambda inputs: {"token": draw(inputs)}
    values = wrap(lambda inputs: eager_values(case, inputs))
    if case.op == "contrastive_logits":
        return lambda inputs: {"logits": values(inputs)}
    return lambda inputs: finish(inputs, values(inputs))


def eager_probe(case: Case) -> Step:
    """Eager's distribution over the vocabulary."""

    def probe(inputs: Inputs) -> Outputs:
        if not case.about.draws or case.about.filters.temperature == 0.0:
            return {}
        z = contrasted(case, inputs)
        probability, index = candidates(case, z)
        if index is not None:
            probability = probability.new_zeros(z.shape).scatter_(1, index, probability)
        return {"probability": probability / probability.sum(-1, keepdim=True)}

    return probe


def compiled_step(case: Case) -> Step:
    """torch.compile of eager, anew for every case: a function is compiled for a few shapes only."""
    torch._dynamo.reset()
    return eager_step(case, lambda function: torch.compile(function, dynamic=False))


def read_step(case: Case) -> Step:
    """The largest of the rows' bits, as integers: a read of torch that costs any dtype the same.

    What the case has to write is written, zeros, into fresh memory.
    """

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        rows = [t for t in (inputs.positive, inputs.negative, inputs.anchor) if t is not None]
        outputs = {f"largest_{i}": t.view(torch.int32).amax() for i, t in enumerate(rows)}
        if case.op == "contrastive_logits":
            outputs["logits"] = torch.empty_like(rows[0], dtype=torch.float32).zero_()
        if case.about.backward:
            outputs |= {f"grad_{i}": torch.empty_like(t).zero_() for i, t in enumerate(rows)}
        return outputs

    return step


def products_step(case: Case) -> Step:
    """The products that the case can't do without, each into fresh memory."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        hidden, head = inputs.positive, inputs.head
        logits = torch.mm(hidden, head.t())
        outputs = {"logits": logits}
        if case.about.products == 4:
            outputs["logits"] = torch.mm(hidden, head.t())
            outputs["grad_hidden"] = torch.mm(logits, head)
            outputs["grad_head"] = torch.mm(logits.t(), hidden)
        return outputs

    return step


# Others


def chain_distribution(case: Case) -> Callable[[Inputs], Tensor]:
    """Guidance, then the warpers of ``generate``, as transformers orders and computes them.

    The formula is that of ``UnbatchedClassifierFreeGuidanceLogitsProcessor``, which runs a model
    and so can't be called here: the first row in float32, as ``generate`` hands it over, the other
    log-softmax in the model's dtype.
    """
    from transformers.generation import logits_process as hf

    filters = case.about.filters
    chain: list[Callable[..., Tensor]] = []
    if filters.temperature not in (0.0, 1.0):
        chain.append(hf.TemperatureLogitsWarper(filters.temperature))
    if filters.top_k is not None:
        chain.append(hf.TopKLogitsWarper(filters.top_k))
    if filters.top_p is not None:
        chain.append(hf.TopPLogitsWarper(filters.top_p))
    if filters.min_p is not None:
        chain.append(hf.MinPLogitsWarper(filters.min_p))

    def guided(inputs: Inputs) -> Tensor:
        p, n = logits_of(inputs)
        conditional = p.to(torch.promote_types(p.dtype, torch.float32)).log_softmax(-1)
        other = n.log_softmax(-1)
        scores = (1 + ALPHA) * (conditional - other) + other
        for warper in chain:
            scores = warper(None, scores)
        return scores

    return guided


def _chain_why_not(case: Case) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if case.about.read == 3:
        return "transformers has no guidance with a third row"
    if case.about.filters.plausibility is not None:
        return "transformers has no plausibility mask; the VCD recipe has"
    return None


def vcd_scores(case: Case) -> Callable[[Inputs], Tensor]:
    """What the released code of VCD (Leng et al., CVPR 2024) puts into ``generate``."""

    def scores(inputs: Inputs) -> Tensor:
        p, n = logits_of(inputs)
        beta = torch.tensor(case.about.filters.plausibility, device=p.device)
        cutoff = torch.log(beta) + p.max(dim=-1, keepdim=True).values
        difference = (1 + ALPHA) * p - ALPHA * n
        return difference.masked_fill(p < cutoff, -float("inf"))

    return scores


def _draws_plausibly(case: Case) -> bool:
    return _draws(case) and case.about.filters.plausibility is not None


Scored = Callable[[Case], Callable[[Inputs], Tensor]]


def drawn(scored: Scored) -> Callable[[Case], Step]:
    """A step out of masked scores: softmax and multinomial, or argmax, as in ``generate``."""

    def step(case: Case) -> Step:
        scores = scored(case)
        if case.about.filters.temperature == 0.0:
            return lambda inputs: {"token": scores(inputs).argmax(-1)}
        return lambda inputs: {
            "token": torch.multinomial(F.softmax(scores(inputs), -1), 1).squeeze(1)
        }

    return step


def scores_probe(scored: Scored) -> Callable[[Case], Step]:
    def probe(case: Case) -> Step:
        if case.about.filters.temperature == 0.0:
            return lambda inputs: {}
        scores = scored(case)
        return lambda inputs: {"probability": F.softmax(scores(inputs), -1)}

    return probe


def flashinfer_step(case: Case) -> Step:
    """Eager's contrast, then FlashInfer's sampler for the filters."""
    from flashinfer import sampling

    filters = case.about.filters

    def step(inputs: Inputs) -> Outputs:
        z = contrasted(case, inputs).float()
        if filters.min_p is not None:
            probability = sampling.softmax(z, temperature=filters.temperature)
            token = sampling.min_p_sampling_from_probs(probability, filters.min_p)
        elif filters.top_k is None and filters.top_p is None:
            token = sampling.sampling_from_logits(z)
        elif filters.top_k is None:
            token = sampling.top_p_sampling_from_probs(sampling.softmax(z), filters.top_p)
        else:
            token = sampling.top_k_top_p_sampling_from_logits(
                z, filters.top_k, filters.top_p or 1.0, filter_apply_order="top_k_first"
            )
        return {"token": token}

    return step


def vllm_step(case: Case) -> Step:
    """Eager's contrast, then vLLM's top-k/top-p kernel and its own way to draw."""
    from vllm.v1.sample.ops.topk_topp_sampler import random_sample
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

    filters = case.about.filters

    def step(inputs: Inputs) -> Outputs:
        z = contrasted(case, inputs).float()
        rows = z.shape[0]
        top_k = None if filters.top_k is None else z.new_full((rows,), filters.top_k).int()
        top_p = None if filters.top_p is None else z.new_full((rows,), filters.top_p)
        masked = apply_top_k_top_p_triton(z, top_k, top_p)
        return {"token": random_sample(masked.softmax(-1), {})}

    return step


def _sampler_why_not(module: str, takes: Callable[[Case], bool]) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if case.device == "cpu":
            return f"{module}'s kernels need a GPU"
        if case.about.filters.temperature == 0.0:
            return f"greedy needs no sampler; {module} has none for it"
        return None if takes(case) else f"{module} has no call for these filters together"

    return why_not


def _flashinfer_takes(case: Case) -> bool:
    filters = case.about.filters
    if filters.min_p is not None:
        return filters.top_k is None and filters.top_p is None
    return filters.temperature == 1.0


def _vllm_takes(case: Case) -> bool:
    filters = case.about.filters
    filtered = filters.top_k is not None or filters.top_p is not None
    return filtered and filters.min_p is None and filters.temperature == 1.0


def _draws(case: Case) -> bool:
    return case.about.draws


def _has_head(case: Case) -> bool:
    return case.about.products > 0


def _has_no_head(case: Case) -> bool:
    return case.about.products == 0


def _compiles(case: Case) -> str:
    return "each shape takes up to a minute to compile"


PROVIDERS = (
    Provider(READ, read_step, always, checked=False, concerns=_has_no_head),
    Provider(PRODUCTS, products_step, always, checked=False, concerns=_has_head),
    Provider(EAGER, eager_step, always, probe=eager_probe),
    *(
        Provider(f"trimtab {impl}", ours_step(impl), ours_why_not(impl), impl=impl,
                 costly=_reference_is_slow if impl == "reference" else always)
        for impl in ("native", "triton", "reference")
    ),
    Provider("torch.compile", compiled_step, always, compiles=True, costly=_compiles,
             probe=eager_probe),
    Provider(CHAIN, drawn(chain_distribution), _chain_why_not, concerns=_draws,
             probe=scores_probe(chain_distribution)),
    Provider("VCD recipe", drawn(vcd_scores), always, concerns=_draws_plausibly,
             probe=scores_probe(vcd_scores)),
    Provider("flashinfer", flashinfer_step, _sampler_why_not("flashinfer", _flashinfer_takes),
             concerns=_draws),
    Provider("vllm", vllm_step, _sampler_why_not("vllm", _vllm_takes), concerns=_draws),
)  # fmt: skip
