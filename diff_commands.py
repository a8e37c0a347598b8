"""The commands that compare graphs: snapshot, diff, git-setup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import FINE, Json, print_result, say
from .errors import OptionError

if TYPE_CHECKING:
    from .compiler.diff import GraphDiff

app = typer.Typer()

_FORMATS = ("text", "markdown", "json", "junit", "sarif", "github", "html")


@app.command(epilog="Example: octavo snapshot model.onnx -o model.graph.txt")
def snapshot(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, an artifact, or a snapshot.")],
    *,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="File to write (default: standard output).")] = None,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Hash weights, or tell them by type alone.")] = True,
    as_json: Json = False,
) -> None:
    """Write a graph as canonical text.

    Weights by content hash, repeated layers once; the same text for the same graph, whatever names and order it was exported with.
    """
    from . import snapshot as run_snapshot

    text = run_snapshot(model, weights=weights)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    print_result(as_json, {"snapshot": text} if out is None else {"wrote": str(out)}, text.rstrip("\n") if out is None else f"wrote {out}")


@app.command(epilog="Example: octavo diff model.onnx art/ --no-policy")
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="An .onnx file, an artifact, or a snapshot.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The same.")],
    *,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Rules (default: octavo.diff.toml here, if there is one).")] = None,
    no_policy: Annotated[bool, typer.Option("--no-policy", help="Read no policy.")] = False,
    numeric: Annotated[
        bool | None, typer.Option("--numeric/--no-numeric", help="Run both sides and compare their numbers (default: if the policy asks for one)."),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="What to print: " + ", ".join(_FORMATS) + ".")] = "text",
    write: Annotated[list[str] | None, typer.Option(metavar="FORMAT=FILE", help="Write a file too; may be given several times.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write AFTER's snapshot over BEFORE, which is one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Update even where more than a fifth of the nodes changed.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the token ids of --numeric.")] = 0,
    as_json: Json = False,
) -> None:
    """Show what changed between two graphs.

    One line a change, however many layers it is in. Exit code 0: the same; 1: differs, within policy; 2: the policy is violated.
    """
    from . import diff as run_diff
    from .compiler.diff.policy import POLICY_FILE

    files = [_destination(entry) for entry in write or ()]
    _known(form)
    if policy is None and not no_policy and Path(POLICY_FILE).is_file():
        policy = Path(POLICY_FILE)
    found = run_diff(before, after, policy=None if no_policy else policy, numeric=numeric, update=update, force=force, seed=seed, progress=say)
    for name, path in files:
        path.write_text(_rendered(found, name, before, after), encoding="utf-8")
    if as_json or form == "json":
        print_result(True, found.to_json(), "")
    elif form == "text":
        from rich.console import Console

        from .compiler.diff.render_terminal import show

        show(found, Console())
    else:
        print(_rendered(found, form, before, after), end="")
    raise typer.Exit(FINE if update else found.exit_code)


def _destination(entry: str) -> tuple[str, Path]:
    name, sign, path = entry.partition("=")
    if not sign or not path:
        raise OptionError(f"--write {entry} names no file", hint="--write junit=report.xml")
    _known(name)
    return name, Path(path)


def _known(form: str) -> None:
    if form not in _FORMATS:
        raise OptionError(f"there is no format {form!r}", hint=f"one of {', '.join(_FORMATS)}")


def _rendered(found: GraphDiff, form: str, before: Path, after: Path) -> str:
    from . import __version__
    from .compiler.diff.render_ci import to_github, to_junit, to_sarif

    if form == "html":
        from .compiler.diff.html import page
        from .compiler.diff.source import read_snapshot

        return page(found, read_snapshot(before), read_snapshot(after))
    if form == "json":
        import json

        return json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n"
    makers = {
        "text": lambda: found.to_text() + "\n", "markdown": found.to_markdown, "junit": lambda: to_junit(found),
        "sarif": lambda: to_sarif(found, __version__), "github": lambda: to_github(found),
    }
    return str(makers[form]())


_GIT = ("git config diff.octavo.textconv 'octavo snapshot --no-weights'", "echo '*.onnx diff=octavo' >> .gitattributes")


@app.command("git-setup", epilog="Example: octavo git-setup")
def git_setup(as_json: Json = False) -> None:
    """Print the two lines that make git show graphs.

    With them `git diff` and `git log -p` show .onnx files as canonical text. Weights are told by type: git hands over one file at a time.
    """
    print_result(as_json, {"commands": list(_GIT)}, "\n".join(_GIT))
