"""Matrix entropy, fast and right, for self-supervised learning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import information
    from .monitor import EntropyMonitor
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

# Loaded when they are asked for, and with them torch and the operators of ``torch.ops.mmae_fast``:
# the command line answers without.
_MODULES = {
    "EntropyMonitor": "monitor",
    "effective_rank": "ops",
    "fast_coding_rate": "ops",
    "fast_gram": "ops",
    "fast_matrix_entropy": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    value = getattr(module, name) if name in _MODULES else module
    globals()[name] = value  # found at once from here on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
