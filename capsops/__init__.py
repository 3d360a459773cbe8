"""Capsule routing as a stream: compiled kernels that never materialise the votes.

    v = capsops.dynamic_routing(u, weight, iterations=3)      # u [B, N, K], weight [N, K, J, D] -> v [B, J, D]

`capsops.nn` has the layers, `capsops.info()` says what was built and what runs here.
"""

__version__ = "0.1.0"

import torch.fx

from . import functional, nn
from .backends import BackendError, info, use_backend
from .couplings import coupling_coefficients
from .functional import (
    affine_votes,
    attention_routing,
    dynamic_routing,
    em_routing,
    primary_capsules,
    self_attention_routing,
    squash,
)
from .memory import release_memory

# Under the names that they have here too, torch.fx.symbolic_trace records them as one node.
for _name in functional.OPERATORS:
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
    "primary_capsules",
    "release_memory",
    "self_attention_routing",
    "squash",
    "use_backend",
]
