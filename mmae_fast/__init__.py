"""Matrix entropy, fast and right, for self-supervised learning."""

from . import information
from .ops import effective_rank, fast_coding_rate, fast_gram, fast_matrix_entropy

__version__ = "0.1.0"
__all__ = ["effective_rank", "fast_coding_rate", "fast_gram", "fast_matrix_entropy", "information"]
