"""SmoothQuant: inputs of linears are made easier to round, and their weights make up for it.

Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022 (arXiv
2211.10438). Input j of a linear is divided by s = max|x|^α / max|w|^(1 − α), and column j of its weight multiplied by it. What divides is what
makes the input: the gain of an RMSNorm, or the rows of the values that a gate multiplies. All s are powers of two, so that nothing is rounded
and the graph computes the same bits as before.

An input is left as it is where nothing before it can take the factors, or one of its weights is not rounded here: it would no longer be what
the source stores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..build import Builder
from ..normalize import graph_size
from ..outcome import Outcome, PassResult, Refusal
from ..quantize.grid import on_grid
from ..quantize.methods import Inputs, Seen
from ..quantize.stored import Stored
from .match import Linears, find_linears
from .precision import Precision
from .products import reads_norm_alone
from .site import GateSite, LinearSite, Norm
from .split_norms import split_skip_norms
from .weights import WeightPlan, patterns

Array = NDArray[np.float32]

# How much of the difficulty goes into the weights. On SmolLM2-135M 0.7 comes to a mean KL of 0.041, the paper's 0.5 to 0.061 (int8 in groups of 64).
ALPHA = 0.7
# Exponents beyond are cut: what is left is rounded with coarser steps, and float16 scales stay normal numbers.
_MOST = 6


class SmoothLinears(ir.passes.InPlacePass):
    """Folds factors into a graph whose linears `plan` will round. `maxima` are Rehearsal's; `stored` and `ids` as for QuantizeLinears.

    Afterwards `maxima` are those of the smoothed inputs, and `factors` has s [K] of each smoothed linear by its weight's name.
    """

    def __init__(self, plan: WeightPlan, stored: Mapping[str, Stored], maxima: Mapping[str, Array], ids: str = "input_ids") -> None:
        super().__init__()
        self._plan, self._stored, self._ids = plan, stored, ids
        self.maxima = dict(maxima)
        self.factors: dict[str, Array] = {}
        self._divided: dict[str, Array] = {}

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        split_skip_norms(model)
        linears = find_linears(model, self._ids)
        precision = self._plan.precisions(linears.names)
        build, left, refusals = Builder(model.graph), dict[str, list[str]](), list[Refusal]()
        inputs = linears.by_input()
        for sites in inputs:
            source = _source(sites[0].input, linears)
            why = self._why_not(sites, source, precision, {table.name for table in linears.embeddings})
            if isinstance(why, Refusal):
                refusals.append(why)
            elif why is not None:
                left.setdefault(why, []).extend(site.name for site in sites)
            else:
                assert source is not None
                self._fold(sites, source, build)
        after, smoothed = graph_size(model), [site.name for sites in inputs for site in sites if str(site.weight.name) in self.factors]
        done = f"{len(smoothed)} smoothed ({patterns(smoothed)})" if smoothed else "none smoothed"
        notes = (done, *(f"{why}: {len(names)} ({patterns(names)})" for why, names in left.items()))
        outcome = Outcome(
            "smooth_linears", "linears", sum(map(len, inputs)), len(smoothed), tuple(refusals), notes, nodes, after[0], size, after[1],
            perf_counter() - start,
        )
        return PassResult(model, bool(smoothed), outcome)

    def inputs(self, unsmoothed: Inputs) -> Inputs:
        """What the smoothed linears read, out of what those of the graph as it was do."""
        return _Smoothed(unsmoothed, self.factors, self._divided)

    def _why_not(
        self, sites: Sequence[LinearSite], source: Norm | GateSite | None, precision: Mapping[str, Precision], tables: Collection[str],
    ) -> str | Refusal | None:
        """Why the input of `sites` can't be smoothed; None where it can. `tables` are the names of the weights of embeddings."""
        if source is None:
            return "not behind a norm or a gate"
        written = [source.up.site] if isinstance(source, GateSite) else []
        for site in (*sites, *written):
            if (why := self._kept(site, precision, tables)) is not None:
                return why
        if not reads_norm_alone(source.output, [site.node for site in sites]):
            reads = ", ".join(sorted({use.node.op_type for use in source.output.uses()})) or "a graph output"
            return Refusal("smoothing would change what else reads its input", sites[0].name, f"{source.output.name}: {reads}")
        return None

    def _kept(self, site: LinearSite, precision: Mapping[str, Precision], tables: Collection[str]) -> str | None:
        """Why a weight may not be changed."""
        if precision[site.name] not in ("int8", "int4"):
            return "not rounded here"
        reader = site.node.inputs[1]
        assert reader is not None
        others = len(site.weight.uses()) > 1 or len(reader.uses()) > 1 or (site.bias is not None and len(site.bias.uses()) > 1)
        # A table may be a head's turned copy: the two are stored once as long as their numbers are the same.
        if others or site.name in tables:
            return "a weight that others read"
        if site.packed or str(site.weight.name) in self._stored or on_grid(_weight(site)) is not None:
            return "stored quantized"
        return None if str(site.weight.name) in self.maxima else "no inputs seen"

    def _fold(self, sites: Sequence[LinearSite], source: Norm | GateSite, build: Builder) -> None:
        seen = self.maxima[str(sites[0].weight.name)]
        s = factors(seen, np.max([np.abs(_weight(site)).max(axis=0) for site in sites], axis=0))
        for site in sites:
            _scale(site.weight, s, 1 if site.transposed else 0)
            self.factors[str(site.weight.name)], self.maxima[str(site.weight.name)] = s, seen / s
        if isinstance(source, Norm):
            _divide_gain(source, s, build)
            return
        up, rows = source.up.site, np.ones(source.up.site.M, np.float32)
        rows[source.up.start : source.up.stop] = 1 / s
        _scale(up.weight, rows, 0 if up.transposed else 1)
        self._divided[str(up.weight.name)] = rows
        if up.bias is not None:
            _scale(up.bias, rows, 0)


@dataclass(frozen=True)
class _Smoothed:
    """Weights whose inputs j were multiplied by `columns`, and outputs i by `rows`, each by the weight's name."""

    unsmoothed: Inputs
    columns: Mapping[str, Array]
    rows: Mapping[str, Array]

    def seen(self, name: str) -> Sequence[Seen] | None:
        found, s = self.unsmoothed.seen(name), self.columns.get(name)
        return found if found is None or s is None else [Seen(part.rows, part.hessian / np.outer(s, s)) for part in found]

    def rounded(self, name: str, values: Array) -> None:
        rows, s = self.rows.get(name, np.ones(len(values), np.float32)), self.columns.get(name, np.ones(values.shape[1], np.float32))
        self.unsmoothed.rounded(name, values / rows[:, None] / s)


def factors(inputs: Array, weights: Array) -> Array:
    """s [K]: powers of two next to inputs^α / weights^(1 − α), around their median; 1 where either is 0."""
    some = (inputs > 0) & (weights > 0) & np.isfinite(inputs)
    exponent = ALPHA * np.log2(np.where(some, inputs, 1)) - (1 - ALPHA) * np.log2(np.where(some, weights, 1))
    middle = np.median(exponent[some]) if some.any() else 0.0
    return np.exp2(np.where(some, np.clip(np.rint(exponent - middle), -_MOST, _MOST), 0)).astype(np.float32)


def _source(value: ir.Value, linears: Linears) -> Norm | GateSite | None:
    """What can take the factors of an input."""
    return linears.norms.get(value) or next((gate for gate in linears.gates if gate.output is value), None)


def _weight(site: LinearSite) -> Array:
    """[M, K]."""
    assert site.weight.const_value is not None
    array = site.weight.const_value.numpy()
    return array if site.transposed else array.T


def _divide_gain(norm: Norm, s: Array, build: Builder) -> None:
    """The gain is a value of its own afterwards: others may share the old one. One that is computed in the graph is divided there."""
    node, tensor = norm.output.producer(), norm.weight.const_value
    assert node is not None
    if tensor is not None:
        gain = build.constant(tensor.numpy() / s, f"{norm.weight.name}.smooth")
    else:
        with build.before(node):
            gain = build.op("Mul", [norm.weight, build.constant(1 / s, "octavo.smooth")])[0]
        gain.shape = ir.Shape([s.size])
    node.replace_input_with(node.inputs.index(norm.weight), gain)


def _scale(value: ir.Value, by: Array, axis: int) -> None:
    """Multiplies an initializer along one axis, when it is asked for."""
    tensor = value.const_value
    assert tensor is not None
    scaled = partial(_scaled, tensor, by, axis)
    value.const_value = ir.LazyTensor(scaled, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=str(value.name))


def _scaled(tensor: ir.TensorProtocol, by: Array, axis: int) -> ir.Tensor:
    array = tensor.numpy()
    return ir.Tensor(array * by.reshape([-1 if i == axis else 1 for i in range(array.ndim)]), name=tensor.name)
