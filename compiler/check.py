"""Does an artifact compute what its source computes? The same tokens through both, case by case, with the limit beside each figure.

Two comparisons. *reference*: the source with its weights dequantized to fp32, run without onnxruntime's fusions (they turn
DequantizeLinear + MatMul into int8 arithmetic). Its limits are tight where nothing of ours rounds. *original*: the source as it stands, as
its users run it: quality, with limits out of the manifest. An artifact passes when every case of both does.

Where caches or activations round (fp16, int8), what they round would hide a small fault of the rewrite, such as one layer's scale. So a
third comparison, *rewrite*, puts the same graph with fp32 caches and activations against the reference, with the limits of fp32.

New to this? *KL* (divergence, in nats) measures how far one distribution over the next token is from another; 0 is equal. *Top-1
agreement* is the share of rows whose most likely token is the same. A *row* is the logits after one token.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ..custom_ops.contract import CACHE_FORMATS, QUANT_LINEAR
from ..errors import OptionError, UnsupportedError
from ..models.artifact import GRAPH, Artifact, ArtifactWriter, Manifest
from ..models.external_data import source_sha256
from ..models.interface import GraphPort
from ..models.onnx_reader import read_onnx
from ..models.runner import Runner
from ..models.spec import CacheLayer, CacheName
from ..passes.normalize import FoldDequantize
from .check_cases import CASES, LONG, Case, Rows, Tokens, tokens_for
from .check_inputs import seeded_inputs
from .divergence import divergence, log_probabilities
from .thresholds import Limits, quality, tight

Load = Callable[[Path, bool], Runner]
"""(path of an artifact or an `.onnx`, onnxruntime's graph optimizations on) -> Runner. The facade hands in `octavo.load`."""

Comparison = Literal["reference", "rewrite", "original"]
_Case = tuple[str, Callable[[Runner], Rows]]


@dataclass(frozen=True)
class CaseResult:
    """One case of one comparison: how far apart the two sides are over `rows` rows, and what was allowed. KL and top-1 are of logits."""

    comparison: Comparison
    case: str
    rows: int
    max_abs: float
    relative: float
    mean_kl: float | None
    top1: float | None
    limits: Limits

    @property
    def ok(self) -> bool:
        """Written so that a NaN fails. One row may always have another top token: two can be nearly equal."""
        most = ((self.relative, self.limits.relative), (self.mean_kl, self.limits.mean_kl))
        within = all(limit is None or value is None or value <= limit for value, limit in most)
        if self.limits.top1 is None or self.top1 is None:
            return within
        return within and (1 - self.top1) * self.rows <= max(1.0, (1 - self.limits.top1) * self.rows) + 1e-9


@dataclass(frozen=True)
class CheckReport:
    """The account of one check. `notes` say what was not compared, and why."""

    artifact: str
    against: str
    kind: str
    results: tuple[CaseResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.results) and all(result.ok for result in self.results)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "results": [{**asdict(result), "ok": result.ok} for result in self.results]}

    def to_text(self) -> str:
        lines = [f"{self.artifact} ({self.kind}) against {self.against}"]
        for comparison, title in _TITLES.items():
            results = [result for result in self.results if result.comparison == comparison]
            if results:
                lines += ["", title, f"  {'case':<20} {'rows':>5} {'max abs':>10} {'relative':>20} {'mean KL':>20} {'top-1':>16}"]
                lines += [f"  {_result_line(result)}" for result in results]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join([*lines, "", self.closing])

    @property
    def closing(self) -> str:
        """One sentence: whether it passed."""
        failed = sum(1 for result in self.results if not result.ok)
        return "The check passed." if self.ok else f"The check FAILED: {failed} of {len(self.results)} cases are over their limit."


_TITLES = {
    "reference": "Against the source with fp32 weights, without onnxruntime's fusions",
    "rewrite": "The same with fp32 caches and activations (so that no rounding of ours hides a fault of the rewrite)",
    "original": "Against the source as it stands (quality)",
}


def check(
    artifact: str | PathLike[str], against: str | PathLike[str], *, load: Load, text: str | None = None, seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Runs the artifact and `against` (an `.onnx`) through the same cases and compares their logits.

    The tokens are `text` (a passage of ours by default) where the artifact has a tokenizer, else seeded uniform ids. One model is in
    memory at a time. Raises OptionError (a seed below 0), ArtifactError (an incomplete artifact, or contents that are not those recorded),
    ModelError (`against` can't be read), UnsupportedError (a graph that can't be driven).
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise OptionError(f"seed={seed!r} is not an int ≥ 0")
    say = progress or (lambda _: None)
    opened = Artifact.open(artifact)
    say("verifying the artifact's contents")
    opened.verify_contents()
    manifest = opened.manifest
    notes: list[str] = []
    # A model that was compiled from memory has no hash to compare with.
    if manifest.source.sha256 and source_sha256(against) != manifest.source.sha256:
        notes.append(f"{against} is not the file that the artifact was compiled from ({manifest.source.name}, by its sha256).")
    say("running the artifact")
    with closing(load(opened.folder, True)) as runner:
        cases = _cases(opened, runner, text, seed, notes)
        ours = _run(runner, cases, notes)
    cases = tuple(case for case in cases if case[0] in ours)
    rewritten: dict[str, Rows] = {}
    with tempfile.TemporaryDirectory(prefix="octavo-check-") as scratch:
        if (twin := exact_twin(opened, Path(scratch) / "fp32")) is not None:
            say("running the artifact with fp32 caches and activations")
            with closing(load(twin, True)) as runner:
                rewritten = _run(runner, cases, notes)
    with tempfile.TemporaryDirectory(prefix="octavo-check-") as scratch:
        say("dequantizing the source and running it without fusions")
        with closing(load(dequantized(Path(against), Path(scratch)), False)) as runner:
            reference = _run(runner, cases, notes)
    # Rounded weights or activations are judged by quality: the twin, where it is exact, still tells a wrong rewrite from a rounding.
    limits = quality(manifest.thresholds) if multiplies_in_int8(manifest) or manifest.weights == "rounded" else tight(manifest.spec)
    exact = tight(None) if manifest.weights == "exact" else limits
    results = [compare("reference", name, ours[name], rows, limits) for name, rows in reference.items()]
    results += [compare("rewrite", name, rows, reference[name], exact) for name, rows in rewritten.items()]
    del reference, rewritten
    say("running the source as it stands")
    with closing(load(Path(against), True)) as runner:
        original = _run(runner, cases, notes)
    results += [compare("original", name, ours[name], rows, quality(manifest.thresholds)) for name, rows in original.items()]
    return CheckReport(str(artifact), str(against), manifest.kind, tuple(results), tuple(dict.fromkeys(notes)))


def _cases(artifact: Artifact, runner: Runner, text: str | None, seed: int, notes: list[str]) -> tuple[_Case, ...]:
    """A decoder goes through the CASES; any other graph through its own inputs and outputs."""
    manifest = artifact.manifest
    if manifest.spec is not None:
        vocab_size, max_context = manifest.spec.vocab_size, manifest.spec.max_context
    else:
        # A graph that was not rewritten has no spec; whether it is a decoder, and of what width, it shows by being one.
        try:
            vocab_size = runner.predict([0]).shape[-1]
        except UnsupportedError:
            notes.append("The graph is no decoder: its outputs were compared on seeded inputs.")
            return tuple((f"run, {size} long", partial(outputs_of, seeded_inputs(manifest.interface, size, seed))) for size in (7, 40))
        stated = [int(decision.value) for decision in manifest.decisions if decision.feature == "max_context" and decision.value.isdigit()]
        max_context = min(stated, default=LONG)
    tokens = tokens_for(artifact.folder, vocab_size, max_context, text=text, seed=seed)
    if len(tokens.long) < max_context:
        notes.append(f"The longest case has {len(tokens.long)} tokens: what differs only at later positions, up to {max_context:,}, is not seen.")
    return tuple((case.name, partial(_logits, case, tokens)) for case in CASES)


def exact_twin(artifact: Artifact, folder: Path) -> Path | None:
    """A copy of a paged artifact in `folder` with fp32 caches and fp32 activations, or None where neither rounds."""
    spec = artifact.manifest.spec
    if artifact.manifest.kind != "paged" or spec is None:
        return None
    if all(layer.cache == "fp32" for layer in spec.cache_layers) and not multiplies_in_int8(artifact.manifest):
        return None
    return with_cache(artifact, folder, "fp32", activation_bits=32)


def with_cache(artifact: Artifact, folder: Path, cache: CacheName, *, activation_bits: int | None = None) -> Path:
    """A copy of a paged artifact in `folder` with all its caches in one format, and activations of so many bits if that is given.

    The type of a cache is that of its graph input, from which the kernels take it, and the width of activations an attribute: nothing
    else of the graph differs.
    """
    manifest, spec = artifact.manifest, artifact.manifest.spec
    assert manifest.kind == "paged" and spec is not None, "only a paged artifact has caches of ours"
    model = onnx.load_model(artifact.graph, format="protobuf", load_external_data=False)
    for node in model.graph.node if activation_bits is not None else ():
        for attribute in node.attribute:
            if node.op_type == "QuantLinear" and attribute.name == "activation_bits":
                attribute.i = activation_bits
                if activation_bits == 32:   # which are not rounded, with static scales or without
                    del node.input[QUANT_LINEAR.input_index("activation_scale") :]
    layers = tuple(replace(layer, cache=cache) for layer in spec.cache_layers)
    ports = tuple(_cache_port(port, layers) for port in manifest.interface.inputs)
    caches = {port.name: port for port in ports if port.role in ("cache_key", "cache_value")}
    for value in model.graph.input:
        if value.name in caches:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(caches[value.name].dtype))
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, dtype, caches[value.name].shape))
    with ArtifactWriter(folder) as writer:
        for name in manifest.files:
            shutil.copyfile(artifact.folder / name, writer.folder / name)
        (writer.folder / GRAPH).write_bytes(model.SerializeToString())
        interface = replace(manifest.interface, inputs=ports)
        return writer.finish(replace(manifest, spec=replace(spec, cache_layers=layers), interface=interface)).folder


def multiplies_in_int8(manifest: Manifest) -> bool:
    return any(decision.feature == "activations" and decision.value.startswith("int8") for decision in manifest.decisions)


def _cache_port(port: GraphPort, layers: Sequence[CacheLayer]) -> GraphPort:
    """A cache input as these layers have it; another one as it is."""
    if port.role not in ("cache_key", "cache_value"):
        return port
    assert port.layer is not None
    layer = layers[port.layer]
    cache = CACHE_FORMATS[layer.cache]
    key = ("N", layer.kv_heads, cache.key_width(layer.head_size), "P")
    return replace(port, dtype=cache.dtype, shape=key if port.role == "cache_key" else ("N", layer.kv_heads, "P", cache.value_width(layer.value_size)))


def dequantized(source: Path, folder: Path) -> Path:
    """A graph that computes `source` with fp32 weights: a new file in `folder`, or `source` itself where nothing is quantized."""
    model = read_onnx(source)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    result = FoldDequantize()(model)
    if not result.modified:
        return source
    target = folder / "reference.onnx"
    ir.save(result.model, target, external_data="reference.onnx.data")
    return target


def compare(comparison: Comparison, case: str, ours: Rows, theirs: Rows, limits: Limits) -> CaseResult:
    """The figures of one case, in float64. Values of another shape, or not finite on either side, differ without bound."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return CaseResult(comparison, case, len(ours), np.inf, np.inf, np.inf, 0.0, limits)
    max_abs = float(np.max(np.abs(ours - theirs), initial=0.0))
    largest = float(np.max(np.abs(theirs), initial=0.0))
    if ours.ndim == 1:
        return CaseResult(comparison, case, len(ours), max_abs, max_abs / largest if largest else max_abs, None, None, limits)
    # Row by row: in float64 a long case of a large vocabulary would not fit beside the model.
    kl = float(np.mean([divergence(log_probabilities(q), log_probabilities(p)) for q, p in zip(ours, theirs)]))
    top1 = float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))
    return CaseResult(comparison, case, len(ours), max_abs, max_abs / largest if largest else max_abs, kl, top1, limits)


def _run(runner: Runner, cases: tuple[_Case, ...], notes: list[str]) -> dict[str, Rows]:
    """What each case gives. A decoder without sequences (no cache, and none can be made up) is compared on `predict` alone."""
    found: dict[str, Rows] = {}
    try:
        for name, case in cases:
            found[name] = case(runner)
    except UnsupportedError as e:
        if not found:
            raise
        notes.append(f"Compared on {', '.join(found)} only: {e}")
    return found


def _logits(case: Case, tokens: Tokens, runner: Runner) -> Rows:
    return case.run(runner, tokens)


def outputs_of(inputs: dict[str, NDArray[Any]], runner: Runner) -> Rows:
    """All outputs in one long row: float32 [values]."""
    outputs = runner.run(inputs)
    return np.concatenate([np.asarray(outputs[name], np.float32).ravel() for name in sorted(outputs)])


def _result_line(result: CaseResult) -> str:
    def beside(value: float | None, limit: float | None, sign: str, form: str) -> str:
        if value is None:
            return "–"
        return f"{value:{form}}" if limit is None else f"{value:{form}} {sign} {limit:{form.replace('2e', '0e').replace('3f', '2f')}}"

    limits = result.limits
    relative = beside(result.relative, limits.relative, "≤", ".2e")
    kl, top1 = beside(result.mean_kl, limits.mean_kl, "≤", ".2e"), beside(result.top1, limits.top1, "≥", ".3f")
    verdict = "ok" if result.ok else "FAILED"
    return f"{result.case:<20} {result.rows:>5} {result.max_abs:>10.2e} {relative:>20} {kl:>20} {top1:>16}  {verdict}"
