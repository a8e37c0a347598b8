"""A diff for a terminal: rich where there is colour, the same lines as plain text elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO

from rich.console import Console
from rich.text import Text

from .model import Cost, Edit, GraphDiff, Verdict

STYLES = {
    "inserted": "green", "removed": "red", "replaced": "yellow", "rewired": "magenta", "attribute": "cyan", "constant": "cyan", "weight": "cyan",
    "dtype": "yellow", "shape": "yellow", "interface": "bold", "opset": "bold",
}
SIGNS = {"inserted": "+", "removed": "−", "replaced": "±"}
_SHOWN = 3


def to_text(diff: GraphDiff) -> str:
    """Plain text, a line an edit."""
    stream = StringIO()
    show(diff, Console(file=stream, force_terminal=False, no_color=True, width=1000))
    return stream.getvalue().rstrip("\n")


def show(diff: GraphDiff, console: Console) -> None:
    for line in _lines(diff):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def headline(diff: GraphDiff) -> str:
    """One sentence: whether anything changed, and what the policy says."""
    total = sum(edit.count for edit in diff.edits)
    kinds = len(diff.edits)
    changed = f"{kinds} kinds of change at {total} places" if total != kinds else f"{total} change{'s' if total > 1 else ''}" if total else "no change"
    failed = [verdict for verdict in diff.verdicts if not verdict.ok]
    policy = f"; the policy is VIOLATED ({len(failed)} of {len(diff.verdicts)} rules)" if failed else "; within policy" if diff.verdicts else ""
    numbers = ""
    if diff.numbers is not None:
        numbers = "; the numbers agree" if diff.numbers.ok else "; the numbers MOVED"
    return f"{diff.before} → {diff.after}: {changed}{numbers}{policy}"


def cost_lines(before: Cost, after: Cost) -> Iterator[str]:
    """What a token costs on both sides; only what changed, but always the nodes."""
    yield f"nodes {before.nodes} → {after.nodes}"
    for name, unit, one, other in (
        ("flops", "FLOP a token", before.flops, after.flops),
        ("attention", "FLOP a token for each that it sees", before.attention_flops, after.attention_flops),
        ("weights", "B read a token", before.weight_bytes, after.weight_bytes), ("cache", "B kept a token", before.cache_bytes, after.cache_bytes),
        ("parameters", "B", before.parameters, after.parameters),
    ):
        if one != other:
            share = f" ({(other - one) / one:+.1%})" if one else ""
            yield f"{name} {scaled(one)}{unit} → {scaled(other)}{unit}{share}"
    ops = [f"{name} {before.ops.get(name, 0)} → {after.ops.get(name, 0)}"
           for name in sorted(before.ops.keys() | after.ops.keys()) if before.ops.get(name) != after.ops.get(name)]
    if ops:
        yield f"ops: {', '.join(ops[:12])}{', …' if len(ops) > 12 else ''}"


def scaled(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.4g} {unit}"
        value /= 1000
    return ""


def places_of(edit: Edit) -> str:
    """The first places of an edit, and how many more there are."""
    shown = ", ".join(edit.places[:_SHOWN])
    return f"{shown}, … {edit.count - _SHOWN} more" if edit.count > _SHOWN and len(edit.places) > _SHOWN else shown


def verdict_line(verdict: Verdict) -> str:
    return f"{verdict.rule}: {verdict.found}" + (f" [{verdict.nearest}]" if verdict.nearest and not verdict.ok else "")


def _lines(diff: GraphDiff) -> Iterator[Text]:
    yield Text(headline(diff), style="bold red" if diff.exit_code == 2 else "bold")
    for edit in diff.edits:
        yield Text(f"  {SIGNS.get(edit.kind, '~')} {edit.line}", style=STYLES[edit.kind])
        if edit.places:
            yield Text(f"      at {places_of(edit)}", style="dim")
    if not diff.same:
        yield Text("")
        yield from (Text(f"  {line}") for line in cost_lines(diff.cost_before, diff.cost_after))
    if diff.numbers is not None:
        yield Text("")
        yield from (Text(f"  {line}", style="red" if bad else "") for line, bad in diff.numbers.lines())
    if diff.verdicts:
        yield Text("")
        yield from (Text(f"  {'✓' if v.ok else '✗'} {verdict_line(v)}", style="green" if v.ok else "bold red") for v in diff.verdicts)
