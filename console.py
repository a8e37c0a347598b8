"""What every command of the command line shares: exit codes, how results and progress are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

FINE, DIFFERS, CHECK_FAILED, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 130

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]


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
