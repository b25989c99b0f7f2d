"""Code that was written for another fused loss: the import changes, the call stays.

``trimtab.compat.cce`` stands in for ``cut_cross_entropy``, ``trimtab.compat.liger`` for
``liger_kernel.transformers.functional`` and ``...fused_linear_cross_entropy``.
"""

from __future__ import annotations

import torch

from trimtab.compat.cce import linear_cross_entropy
from trimtab.compat.liger import LigerFusedLinearCrossEntropyLoss


def main() -> list[float]:
    """The same mean loss by either interface, and by plain PyTorch."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 16, 32, requires_grad=True)
    head = torch.nn.Linear(32, 128, bias=False)
    ids = torch.randint(128, (4, 16))

    cce = linear_cross_entropy(hidden, head.weight, ids, shift=True)

    flat, target = hidden[:, :-1].reshape(-1, 32), ids[:, 1:].reshape(-1)
    liger = LigerFusedLinearCrossEntropyLoss()(head.weight, flat, target)

    plain = torch.nn.functional.cross_entropy(head(flat), target)
    (cce + liger).backward()
    print(f"cce {cce.item():.6f}, liger {liger.item():.6f}, plain {plain.item():.6f}")
    return [cce.item(), liger.item(), plain.item()]


if __name__ == "__main__":
    main()
