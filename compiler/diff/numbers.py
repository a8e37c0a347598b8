"""The figures of a numeric comparison, and whether they moved: data, and the lines that show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# A case counts as moved where it differs by more than this many times what the reference differs from itself.
ABOVE_NOISE = 8.0


@dataclass(frozen=True)
class CaseNumbers:
    """One case of one pair of runs, over `rows` rows of logits (or outputs).

    `relative` is max abs over the largest absolute value of the old side; `noise` the same of the old side against itself, run with and
    without onnxruntime's fusions; `limit` what `relative` may be. `perplexity` is the new one over the old one, less 1.
    """

    runs: str
    case: str
    rows: int
    max_abs: float
    relative: float
    mean_kl: float | None
    top1: float | None
    perplexity: float | None
    noise: float
    limit: float

    @property
    def ok(self) -> bool:
        """Written so that a NaN fails."""
        return self.relative <= self.limit


@dataclass(frozen=True)
class FirstDivergent:
    """The first node whose values differ by far more than those it reads. Relative differences, of its output and of its inputs.

    `between` are nodes among what it reads that have no match, and so could not be compared.
    """

    before: str
    after: str
    op: str
    relative: float
    inputs: float
    between: tuple[str, ...] = ()

    def __str__(self) -> str:
        between = f"; not compared in between: {', '.join(self.between)}" if self.between else ""
        return f"{self.op} at {self.after} differs by {self.relative:.2e}, what it reads by {self.inputs:.2e}{between}"


@dataclass(frozen=True)
class PassFault:
    """The pass of a compile after which the logits differ from the source's: relative differences before and after it, and where."""

    stage: str
    before: float
    after: float
    first: FirstDivergent | None

    def __str__(self) -> str:
        where = f"; {self.first}" if self.first else ""
        return f"{self.stage}: the logits differ by {self.after:.2e} after it and by {self.before:.2e} before{where}"


@dataclass(frozen=True)
class Numbers:
    """All cases; where one moved the first divergent node, and between a graph and its artifact the pass; and what was not compared."""

    cases: tuple[CaseNumbers, ...]
    first: FirstDivergent | None = None
    notes: tuple[str, ...] = ()
    fault: PassFault | None = None

    @property
    def ok(self) -> bool:
        return bool(self.cases) and all(case.ok for case in self.cases)

    def worst(self, rule: str) -> tuple[float | None, str]:
        """The figure that a rule of the policy is about, where it is worst, and in which case."""
        name = {"max_kl": "mean_kl", "max_relative": "relative", "max_abs": "max_abs", "min_top1": "top1", "max_perplexity": "perplexity"}[rule]
        sign = -1 if rule.startswith("min_") else 1
        found = [(sign * value, case) for case in self.cases if (value := getattr(case, name)) is not None]
        if not found:
            return None, ""
        value, case = max(found, key=lambda pair: pair[0])
        return sign * value, f"{case.runs}, {case.case}"

    def lines(self) -> Iterator[tuple[str, bool]]:
        """(line, whether it is bad) for a terminal."""
        yield f"{'numbers':<34} {'rows':>5} {'max abs':>9} {'relative':>9} {'limit':>8} {'noise':>8} {'mean KL':>9} {'top-1':>6} {'perplexity':>10}", False
        for case in self.cases:
            kl, top1, perplexity = (_or(value, form) for value, form in ((case.mean_kl, ".1e"), (case.top1, ".3f"), (case.perplexity, "+.3%")))
            yield (f"{case.runs + ', ' + case.case:<34} {case.rows:>5} {case.max_abs:>9.2e} {case.relative:>9.2e} {case.limit:>8.1e} "
                   f"{case.noise:>8.1e} {kl:>9} {top1:>6} {perplexity:>10}"), not case.ok
        if self.first is not None:
            yield f"first divergent node: {self.first}", True
        if self.fault is not None:
            yield f"introduced by the pass {self.fault}", True
        yield from ((note, False) for note in self.notes)

    def markdown(self) -> list[str]:
        head = ["| numbers | rows | relative | limit | mean KL | top-1 | perplexity |", "|---|---|---|---|---|---|---|"]
        rows = [
            f"| {'✅' if case.ok else '❌'} {case.runs}, {case.case} | {case.rows} | {case.relative:.2e} | {case.limit:.1e} | {_or(case.mean_kl, '.1e')} "
            f"| {_or(case.top1, '.3f')} | {_or(case.perplexity, '+.3%')} |" for case in self.cases
        ]
        first = ["", f"First divergent node: `{self.first}`"] if self.first is not None else []
        fault = ["", f"Introduced by the pass `{self.fault}`"] if self.fault is not None else []
        return [*head, *rows, *first, *fault, *(f"\n{note}" for note in self.notes)]


def _or(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
