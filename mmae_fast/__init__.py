"""Matrix entropy, fast and right, for self-supervised learning."""

from . import information
from .ops import effective_rank, fast_coding_rate, fast_gram, fast_matrix_entropy

__version__ = "0.1.0"
__all__ = [
    "EntropyMonitor",
    "effective_rank",
    "fast_coding_rate",
    "fast_gram",
    "fast_matrix_entropy",
    "information",
]


def __getattr__(name: str) -> type:
    if name == "EntropyMonitor":  # loaded when it is asked for
        from .monitor import EntropyMonitor

        return EntropyMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
