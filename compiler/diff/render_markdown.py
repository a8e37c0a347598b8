"""A diff as markdown, sized for a comment on a pull request."""

from __future__ import annotations

from .model import GraphDiff
from .render_terminal import cost_lines, headline, places_of, verdict_line

# GitHub takes 65,536 characters in a comment.
LIMIT = 60_000


def to_markdown(diff: GraphDiff, limit: int = LIMIT) -> str:
    """The whole diff, or as many of its edits as fit in `limit` characters and a line that says how many were left out."""
    sign = {0: "✅", 1: "🔵", 2: "🔴"}[diff.exit_code]
    head = [f"### {sign} {headline(diff)}", ""]
    tail: list[str] = []
    if not diff.same:
        tail += ["", "<details><summary>Cost of a token</summary>", "", *(f"- {line}" for line in cost_lines(diff.cost_before, diff.cost_after)),
                 "", "</details>"]
    if diff.numbers is not None:
        tail += ["", *diff.numbers.markdown()]
    if diff.verdicts:
        tail += ["", "| | rule | found |", "|---|---|---|"]
        tail += [f"| {'✅' if v.ok else '❌'} | `{v.rule}` | {cell(verdict_line(v).removeprefix(v.rule + ': '))} |" for v in diff.verdicts]
    rows = [f"| {edit.kind} | {cell((f'in {edit.inside}: ' if edit.inside else '') + edit.what)} | "
            f"{f'×{edit.count}' if edit.count > 1 else ''} | {cell(places_of(edit))} |" for edit in diff.edits]
    room = limit - sum(len(line) + 1 for line in (*head, *tail)) - 200
    kept = []
    for row in rows:
        room -= len(row) + 1
        if room < 0:
            break
        kept.append(row)
    table = ["| change | what | | where |", "|---|---|---|---|", *kept] if rows else ["Nothing changed."]
    if len(kept) < len(rows):
        table += ["", f"… and {len(rows) - len(kept)} more kinds of change, which `octavo diff` prints."]
    return "\n".join([*head, *table, *tail]) + "\n"


def cell(text: str) -> str:
    """Text that can stand in a cell of a table, whatever names it holds."""
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("\n", " "), ("<", "&lt;"), ("@", "@\u200b"), ("`", "'")):
        text = text.replace(old, new)
    return text
