"""How far one distribution over the next token is from another, row by row, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]


def log_probabilities(logits: Row) -> NDArray[np.float64]:
    """Of one row of logits (V,)."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted))))


def divergence(log_q: NDArray[np.float64], log_p: NDArray[np.float64]) -> float:
    """KL(p ‖ q) in nats of log-probabilities; 0 at least, where rounding would say less."""
    return max(0.0, float(np.dot(np.exp(log_p), log_p - log_q)))
