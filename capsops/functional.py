"""The functions a user calls, gathered from `capsops.ops`.

Each checks its arguments, chooses a backend and is differentiable. Symbols: B batch, N input capsules, K their
dimension, J output capsules, D their dimension; P rows of a capsule that is a matrix.

dtypes: float32, bfloat16 and float16 with sums kept in float32; float64 throughout. All floating arguments of one call
must have the same dtype and device.

Autocast: every function runs in float32 (inputs of lower precision are cast up, as autocast does for norms and
softmax). The transformation matrices are by far the largest operand: casting them down would cost more than it saves.

Derivatives: `backward`, and grad, vjp, jacrev and vmap of `torch.func`. The compiled backends refuse second derivatives
and forward mode (jvp, jacfwd, hessian) with an error; `use_backend("reference")` allows them.

Graphs: torch.compile, torch.export, make_fx and torch.fx.symbolic_trace record the operators, whose gradients are those
of eager calls. torch.onnx.export and torch.jit.trace record the reference, so that the result runs where capsops is not
installed. torch.jit.script refuses them.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch.fx
from torch.jit._trace import TracerWarning

from .ops._checks import refuse_scripting
from .ops._declare import float32
from .ops.affine_votes import affine_votes
from .ops.attention import attention_routing
from .ops.coupling_coefficients import coupling_coefficients
from .ops.dynamic import dynamic_routing
from .ops.em import em_routing
from .ops.primary_capsules import primary_capsules
from .ops.self_attention import self_attention_routing
from .ops.squash import squash
from .ops.step import routing_step

__all__ = [
    "affine_votes",
    "attention_routing",
    "coupling_coefficients",
    "dynamic_routing",
    "em_routing",
    "float32",
    "primary_capsules",
    "routing_step",
    "self_attention_routing",
    "squash",
]

OPERATORS = (
    "squash",
    "primary_capsules",
    "affine_votes",
    "attention_routing",
    "dynamic_routing",
    "routing_step",
    "self_attention_routing",
    "em_routing",
)
FUNCTIONS = (*OPERATORS, "coupling_coefficients")

# torch.jit.trace warns of every comparison of sizes. These only refuse wrong sizes, so a trace holds for every B.
warnings.filterwarnings("ignore", category=TracerWarning, module=r"capsops\.")

for _name in FUNCTIONS:
    # torch.fx.symbolic_trace records a call of these as one node.
    torch.fx.wrap(_name)
    # torch.jit.script calls this first.
    vars(globals()[_name])["__prepare_scriptable__"] = partial(refuse_scripting, _name)
