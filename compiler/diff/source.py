"""`octavo.snapshot`: a model, an artifact or a snapshot's text as a canonical `Snapshot`."""

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


def read_snapshot(source: str | PathLike[str]) -> Snapshot:
    """The canonical form of an `.onnx`, of an artifact's graph (a folder), or of a text that `octavo snapshot` wrote.

    Structure alone: weights are hashed in chunks where they lie, nothing is run and no library is loaded. ModelError or UnsafePathError.
    """
    path = Path(source)
    if path.is_dir():
        path = path / GRAPH
        if not path.exists():
            raise ModelError(f"{path.parent} is a folder without {GRAPH}", hint="give an artifact's folder, an .onnx file or a snapshot")
    path = model_file(path)
    with path.open("rb") as stream:
        begins = stream.read(len(HEADER))
    return parse(_text(path)) if begins == HEADER.encode() else read_onnx_snapshot(path)


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_TEXT:
        raise ModelError(f"{path} is longer than any snapshot", hint="octavo snapshot MODEL -o FILE writes one")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is no snapshot: it is not UTF-8", hint="octavo snapshot MODEL -o FILE writes one") from error
