"""What a diff is: edits, costs, figures and verdicts, from which every output is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .numbers import Numbers

SCHEMA_VERSION = 1

EditKind = Literal["opset", "interface", "inserted", "removed", "replaced", "rewired", "attribute", "constant", "weight", "dtype", "shape"]


@dataclass(frozen=True)
class Edit:
    """One change, or the same change at `count` places.

    `what` says it in a line. `places` are nodes by their names in the canonical text, with the model's own name of a node where it has one;
    at most MOST_PLACES of them. `before` and `after` are the nodes concerned, as indices into the canonical graphs. `inside` names the
    function or subgraph whose nodes they are; "" is the graph itself.
    """

    kind: EditKind
    what: str
    count: int = 1
    places: tuple[str, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    inside: str = ""

    @property
    def line(self) -> str:
        where = f"in {self.inside}: " if self.inside else ""
        return f"{where}{self.what}" + (f" ×{self.count}" if self.count > 1 else "")


@dataclass(frozen=True)
class Cost:
    """What a token costs, as far as structure tells.

    `flops`: 2 × the elements of every weight that is multiplied, for one token. `attention_flops`: of one token for each token that it sees,
    4 × query heads × value size over all attentions (q·k and p·v). `weight_bytes`: weights read for one token decoded alone, of tables one
    row. `cache_bytes`: kept for each token of a sequence, and read for each later one that sees it. `parameters`: bytes of all weights.
    """

    nodes: int
    ops: dict[str, int]
    flops: int
    attention_flops: int
    weight_bytes: int
    cache_bytes: int
    parameters: int


@dataclass(frozen=True)
class Verdict:
    """One assertion of the policy. `nearest` says what came closest where it failed."""

    rule: str
    ok: bool
    found: str
    nearest: str = ""


@dataclass(frozen=True)
class GraphDiff:
    """What changed from `before` to `after`, names of files or models."""

    before: str
    after: str
    edits: tuple[Edit, ...]
    cost_before: Cost
    cost_after: Cost
    numbers: Numbers | None = None
    verdicts: tuple[Verdict, ...] = ()
    version: int = SCHEMA_VERSION

    @property
    def same(self) -> bool:
        return not self.edits

    @property
    def ok(self) -> bool:
        """Whether every assertion of the policy holds."""
        return all(verdict.ok for verdict in self.verdicts)

    @property
    def moved(self) -> bool:
        """Whether the models were run and their numbers differ by more than noise."""
        return self.numbers is not None and not self.numbers.ok

    @property
    def exit_code(self) -> int:
        """0 the same, 1 differs within policy, 2 the policy is violated."""
        return 2 if not self.ok else 1 if not self.same or self.moved else 0

    def to_json(self) -> dict[str, Any]:
        """As `json_schema()` describes it."""
        from .schema import as_json

        return as_json(self)

    def to_text(self) -> str:
        from .render_terminal import to_text

        return to_text(self)

    def to_markdown(self) -> str:
        from .render_markdown import to_markdown

        return to_markdown(self)
