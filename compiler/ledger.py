"""The account of a compile while it runs: what each stage did, what was refused, what was decided, which exceptions were caught."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from ..errors import RefusedError
from ..models.decision import Decision
from ..passes.outcome import Outcome, PassResult, Refusal
from .report import CAUGHT, SiteLine


class Watch(Protocol):
    """Looks on while a graph is compiled, pass by pass. It changes nothing."""

    def start(self, model: ir.Model) -> None:
        """The source as it was read."""
        ...

    def after(self, outcome: Outcome, model: ir.Model) -> None:
        """A pass has run: what it did, and the graph as it is now."""
        ...

    def begin(self) -> None:
        """The graph is understood, and a target begins."""
        ...

    def undone(self) -> None:
        """A target failed: the graph is again as it was when it began."""
        ...


@dataclass
class Ledger:
    """Append-only. `strict` turns the first refusal or caught exception into a RefusedError.

    `attentions` is how many the graph has, understood or not; `sites` are those that were understood.
    """

    strict: bool
    watch: Watch | None = None
    attentions: int = 0
    sites: tuple[SiteLine, ...] = ()
    outcomes: list[Outcome] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def run(self, stage: ir.passes.PassBase, model: ir.Model) -> Outcome:
        """Runs one pass on `model` in place and keeps its outcome."""
        result = stage(model)
        assert isinstance(result, PassResult) and result.model is model, f"{type(stage).__name__} gives no account"
        self.enter(result.outcome)
        if self.watch is not None:
            self.watch.after(result.outcome, model)
        return result.outcome

    def enter(self, outcome: Outcome) -> Outcome:
        self.outcomes.append(outcome)
        self.refuse(outcome.refusals)
        return outcome

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            if self.strict:
                raise RefusedError(f"refused under strict: {refusal}", hint="compile without --strict to get what can be had, and see its report")
            if refusal not in self.refusals:
                self.refusals.append(refusal)

    def decide(self, feature: str, value: str, reason: str, where: str = "") -> None:
        self.decisions.append(Decision(feature, value, reason, "compile", where))

    def caught(self, feature: str, error: Exception, where: str) -> None:
        """An exception in something that the compile can go on without."""
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if self.strict:
            raise RefusedError(f"{feature} failed at {where}: {reason}", hint="compile without --strict to go on without it") from error
        self.decide(feature, "off", f"{CAUGHT}: {reason}", where)


def _first_line(error: Exception) -> str:
    chain: Sequence[BaseException] = [error, *([error.__cause__] if error.__cause__ else [])]
    return next((text.splitlines()[0] for text in map(str, reversed(chain)) if text), "no message")
