"""How tokens come out: sessions over compiled models, and plain graphs as they stand."""

from __future__ import annotations

from .config import RuntimeOptions
from .load import load
from .model import Model
from .results import Completion, Piece, Result, TokenLogprob, Usage
from .sampling import SamplingParams
from .session import Sequence, Session

__all__ = [
    "Completion", "Model", "Piece", "Result", "RuntimeOptions", "SamplingParams", "Sequence", "Session", "TokenLogprob", "Usage", "load",
]
