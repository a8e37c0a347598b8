"""`octavo plan`: what fits into how much memory, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Json, print_result

app = typer.Typer()


@app.command(epilog="Example: octavo plan art/ --memory 2GiB")
def plan(
    artifact: Annotated[Path, typer.Argument(metavar="ART", help="A compiled artifact.")],
    *,
    memory: Annotated[str | None, typer.Option(help='What model files and cache may take together, such as "2GiB" (default: as load has it).')] = None,
    block_size: Annotated[int, typer.Option(help="Token slots of a cache block.")] = 32,
    as_json: Json = False,
) -> None:
    """Tell how many sequences of which length fit into memory.

    Reads the manifest alone. Exits with 3, and the arithmetic, where not one block fits.
    """
    from .runtime.memory_plan import plan_memory

    found = plan_memory(artifact, memory=memory, block_size=block_size)
    print_result(as_json, found.to_json(), found.to_text())
