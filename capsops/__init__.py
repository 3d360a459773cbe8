"""Capsule routing as a stream: compiled kernels that never materialise the votes.

    v = capsops.dynamic_routing(u, weight, iterations=3)      # u [B, N, K], weight [N, K, J, D] -> v [B, J, D]

`capsops.nn` has the layers, `capsops.info()` says what was built and what runs here.
"""

import torch.fx

from . import functional, nn, parallel
from ._version import __version__ as __version__
from .backends import BackendError, info, use_backend
from .functional import (
    affine_votes,
    attention_routing,
    coupling_coefficients,
    dynamic_routing,
    em_routing,
    primary_capsules,
    routing_step,
    self_attention_routing,
    squash,
)
from .memory import release_memory

# torch.fx.symbolic_trace records a call by the names of this module as one node too.
for _name in functional.FUNCTIONS:
    torch.fx.wrap(_name)

__all__ = [
    "BackendError",
    "affine_votes",
    "attention_routing",
    "coupling_coefficients",
    "dynamic_routing",
    "em_routing",
    "info",
    "nn",
    "parallel",
    "primary_capsules",
    "release_memory",
    "routing_step",
    "self_attention_routing",
    "squash",
    "use_backend",
]
