"""Contrast of rows of logits: the combination, a target's log-probability, a sampled token.

For a positive row p, a negative row n and an anchor a (p unless given), in float32::

    d_v = p_v - n_v  (equal infinities cancel)      z_v = a_v + alpha d_v   (-inf where a_v is)
    z_v = -inf  where a_v < max a + log(beta)        s_v = z_v / T           m = max s
    logp_y = log softmax(s)_y                        ds_v = g (delta_vy - p_v) / T
    token  = argmax over the kept v of (s_v - m) + g_v,   g_v = -log(-log(1 - x_v))

every operation rounded once (no fused products, division as IEEE has it), so that tokens are those
of the other implementations, bit for bit; x_v comes from Philox4x32-10 at ``(seed, position, v)``.
Kept is what top-k, top-p and min-p leave, in that order; of equal scores at the end of top-p the
lowest indices leave first.

One program takes one row. To sample, it reads the row for the maximum (after a reading of the
anchor where there is a mask), keeping the largest score of every place in its tiles. The k-th
largest of those bounds the k-th largest score from below. A second reading lists the scores from
that bound on, in the order of their indices, with the mass of the rest; the filters and the draw
work on the list. Where it does not fit, a threshold is bracketed by readings of the row that test
several pivots each, until what is left fits, or is one value; then the draw reads the row. Without
a filter the second reading is the draw. The row is never sorted, and no probabilities are written.

The launchers take the arguments of the row operators in ``trimtab._schemas``, in their order; the
caller has checked them. They return nothing; sampling allocates its list.
"""

from .combine import contrastive_logits_rows
from .logp import contrastive_logp_rows, contrastive_logp_rows_backward
from .sample import contrastive_sample_rows

__all__ = [
    "contrastive_logits_rows",
    "contrastive_logp_rows",
    "contrastive_logp_rows_backward",
    "contrastive_sample_rows",
]
