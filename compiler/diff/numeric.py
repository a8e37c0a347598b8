"""Both sides run the same tokens through the whole state machine: prefill, chunks, cached decode, a mixed batch, fork and truncate.

First as they are, then paged with each cache precision.

A difference counts only above the reference's own noise: the old side against itself, with and without onnxruntime's fusions. Plain graphs
are compared without fusions (they turn dequantized products into int8 ones); artifacts as they run, and again with fp32 caches and
activations, so that what those round hides nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ...errors import StepError, UnsupportedError
from ...models.artifact import GRAPH, Artifact, Manifest
from ...models.context import configured_context
from ...models.interface import GraphInterface
from ...models.onnx_reader import graph_interface, read_onnx
from ...models.runner import Runner
from ...models.spec import CacheName
from ..check import Load, compare, dequantized, exact_twin, multiplies_in_int8, outputs_of, with_cache
from ..check_cases import CASES, LONG, Rows, tokens_for
from ..check_cases import Tokens as CaseTokens
from ..check_inputs import seeded_inputs
from ..entry import compile
from ..options import CompileOptions
from ..thresholds import TIGHT, Limits, quality, tight
from .blame import blame
from .graph import Snapshot
from .locate import Tokens, feeds, locate, values_of
from .numbers import ABOVE_NOISE, CaseNumbers, FirstDivergent, Numbers, PassFault

# fp32 sums in another order differ by about ε·√(L·K) of the largest logit: 1.5e-5 for 30 layers of 576.
_FLOOR = 5e-5
# What a source's fusions make of it is no rounding any more above this, and hides no fault.
_MOST_NOISE = 1e-3
_LENGTHS = (7, 40)

Cases = Mapping[str, Callable[[Runner], Rows]]


@dataclass(frozen=True)
class Side:
    """One model of the comparison: the path, its snapshot, and the artifact where it is one."""

    path: Path
    snapshot: Snapshot
    artifact: Artifact | None

    @staticmethod
    def open(path: Path, snapshot: Snapshot) -> Side:
        """ArtifactError where a folder is none."""
        return Side(path, snapshot, Artifact.open(path) if path.is_dir() else None)

    @property
    def folder(self) -> Path:
        return self.path if self.artifact else self.path.parent

    def interface(self) -> GraphInterface:
        return self.artifact.manifest.interface if self.artifact else graph_interface(read_onnx(self.path))

    def values(self, names: Sequence[str], tokens: Tokens) -> list[NDArray[Any]]:
        """Values of one prompt, as `locate` asks for them."""
        path = self.path / GRAPH if self.artifact else self.path
        return values_of(path, feeds(self.interface(), tokens), names, ops=self.artifact is not None)


def compare_numbers(before: Side, after: Side, *, load: Load, seed: int = 0, progress: Callable[[str], None] | None = None) -> Numbers:
    """Runs both sides and compares what they give. One model is in memory at a time."""
    say = progress or (lambda _: None)
    notes: list[str] = []
    first: FirstDivergent | None = None
    fault: PassFault | None = None
    with tempfile.TemporaryDirectory(prefix="octavo-diff-") as scratch:
        paths = [_plain(side, Path(scratch) / name) for name, side in (("before", before), ("after", after))]
        say("running the old side")
        with closing(load(paths[0], before.artifact is not None)) as runner:
            cases, tokens = _cases(before, after, runner, seed, notes)
            old = _run(cases, runner, notes)
        say("running the old side against itself")
        with closing(load(before.path, before.artifact is None)) as runner:
            noise = {name: compare("reference", name, rows, old[name], Limits()).relative for name, rows in _run(cases, runner, notes).items()}
        say("running the new side")
        with closing(load(paths[1], after.artifact is not None)) as runner:
            new = _run({name: cases[name] for name in old}, runner, notes)
        allowed = max(_allowed(before), _allowed(after))
        found = [_numbers("as they run", name, old[name], rows, noise.get(name, 0.0), allowed, tokens) for name, rows in new.items()]
        twins = [_twin(side, Path(scratch) / name) for name, side in (("old", before), ("new", after))]
        if twins != [before, after]:
            say("running both with fp32 caches and activations")
            rows = []
            for path, side, twin in zip(paths, (before, after), twins):
                with closing(load(path if twin is side else twin.path, side.artifact is not None)) as runner:
                    rows.append(_run({name: cases[name] for name in new}, runner, notes))
            rounded = max(_rounded(before), _rounded(after))
            found += [_numbers("fp32", name, rows[0][name], rows[1][name], 0.0, rounded, tokens) for name in rows[1] if name in rows[0]]
        if tokens is not None:
            found += _each_precision(before, after, cases, Path(scratch), load, notes, tokens, say)
        if not all(case.ok for case in found):
            say("looking for the first node that differs")
            prompt = tokens.short if tokens else None
            located = locate(twins[0], twins[1], prompt)
            first, notes = located.divergence, [*notes, *located.notes]
            if (pair := _compiled(before, after)) is not None:
                say("looking for the pass that made it differ")
                fault, note = blame(*pair, prompt)
                notes += [note] if note else []
    return Numbers(tuple(found), first, tuple(dict.fromkeys(notes)), fault)


def _each_precision(
    before: Side, after: Side, cases: Cases, scratch: Path, load: Load, notes: list[str], tokens: CaseTokens, say: Callable[[str], None],
) -> Iterator[CaseNumbers]:
    """Both sides paged, with each cache format: a graph is compiled for it, an artifact gets caches of another type.

    A case may differ by twice what the format itself rounds on the old side, and never by more than `check` allows it.
    """
    paged = [_paged(side, scratch / name, say) for name, side in (("paged-before", before), ("paged-after", after))]
    if any(artifact is None for artifact in paged):
        bare = ", ".join(str(side.path.name) for side, artifact in zip((before, after), paged) if artifact is None)
        notes.append(f"Not compared with each cache precision: {bare} does not page.")
        return
    exact: dict[str, Rows] = {}
    allowed = max(_rounded(before), _rounded(after)) if before.artifact or after.artifact else 0.0
    for name in get_args(CacheName):
        say(f"running both with {name} caches")
        rows = []
        for k, artifact in enumerate(paged):
            assert artifact is not None
            with closing(load(with_cache(artifact, scratch / f"{name}-{k}", name), True)) as runner:
                rows.append(_run(cases, runner, notes))
        exact = exact or rows[0]
        limit = TIGHT[name].relative or 0.0
        for case in (case for case in rows[0] if case in rows[1]):
            rounding = compare("reference", case, rows[0][case], exact[case], Limits()).relative
            yield _numbers(f"{name} cache", case, rows[0][case], rows[1][case], 0.0, max(allowed, min(limit, 2 * rounding)), tokens)


def _paged(side: Side, folder: Path, say: Callable[[str], None]) -> Artifact | None:
    """The side as a paged artifact; None where it can't be one."""
    if side.artifact is None:
        say(f"compiling {side.path.name}")
        compile(side.path, folder, options=CompileOptions(kv_cache="auto"))
    artifact = side.artifact or Artifact.open(folder)
    return artifact if artifact.manifest.kind == "paged" else None


def _compiled(before: Side, after: Side) -> tuple[Path, Manifest] | None:
    """A graph and the artifact that it is compared with; None for two of a kind."""
    for source, made in ((before, after), (after, before)):
        if source.artifact is None and made.artifact is not None:
            return source.path, made.artifact.manifest
    return None


def _cases(before: Side, after: Side, runner: Runner, seed: int, notes: list[str]) -> tuple[Cases, CaseTokens | None]:
    """A decoder's cases with their tokens; for another graph its own inputs, seeded."""
    try:
        width = runner.predict([0]).shape[-1]
    except UnsupportedError:
        notes.append("The graph is no decoder: its outputs were compared on seeded inputs.")
        interface = before.interface()
        return {f"run, {size} long": partial(outputs_of, seeded_inputs(interface, size, seed)) for size in _LENGTHS}, None
    contexts = [side.artifact.manifest.spec.max_context if side.artifact and side.artifact.manifest.spec else configured_context(side.folder)
                for side in (before, after)]
    tokens = tokens_for(after.folder, width, min([LONG, *(context for context in contexts if context)]), seed=seed)
    return {case.name: partial(_logits, case.run, tokens) for case in CASES}, tokens


def _logits(run: Callable[[Runner, CaseTokens], Rows], tokens: CaseTokens, runner: Runner) -> Rows:
    return run(runner, tokens)


def _run(cases: Cases, runner: Runner, notes: list[str]) -> dict[str, Rows]:
    """What each case gives; nothing at all where a step of it failed, which then differs without bound."""
    found: dict[str, Rows] = {}
    try:
        for name, case in cases.items():
            try:
                found[name] = case(runner)
            except StepError as error:
                found[name] = np.empty((0, 0), np.float32)
                notes.append(f"{name} failed: {error.message.splitlines()[0][:300]}")
    except UnsupportedError as error:
        if not found:
            raise
        notes.append(f"Compared on {', '.join(found)} only: {error}")
    return found


def _numbers(runs: str, case: str, old: Rows, new: Rows, noise: float, allowed: float, tokens: CaseTokens | None) -> CaseNumbers:
    found = compare("reference", case, new, old, Limits())
    limit = max(_FLOOR, allowed, ABOVE_NOISE * min(noise, _MOST_NOISE / ABOVE_NOISE))
    perplexity = None
    if case == "prefill" and tokens is not None and old.shape == new.shape:
        perplexity = float(np.exp(_surprise(new, tokens) - _surprise(old, tokens)) - 1)
    return CaseNumbers(runs, case, found.rows, found.max_abs, found.relative, found.mean_kl, found.top1, perplexity, noise, limit)


def _surprise(logits: Rows, tokens: CaseTokens) -> float:
    """Mean −log p of each token after its prefix."""
    rows = logits[:-1].astype(np.float64)
    top = rows.max(axis=1)
    total = np.log(np.exp(rows - top[:, None]).sum(axis=1)) + top
    return float(np.mean(total - rows[np.arange(len(rows)), tokens.long[1 : len(rows) + 1]]))


def _plain(side: Side, folder: Path) -> Path:
    """What to run: an artifact as it is; a graph with its weights dequantized once, which without fusions every step would do again."""
    if side.artifact:
        return side.path
    folder.mkdir()
    return dequantized(side.path, folder)


def _allowed(side: Side) -> float:
    """What a side rounds as it runs: nothing for a plain graph, the manifest's limits for an artifact."""
    if side.artifact is None:
        return 0.0
    manifest = side.artifact.manifest
    rounds = manifest.weights == "rounded" or multiplies_in_int8(manifest)
    limits = quality(manifest.thresholds) if rounds else tight(manifest.spec)
    return limits.relative or 0.0


def _rounded(side: Side) -> float:
    """The same with fp32 caches and activations: only rounded weights are left."""
    if side.artifact is None or side.artifact.manifest.weights != "rounded":
        return tight(None).relative or 0.0
    return quality(side.artifact.manifest.thresholds).relative or 0.0


def _twin(side: Side, folder: Path) -> Side:
    """The side with fp32 caches and activations; itself where nothing of it rounds. The twin's nodes are the artifact's own."""
    twin = exact_twin(side.artifact, folder) if side.artifact else None
    return side if twin is None else Side(twin, side.snapshot, Artifact.open(twin))
