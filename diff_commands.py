"""The commands that compare graphs: snapshot, diff, git-setup."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Json, print_result

app = typer.Typer()


@app.command(epilog="Example: octavo snapshot model.onnx -o model.graph.txt")
def snapshot(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, an artifact, or a snapshot.")],
    *,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="File to write (default: standard output).")] = None,
    as_json: Json = False,
) -> None:
    """Write a graph as canonical text.

    Weights by content hash, repeated layers once; the same text for the same graph, whatever names and order it was exported with.
    """
    from . import snapshot as run_snapshot

    text = run_snapshot(model)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    print_result(as_json, {"snapshot": text} if out is None else {"wrote": str(out)}, text.rstrip("\n") if out is None else f"wrote {out}")
