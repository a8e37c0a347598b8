"""The policy of a repository, `octavo.diff.toml`: assertions that decide whether a change passes.

    rules = [
      "expect ai.octavo::PagedAttention == layers",   # ==, !=, <=, >=, <, > with a number, `layers`, or `before`
      "forbid Softmax",                               # no such op in the new graph
      "max_new Cast 0",                               # at most so many more than before
      "max_edits 5",                                  # kinds of change
      "max_growth flops 0.01",                        # nodes, flops, attention_flops, weight_bytes, cache_bytes, parameters: by at most this share
      "interface frozen", "opset frozen", "weights frozen",
      "max_kl 1e-4", "max_relative 1e-3", "min_top1 0.99", "max_perplexity 0.01",   # these run both models
    ]
    layers = 30    # only where the graph does not tell

Nothing is decided by default: without a rule every change passes, and the exit code says that there is one.
"""

from __future__ import annotations

import operator
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import OptionError
from .folding import Repeat, fold
from .graph import Snapshot
from .model import GraphDiff, Verdict

POLICY_FILE = "octavo.diff.toml"
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}
_FROZEN = {"interface": ("interface",), "opset": ("opset",), "weights": ("weight",)}
_GROWTHS = ("nodes", "flops", "attention_flops", "weight_bytes", "cache_bytes", "parameters")
_FIGURES = ("max_kl", "max_relative", "max_abs", "min_top1", "max_perplexity")
_OP = r"([\w.:\-]+)"
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
# The form of each rule.
_FORMS = {
    "expect": rf"expect {_OP} (==|!=|<=|>=|<|>) (\d+|layers|before)", "forbid": rf"forbid {_OP}", "max_new": rf"max_new {_OP} (\d+)",
    "max_edits": r"max_edits (\d+)", "max_growth": rf"max_growth ({'|'.join(_GROWTHS)}) {_NUMBER}", "frozen": r"(interface|opset|weights) frozen",
    "figure": rf"({'|'.join(_FIGURES)}) {_NUMBER}",
}


@dataclass(frozen=True)
class Policy:
    """The rules of a file, each as its form and the parts that it names."""

    rules: tuple[tuple[str, str, tuple[str, ...]], ...] = ()     # (text, form, parts)
    layers: int | None = None

    @property
    def numeric(self) -> bool:
        """Whether a rule asks for a figure, which needs both models run."""
        return any(form == "figure" for _, form, _ in self.rules)

    @staticmethod
    def read(path: str | PathLike[str]) -> Policy:
        """The policy in the file `path`. OptionError for what is no TOML, or a rule that is not known."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"{path} can't be read: {error}", hint="docs/howto/diff.md shows a policy") from error
        if unknown := data.keys() - {"rules", "layers"}:
            raise OptionError(f"{path} has an unknown key {min(unknown)!r}", hint="it has rules, and layers")
        rules, layers = data.get("rules", []), data.get("layers")
        if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
            raise OptionError(f"{path}: rules is no list of text", hint='rules = ["forbid Softmax"]')
        if layers is not None and (type(layers) is not int or layers < 0):
            raise OptionError(f"{path}: layers is no number", hint="layers = 30")
        return Policy(tuple(parse_rule(rule) for rule in rules), layers)


def parse_rule(text: str) -> tuple[str, str, tuple[str, ...]]:
    """(text, form, parts) of one rule; OptionError where it has no known form."""
    rule = " ".join(text.split())
    for form, pattern in _FORMS.items():
        if match := re.fullmatch(pattern, rule):
            return rule, form, match.groups()
    close = get_close_matches(rule.split(" ")[0] if rule else "", ["expect", "forbid", "max_new", "max_edits", "max_growth", *_FROZEN, *_FIGURES], 1)
    raise OptionError(f"the rule {text!r} is not known", hint=f"did you mean {close[0]!r}?" if close else "docs/howto/diff.md lists the rules")


def judge(policy: Policy, diff: GraphDiff, after: Snapshot) -> tuple[Verdict, ...]:
    """Each rule held against the diff and the new graph."""
    layers = policy.layers if policy.layers is not None else layers_of(after)
    judges: dict[str, Callable[..., Verdict]] = {
        "expect": _expect, "forbid": _forbid, "max_new": _max_new, "max_edits": _max_edits, "max_growth": _max_growth, "frozen": _frozen,
        "figure": _figure,
    }
    return tuple(judges[form](rule, parts, diff, layers) for rule, form, parts in policy.rules)


def layers_of(snapshot: Snapshot) -> int:
    """How many layers a graph has: those of its cache, else those of its longest repeat, else 0."""
    cached = {port.name for port in snapshot.graph.inputs if re.search(r"^(past_key_values|past|kv)\.\d+\.key$|^past_key_\d+$", port.name)}
    return len(cached) or max((len(item.rows) for item in fold(snapshot.graph) if isinstance(item, Repeat)), default=0)


def _expect(rule: str, parts: tuple[str, ...], diff: GraphDiff, layers: int) -> Verdict:
    op, sign, bound = parts
    found = diff.cost_after.ops.get(op, 0)
    wanted = layers if bound == "layers" else diff.cost_before.ops.get(op, 0) if bound == "before" else int(bound)
    text = f"{found} {op}" + (f", {bound} = {wanted}" if not bound.isdigit() else "")
    return Verdict(rule, _COMPARE[sign](found, wanted), text, _nearest(op, diff))


def _forbid(rule: str, parts: tuple[str, ...], diff: GraphDiff, layers: int) -> Verdict:
    found = diff.cost_after.ops.get(parts[0], 0)
    return Verdict(rule, found == 0, f"{found} {parts[0]}", f"{diff.cost_before.ops.get(parts[0], 0)} before" if found else "")


def _max_new(rule: str, parts: tuple[str, ...], diff: GraphDiff, layers: int) -> Verdict:
    op, most = parts[0], int(parts[1])
    old, new = diff.cost_before.ops.get(op, 0), diff.cost_after.ops.get(op, 0)
    edits = [edit.line for edit in diff.edits if edit.kind in ("inserted", "replaced") and op in edit.what]
    return Verdict(rule, new - old <= most, f"{old} → {new}", edits[0] if edits else "")


def _max_edits(rule: str, parts: tuple[str, ...], diff: GraphDiff, layers: int) -> Verdict:
    return Verdict(rule, len(diff.edits) <= int(parts[0]), f"{len(diff.edits)} kinds of change")


def _max_growth(rule: str, parts: tuple[str, ...], diff: GraphDiff, layers: int) -> Verdict:
    old, new = getattr(diff.cost_before, parts[0]), getattr(diff.cost_after, parts[0])
    return Verdict(rule, new <= old * (1 + float(parts[1])), f"{old} → {new}")


def _frozen(rule: str, parts: tuple[str, ...], diff: GraphDiff, layers: int) -> Verdict:
    edits = [edit.line for edit in diff.edits if edit.kind in _FROZEN[parts[0]]]
    return Verdict(rule, not edits, f"{len(edits)} changes" if edits else "unchanged", edits[0] if edits else "")


def _figure(rule: str, parts: tuple[str, ...], diff: GraphDiff, layers: int) -> Verdict:
    if diff.numbers is None:
        return Verdict(rule, False, "the models were not run", "a snapshot has no numbers: give the models themselves")
    value, case = diff.numbers.worst(parts[0])
    if value is None:
        return Verdict(rule, False, "no case has this figure", "the graph is no decoder")
    ok = value >= float(parts[1]) if parts[0].startswith("min_") else value <= float(parts[1])
    return Verdict(rule, ok, f"{value:.3g} ({case})")


def _nearest(op: str, diff: GraphDiff) -> str:
    """Ops of the new graph that could have been meant, or why the expected one isn't there."""
    close = get_close_matches(op, diff.cost_after.ops, 2, 0.5)
    name = op.rpartition("::")[2]
    close = list(dict.fromkeys([*close, *(other for other in diff.cost_after.ops if other != op and name in other)]))
    return "nearest: " + ", ".join(f"{diff.cost_after.ops[other]} {other}" for other in close if other != op) if [c for c in close if c != op] else ""
