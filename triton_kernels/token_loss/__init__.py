"""Token loss, log-probability and entropy of rows of logits, with their gradients.

For a row ``raw`` with target ``y``, in float32::

    u_v   = logit_scale * raw_v
    z_v   = softcap * tanh(u_v / softcap) * inv_temperature    (no softcap: u_v * inv_temperature)
    m     = max_v z_v                   s_y = z_y - m
    rest  = sum_{v != y} exp(z_v - m)   total = rest + exp(s_y)      1 - p_y = rest / total
    nll   = log(total) - s_y            (log1p(rest / exp(s_y)) where p_y > 1/2)
    lse   = m + log(total)
    H     = log(total) - sum_v exp(z_v - m) (z_v - m) / total

The target stays out of ``rest``: where ``p_y`` is near 1, ``1 - p_y`` and ``nll`` would otherwise
be differences of nearly equal numbers. Every gradient has one form, with row scalars P, K and S::

    d raw_v = f_v (p_v (P - K (log p_v + H)) - S w_v)    for v != y,    f_v = d z_v / d raw_v

and a scalar of its own for ``v = y``. One program takes one row, in two passes. The first keeps a
running maximum and sum in each lane (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018) and combines the lanes once, at the end of the row. The second reads the row again,
last tile first because that one is the likeliest still in the L2 cache, and writes the gradient,
which may be in place: the sums over the lanes stand between the last read of the first pass and the
first write. A tile that holds neither the target nor the end of the row runs without masks.

The launchers take the arguments of the row operators in ``trimtab._schemas``, in their order; the
caller has checked them. They allocate nothing and return nothing.
"""

from .logp import token_logp_rows, token_logp_rows_backward
from .loss import accumulate, token_loss_rows

__all__ = ["accumulate", "token_logp_rows", "token_logp_rows_backward", "token_loss_rows"]
