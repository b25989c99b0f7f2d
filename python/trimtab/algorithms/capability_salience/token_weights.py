"""What weighs the tokens: families of weights, and the matrix they read in blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Block = tuple[Tensor, Tensor, Tensor]  # centred NLL (M, n), its mean over models (n,), basis (P, n)

_BLOCK_ENTRIES = 2**24  # of the weighted copies of a block's basis: 64 MiB in float32
_BLOCK_TOKENS_CPU = 4096  # the fastest of 1024, 2048, ... 16384 on two AVX-512 cores
_BLOCK_TOKENS_DEVICE = 65536


class TokenWeights(Protocol):
    """A family of token weights with P parameters, linear in the log: ``w = softmax(basis^T p)``.

    Give a class these two members and pass an instance as ``weights=``. A step of the fit costs
    ``2 P (P + M) N`` FLOP per capability, and a P by P eigenvalue problem: keep P at some hundreds.
    """

    transfers: bool
    """Whether ``basis`` depends on the features alone, so that new text can be weighed."""

    def basis(
        self,
        nll: Tensor,  # (M, n)
        features: Tensor | None,  # (n, F)
    ) -> Tensor:  # (P, n)
        """Basis of a block of n tokens; ``nll`` is centred over the models of the fit."""
        ...


class TableWeights:
    """One free weight per token (``weights="table"``): the basis is the matrix itself, P = M."""

    transfers = False

    def basis(self, nll: Tensor, features: Tensor | None) -> Tensor:
        """The centred NLL."""
        if features is not None:
            raise ValueError("features must be None with weights='table', got features; use 'head'")
        return nll


class HeadWeights:
    """A linear head on features of the tokens (``weights="head"``), as a frozen model's states."""

    transfers = True

    def basis(self, nll: Tensor, features: Tensor | None) -> Tensor:
        """The features."""
        if features is None:
            raise ValueError("features must be given with weights='head', got None; pass (N, F)")
        return features.mT


class TokenMatrix:
    """A matrix with one column per token, handed out in blocks, float32 or (if it is) float64.

    Args:
        values: (R, N) floating tensor, NumPy array or memmap; never copied as a whole.
        name: what errors call it.
        rows: indices of the rows to hand out; None for all.
    """

    def __init__(self, values: Any, name: str, rows: Tensor | None = None) -> None:
        is_tensor = isinstance(values, Tensor)
        floating = values.is_floating_point() if is_tensor else _is_floating_array(values)
        if not floating:
            kind = getattr(values, "dtype", type(values).__name__)
            raise TypeError(
                f"{name} must be a floating tensor or NumPy array, got {kind}; convert it"
            )
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(
                f"{name} must be a matrix that is not empty, got shape {tuple(values.shape)}; "
                "pass two dimensions"
            )
        self.values, self.name, self.rows = values, name, rows
        self.shape = (values.shape[0] if rows is None else len(rows), values.shape[1])
        self.dtype = torch.float64 if str(values.dtype).endswith("float64") else torch.float32
        self.device = values.device if is_tensor else torch.device("cpu")
        on_cpu = self.device.type == "cpu"
        self.block_tokens = _BLOCK_TOKENS_CPU if on_cpu else _BLOCK_TOKENS_DEVICE

    def select(self, rows: Tensor) -> TokenMatrix:
        """The same matrix with only these rows."""
        return TokenMatrix(self.values, self.name, rows)

    def columns(self, low: int, high: int) -> Tensor:
        """Columns ``low`` to ``high`` as a tensor on the matrix's device."""
        block = self.values[:, low:high]
        if isinstance(block, Tensor):
            block = block.detach()
            rows = slice(None) if self.rows is None else self.rows.to(self.device)
            block = block[rows].to(self.dtype)
            # Sums in another order would have other bits.
            return block if block.stride(1) == 1 else block.contiguous()
        block = block if self.rows is None else block[self.rows.numpy()]
        return torch.from_numpy(
            np.array(block, dtype=str(self.dtype).removeprefix("torch."), order="C")
        )

    def blocks(self, width: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """All columns, some at a time, each time with the index of the first."""
        width = width or self.block_tokens
        for low in range(0, self.shape[1], width):
            yield low, self.columns(low, low + width)


def feature_matrix(features: Any) -> TokenMatrix:  # (N, F) -> F rows
    """Features as a matrix with one column per token."""
    return TokenMatrix(TokenMatrix(features, "features").values.T, "features")


def _is_floating_array(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind == "f"


class TokenBlocks:
    """Passes over the matrix: centred blocks with their basis, brought to mean 0 and variance 1.

    The weights do not change when the basis is shifted or, with its parameters, scaled; features
    with a large mean would lose their digits in the covariances.
    """

    def __init__(self, matrix: TokenMatrix, provider: TokenWeights, features: Any) -> None:
        self.matrix, self.provider = matrix, provider
        self.features = None if features is None else feature_matrix(features)
        if self.features is not None and self.features.shape[1] != matrix.shape[1]:
            raise ValueError(
                f"features must have one row per token ({matrix.shape[1]}), got "
                f"{self.features.shape[1]}; pass (N, F)"
            )
        self.shift = self.scale = torch.ones((), dtype=torch.float64)
        first = next(self._raw(1))
        self.rank = len(first[2])
        self.is_table = first[2] is first[0]
        if not self.is_table:
            self._measure()

    def _measure(self) -> None:
        total = square = torch.zeros(self.rank, dtype=torch.float64)
        for _, _, basis in self._raw(1):
            total = total + basis.sum(1, dtype=torch.float64).cpu()
        mean = total / self.matrix.shape[1]
        for _, _, basis in self._raw(1):
            square = square + (basis - mean.to(basis)[:, None]).square().sum(1).cpu().double()
        deviation = (square / self.matrix.shape[1]).sqrt()
        if not bool(torch.isfinite(deviation).all()):
            raise ValueError("features must be finite, got NaN or infinity; leave out such tokens")
        self.shift, self.scale = mean, torch.where(deviation > 0, deviation, 1.0)

    def read(self, vectors: int) -> Iterator[Block]:
        """One pass, in blocks that fit ``vectors`` weighted copies of the basis."""
        for contrast, mean, basis in self._raw(vectors):
            if not self.is_table:
                basis = (basis - self.shift.to(basis)[:, None]) / self.scale.to(basis)[:, None]
            yield contrast, mean, basis

    def _raw(self, vectors: int) -> Iterator[Block]:
        rank = max(getattr(self, "rank", 1), self.matrix.shape[0])
        width = max(min(self.matrix.block_tokens, _BLOCK_ENTRIES // (vectors * rank)), 1)
        for low, block in self.matrix.blocks(width):
            mean = block.mean(0)
            contrast = block - mean
            part = None if self.features is None else self.features.columns(low, low + width).mT
            basis = self.provider.basis(contrast, None if part is None else part.to(block))
            if basis.ndim != 2 or basis.shape[1] != block.shape[1]:
                raise ValueError(
                    f"weights must give a basis of shape (P, {block.shape[1]}), got "
                    f"{tuple(basis.shape)}; see TokenWeights"
                )
            yield contrast, mean, basis.to(block).contiguous()

    def weights(self, params: Tensor, log_norm: Tensor) -> Tensor:  # (C, P), (C,) -> (C, N)
        """The weights themselves, normalised, on the CPU."""
        parts = []
        for _, _, basis in self.read(len(params)):
            u = (params.to(basis) @ basis).cpu().double()
            parts.append(torch.exp(u - log_norm[:, None]).to(self.matrix.dtype))
        return torch.cat(parts, 1)
