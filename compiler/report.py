"""What a compile did, for people and for CI: every site, refusal and decision, stage by stage. Written beside the graph as `report.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ArtifactError
from ..models.decision import Decision
from ..models.json_record import SchemaError, read_record
from ..models.spec import Kind
from ..passes.outcome import Outcome, Refusal

REPORT_VERSION = 1
# How the reason of a decision begins that an exception made.
CAUGHT = "exception caught"


@dataclass(frozen=True)
class SiteLine:
    """One attention as it was understood. `target` is the op it became, or "" where the graph's own attention stays."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    mask: str
    rotary: str
    target: str


@dataclass(frozen=True)
class Sizes:
    """Nodes and bytes of initializers, before and after."""

    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class CompileReport:
    """The account of one compile. `attentions` counts what computes an attention, or looks as if it did, in the source."""

    kind: Kind
    source: str
    sites: tuple[SiteLine, ...]
    refusals: tuple[Refusal, ...]
    decisions: tuple[Decision, ...]
    outcomes: tuple[Outcome, ...]
    sizes: Sizes
    seconds: float
    attentions: int = 0
    version: int = REPORT_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: object) -> CompileReport:
        """The inverse of `to_json`. Raises ArtifactError where `data` is no report of this version."""
        again = "compile again with this version"
        version = data.get("version") if isinstance(data, dict) else None
        if version != REPORT_VERSION:
            raise ArtifactError(f"report version {version!r} can't be read", hint=again)
        try:
            return read_record(CompileReport, data, "the report")
        except SchemaError as error:
            raise ArtifactError(f"the report is not one that this version can read: {error}", hint=again) from error

    @property
    def headline(self) -> str:
        """One sentence: kind, sites rewritten, refusals."""
        caught = sum(decision.reason.startswith(CAUGHT) for decision in self.decisions)
        faults = f", {caught} EXCEPTION{'S' if caught > 1 else ''} CAUGHT (a fault of ours: please report it)" if caught else ""
        return f"{self.source}: {self.kind}, {self.rewritten} of {self.attentions} attention sites rewritten, {len(self.refusals)} refusals{faults}"

    @property
    def rewritten(self) -> int:
        """Attentions that became another op."""
        return sum(1 for site in self.sites if site.target)

    def to_text(self) -> str:
        lines = [self.headline, ""]
        lines += [f"  {line}" for line in self._site_lines()]
        if self.refusals:
            lines += ["", "Refused"] + [f"  {refusal}" for refusal in self.refusals]
        lines += ["", "Decided"] + [f"  {decision}" for decision in self.decisions]
        lines += ["", "Stages"] + [f"  {_stage_line(outcome)}" for outcome in self.outcomes]
        lines += ["", f"Sizes: {self.size_line()}; {self.seconds:.1f} s"]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        lines = [f"### {self.headline}", "", *(f"- {line}" for line in self._site_lines())]
        if self.refusals:
            lines += ["", "**Refused**", ""] + [f"- `{r.where}`: {r.reason}" + (f" (nearest: {r.nearest})" if r.nearest else "") for r in self.refusals]
        lines += ["", "| feature | decision | reason |", "|---|---|---|"]
        lines += [f"| {d.feature} | {d.value} | {_cell(d.reason)} |" for d in self.decisions]
        lines += ["", f"{self.size_line()}"]
        return "\n".join(lines) + "\n"

    def _site_lines(self) -> list[str]:
        """One line per run of layers with the same description, so that thirty equal layers are one line."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for site in self.sites:
            groups.setdefault(tuple(getattr(site, f.name) for f in fields(site) if f.name != "name"), []).append(site.name)
        lines = []
        for (heads, kv_heads, head_size, scale, mask, rotary, target), names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} (×{len(names)})"
            lines.append(f"{where}: {heads} heads over {kv_heads} of {head_size}, scale {scale:.6g}, {mask}, {rotary} → {target or 'unchanged'}")
        return lines

    def size_line(self) -> str:
        s = self.sizes
        return f"{s.nodes_before} → {s.nodes_after} nodes, {s.bytes_before / 1e6:.1f} → {s.bytes_after / 1e6:.1f} MB of parameters"


def _stage_line(o: Outcome) -> str:
    counts = f"{o.matched} matched, {o.rewritten} rewritten, {len(o.refusals)} refused" if o.matched or o.rewritten or o.refusals else "nothing to do"
    notes = "".join(f"; {note}" for note in o.notes)
    return f"{o.stage}: {counts}{f' ({o.what})' if o.what else ''}, {o.nodes_before} → {o.nodes_after} nodes, {o.seconds:.2f} s{notes}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
