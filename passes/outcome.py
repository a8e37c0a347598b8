"""What a pass did, counted and explained. Nothing a pass meets and doesn't do is silent: it is a Refusal here."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir


@dataclass(frozen=True)
class Refusal:
    """A site or a rewrite declined. `nearest` tells how far the best rule got: which rule, what it expected, what it found."""

    reason: str
    where: str
    nearest: str = ""

    def __str__(self) -> str:
        nearest = f" [{self.nearest}]" if self.nearest else ""
        return f"{self.where}: {self.reason}{nearest}"


@dataclass(frozen=True)
class Outcome:
    """One stage's account. Counts are of sites or nodes as `what` says; bytes are of initializers."""

    stage: str
    what: str = ""
    matched: int = 0
    rewritten: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0


@dataclass
class PassResult(ir.passes.PassResult):
    """onnx_ir's result with the pass's own account."""

    outcome: Outcome = field(default_factory=lambda: Outcome(stage=""))
