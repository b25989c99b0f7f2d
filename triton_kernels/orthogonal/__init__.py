"""Overlaps of the rows of many pairs of matrices, and what lies in each other's span.

For each module with previous rows P (R, d) and current rows C (r, d), in float32::

    G = P C^T
    value = sum_m w_m sum |G|      S = sign(G)     dC = w S^T P     dP = w S C      (l1)
    value = sum_m w_m sum G^2      S = G           dC = 2 w S^T P   dP = 2 w S C    (frobenius2)
    out   = C - G^T P                                               (P orthonormal: a projection)

Three launches, whatever the number of modules, tasks and bytes. The first cuts every module's P
into blocks of rows and slices of d, and writes each slice's part of G. The second adds the parts in
their order, and makes S and a value for each piece of G. The third reads P again, last module first
because that one is the likeliest still in the L2 cache, and multiplies by S; its first program adds
the values. Nothing is added by atomics: the same inputs give the same bits.

The tensors stay where they are. A table on the device says where each row begins, so that a block
may hold the rows of several tasks; it is built once for a set of tensors (`table`).

The launchers take the arguments of the row operators in ``trimtab._schemas``, in their order; the
caller has checked them. float64 is for other implementations. They return nothing; each allocates
its parts of G.
"""

from .penalty import orthogonal_penalty_rows
from .project import project_out_rows

__all__ = ["orthogonal_penalty_rows", "project_out_rows"]
