"""A model, an artifact or a snapshot's text as a canonical `Snapshot`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ...errors import ModelError
from ...models.artifact import GRAPH
from ...models.external_data import model_file
from .graph import Snapshot
from .parse import parse
from .read import read_onnx_snapshot
from .write import HEADER

_MOST_TEXT = 64 << 20


def read_snapshot(source: str | PathLike[str], *, weights: bool = True) -> Snapshot:
    """The canonical form of an `.onnx`, of an artifact's graph (a folder), or of a text that `octavo snapshot` wrote.

    Structure alone: weights are hashed in chunks where they lie, nothing is run and no library is loaded.
    `weights=False` tells them by type alone, for where their files are not. ModelError or UnsafePathError.
    """
    path = Path(source)
    if path.is_dir():
        path = path / GRAPH
        if not path.exists():
            raise ModelError(f"{path.parent} is a folder without {GRAPH}", hint="give an artifact's folder, an .onnx file or a snapshot")
    path = model_file(path)
    return parse(_text(path)) if is_snapshot(path) else read_onnx_snapshot(path, weights=weights)


def is_snapshot(source: str | PathLike[str]) -> bool:
    """Whether a file begins as a snapshot's text does."""
    path = Path(source)
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(HEADER)) == HEADER.encode()


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_TEXT:
        raise ModelError(f"{path} is longer than any snapshot", hint="octavo snapshot MODEL -o FILE writes one")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is no snapshot: it is not UTF-8", hint="octavo snapshot MODEL -o FILE writes one") from error
