"""The operators, one file each: checks, outputs, schemas, batch axes and the function that users call.

The operator `capsops::name` and its gradient, `capsops::name_backward`, are declared together as a
`_declare.Differentiable`.

Symbols: B batch, N input capsules, K their dimension, J output capsules, D their dimension; P rows of a capsule that is
a matrix.
"""
