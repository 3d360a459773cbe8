"""The operators, one file each: schema, checks, outputs, gradient, batch rule and the function that users call.

An operator `capsops::name` is declared by a function under its schema (`_declare.operator`). That function takes the
operator's arguments, checks them and allocates the outputs: a backend then fills them; for fake tensors the function is
the shape rule that torch.compile and torch.export use. The gradient of `name` is the operator `name_backward`;
`_declare.Differentiable` ties the two together.

Symbols: B batch, N input capsules, K their dimension, J output capsules, D their dimension; P rows of a capsule that is
a matrix.
"""
