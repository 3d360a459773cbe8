from ..prediction.conftest import phantom, runs

__all__ = ["phantom", "runs"]
