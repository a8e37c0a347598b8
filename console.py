"""What every command of the command line shares: exit codes, options that several have, how results and progress are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

FINE, DIFFERS, CHECK_FAILED, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 130

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]
ModelPath = Annotated[Path, typer.Argument(metavar="ART", help="A compiled artifact; or an .onnx file, run as it is.")]
Threads = Annotated[int | None, typer.Option(help="Threads of a step (default: the CPUs that this process may use).")]
Memory = Annotated[str | None, typer.Option(help='What model files and cache may take together, such as "2GiB".')]


def print_result(as_json: bool, data: Any, text: str) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False) if as_json else text, flush=True)


def say(message: str) -> None:
    """A line of progress. On standard error, so that standard output holds the result alone."""
    print(f"· {message}", file=sys.stderr, flush=True)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Progress of something long: a spinner on a terminal, a line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        say(message)
        yield
        return
    with console.status(message):
        yield
    say(message)
