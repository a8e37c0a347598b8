"""`octavo.snapshot`: what users call."""

from __future__ import annotations

from os import PathLike

from .source import read_snapshot
from .write import write


def snapshot(model: str | PathLike[str]) -> str:
    """The canonical text of an `.onnx`, an artifact, or a snapshot: equal for graphs that compute the same in the same way.

    Reads the structure alone: weights are hashed in chunks where they lie, nothing is run, no library is loaded. Raises ModelError or
    UnsafePathError.
    """
    return write(read_snapshot(model))
