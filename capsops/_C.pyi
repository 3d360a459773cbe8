from typing import Any

compiler: str
cuda_architectures: str | None
Dtype: Any
Status: Any
SquashKind: Any
Capsules: Any

def __getattr__(kernel: str) -> Any: ...
