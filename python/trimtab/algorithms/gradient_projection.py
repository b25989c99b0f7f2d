"""Gradient projection: updates of a linear layer that leave what it does to earlier inputs alone.

A linear layer's update D changes its output for an input x by D x. If the rows of D are orthogonal
to the inputs of earlier tasks, those tasks' outputs stay as they are, layer by layer. With Q (k, d)
an orthonormal basis of these inputs, that is::

    D <- D - (D Q^T) Q        for all layers together, by trimtab.project_out

GPM (Saha, Garg and Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021) takes as Q
the smallest number of singular vectors of a task's inputs that hold a share ``energy`` of their sum
of squares, counting what earlier tasks' vectors hold already. OGD (Farajtabar et al., "Orthogonal
Gradient Descent for Continual Learning", AISTATS 2020) takes gradients of earlier tasks instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.ops.orthogonal import project_out

_Removable = Any


class GradientProjection:
    """Keeps updates orthogonal to the inputs of earlier tasks.

    ::

        projection = GradientProjection(model)
        projection.attach(optimizer)
        for task in tasks:
            train(model, optimizer, task)
            projection.protect(task.batches)

    Args:
        model: any module. Protected are the weights of its ``nn.Linear`` layers (LoRA's ``lora_A``
            and ``lora_B`` are such layers) that require grad when ``protect`` is called; biases,
            embeddings and norms are not.
        impl: implementation of ``project_out``; None for the fastest available.

    Attributes:
        bases: name of a weight -> its orthonormal rows (k, d), float32. For inputs d is the
            layer's; for gradients it is the number of the weight's elements.
    """

    def __init__(self, model: nn.Module, *, impl: str | None = None) -> None:
        self.model, self.impl = model, impl
        self.bases: dict[str, Tensor] = {}

    def layers(self) -> dict[str, nn.Linear]:
        """Name of a weight -> its layer, for every linear layer whose weight requires grad.

        Raises:
            ValueError: two of them share a weight.
        """
        found = {
            f"{name}.weight": layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad
        }
        if len({id(layer.weight) for layer in found.values()}) < len(found):
            raise ValueError(
                "model must not share a weight between linear layers, got some that do; untie them"
            )
        return found

    def _parameters(self) -> dict[str, nn.Parameter]:
        """By name; a head that is tied to the embedding has both names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def protect(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        energy: float = 0.97,
        samples: int = 1024,
        forward: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> dict[str, int]:
        """Adds the inputs that the layers see on these batches to what must not change (GPM).

        Dropout is off meanwhile. Where a batch has an ``attention_mask`` of the leading shape of a
        layer's input, padding is left out.

        Cost: a forward pass of the batches until every layer has its samples, and a singular value
        decomposition of ``samples`` x d per layer.

        Args:
            batches: keyword arguments of the model.
            energy: share of the inputs' sum of squares that the basis has to hold, in (0, 1].
            samples: inputs per layer at most, the first ones.
            forward: runs a batch; ``model(**batch)`` unless given.

        Returns:
            Name of each weight -> directions added.

        Raises:
            ValueError: ``energy`` or ``samples`` out of range, no layer that requires grad, or a
                layer's basis is of gradients.
            RuntimeError: no layer saw an input.
        """
        if not 0.0 < energy <= 1.0:
            raise ValueError(f"energy must be in (0, 1], got {energy}; the paper uses 0.95 to 0.99")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}; some hundreds are usual")
        layers = self.layers()
        if not layers:
            raise ValueError(
                "model must have an nn.Linear whose weight requires grad, got none; call protect "
                "before the task's weights are frozen"
            )
        run = forward or (lambda batch: self.model(**batch))
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        with _evaluating(self.model), _recording(layers, seen, samples) as mask:
            for batch in batches:
                mask[:] = [batch.get("attention_mask")]
                run(batch)
                if all(sum(map(len, rows)) >= samples for rows in seen.values()):
                    break
        if not any(seen.values()):
            raise RuntimeError(
                "batches must reach a linear layer, got none that did; check that they are not "
                "empty"
            )
        return {
            name: self._extend(name, torch.cat(rows)[:samples], energy)
            for name, rows in seen.items()
            if rows
        }

    @torch.no_grad()
    def protect_gradients(self) -> dict[str, int]:
        """Adds the present ``.grad`` of every layer's weight as a direction of its own (OGD).

        The paper stores gradients of the model's outputs, one vector over all parameters. This
        keeps one vector for each weight, which is stricter: orthogonal in every weight is
        orthogonal as a whole.

        Returns:
            Name of each weight -> directions added: 1, or 0 where the gradient adds nothing.

        Raises:
            ValueError: no layer has a gradient, or a layer's basis is of inputs.
        """
        grads = {
            name: layer.weight.grad
            for name, layer in self.layers().items()
            if layer.weight.grad is not None
        }
        if not grads:
            raise ValueError("model must have gradients, got none; call backward() first")
        return {name: self._extend(name, g.reshape(1, -1), 1.0) for name, g in grads.items()}

    def _extend(self, name: str, rows: Tensor, energy: float) -> int:
        """Adds the fewest directions of ``rows`` (n, d) that bring the basis to ``energy``."""
        rows = rows.float()
        basis = self.bases.get(name, rows[:0])
        if basis.shape[1] != rows.shape[1]:
            raise ValueError(
                f"bases[{name!r}] must have {rows.shape[1]} columns for this, got "
                f"{basis.shape[1]}; inputs and gradients need a GradientProjection each"
            )
        (rest,) = project_out([rows], [basis], impl=self.impl)
        _, size, directions = torch.linalg.svd(rest, full_matrices=False)
        total = rows.square().sum()
        held = total - rest.square().sum()
        if held >= energy * total:
            return 0
        wanted = int((held + size.square().cumsum(0) < energy * total).sum()) + 1
        # What rounding leaves of rows that the basis holds already is no direction.
        count = min(wanted, int((size > 1e-5 * total.sqrt()).sum()))
        # Once more: the first projection left its rounding in the small directions.
        (fresh,) = project_out([directions[:count]], [basis], impl=self.impl)
        self.bases[name] = torch.cat([basis, torch.linalg.qr(fresh.mT).Q.mT])
        return count

    @torch.no_grad()
    def project(self) -> None:
        """Takes the protected part out of every ``.grad``, all layers in one call."""
        parameters = self._parameters()
        grads = {
            name: parameters[name].grad
            for name in self.bases
            if name in parameters and parameters[name].grad is not None
        }
        self._project_in_place(grads)  # type: ignore[arg-type]

    def _project_in_place(self, tensors: dict[str, Tensor]) -> None:
        rows = [t.reshape(-1, self.bases[name].shape[1]) for name, t in tensors.items()]
        found = project_out(rows, [self.bases[name] for name in tensors], impl=self.impl)
        for t, out in zip(tensors.values(), found, strict=True):
            t.copy_(out.view(t.shape))

    def attach(self, optimizer: torch.optim.Optimizer, *, of: str = "update") -> _Removable:
        """Projects at every ``optimizer.step()``.

        Args:
            optimizer: any optimizer of the model's parameters.
            of: "update" projects what the step did to the weights, which keeps the promise for
                Adam, momentum from before ``protect`` and weight decay alike, to the rounding of
                the weights: small steps of 16-bit weights are mostly rounding. It needs a copy of
                the protected weights during the step. "gradient" projects ``.grad`` before the
                step, as in the papers: right for SGD without weight decay.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            ValueError: ``of`` is neither.
        """
        if of == "gradient":
            return optimizer.register_step_pre_hook(lambda *_: self.project())
        if of != "update":
            raise ValueError(
                f'of must be "update" or "gradient", got {of!r}; "update" is right for every '
                "optimizer"
            )
        return _UpdateHooks(self, optimizer)

    def state_dict(self) -> dict[str, Tensor]:
        """The bases, to be saved beside the model."""
        return dict(self.bases)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over saved bases, onto the devices of the weights.

        Raises:
            ValueError: a name or a width that the model does not have.
        """
        parameters = self._parameters()
        for name, basis in state.items():
            if name not in parameters:
                raise ValueError(f"state must name weights of the model, got {name!r}; check both")
            shape = parameters[name].shape
            if basis.dim() != 2 or basis.shape[1] not in (shape[-1], shape.numel()):
                raise ValueError(
                    f"state[{name!r}] must have {shape[-1]} columns, got {tuple(basis.shape)}; "
                    "it belongs to another model"
                )
        self.bases = {
            name: basis.to(parameters[name].device, torch.float32) for name, basis in state.items()
        }


class _UpdateHooks:
    """Projects the difference that a step makes."""

    def __init__(self, projection: GradientProjection, optimizer: torch.optim.Optimizer) -> None:
        self.projection, self.before = projection, dict[str, Tensor]()
        self.handles = [
            optimizer.register_step_pre_hook(lambda *_: self.remember()),
            optimizer.register_step_post_hook(lambda *_: self.correct()),
        ]

    def weights(self) -> dict[str, Tensor]:
        parameters = self.projection._parameters()
        return {n: parameters[n] for n in self.projection.bases if n in parameters}

    @torch.no_grad()
    def remember(self) -> None:
        self.before = {name: weight.detach().clone() for name, weight in self.weights().items()}

    @torch.no_grad()
    def correct(self) -> None:
        weights = self.weights()
        steps = {n: weights[n] - before for n, before in self.before.items()}
        self.projection._project_in_place(steps)
        for name, before in self.before.items():
            weights[name].copy_(before + steps[name])
        self.before = {}

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within it; every module's mode as before after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _recording(
    layers: dict[str, nn.Linear], seen: dict[str, list[Tensor]], samples: int
) -> Iterator[list[Any]]:
    """Appends the layers' inputs to ``seen``; the list that it yields holds the present mask."""
    mask: list[Any] = [None]

    def hook(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            left = samples - sum(map(len, seen[name]))
            if left <= 0:
                return
            x, keep = next(iter((*inputs, *named.values()))).detach(), mask[0]
            if isinstance(keep, Tensor) and keep.shape == x.shape[:-1]:
                x = x[keep.to(x.device).bool()]
            seen[name].append(x.reshape(-1, x.shape[-1])[:left].clone())

        return record

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield mask
    finally:
        for handle in handles:
            handle.remove()
