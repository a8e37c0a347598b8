"""Attention sinks: a logit for each head that stands beside the scores in the softmax and whose probability goes nowhere."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..observe import ObservationError
from .chain import attribute
from .laboratory import Laboratory


def split_sink(lab: Laboratory, softmax_input: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The scores and the column that is put behind them, if there is one. The row's largest, taken off all of it, is nothing to a softmax."""
    value = _unshifted(softmax_input)
    node = value.producer()
    if node is None or node.op_type != "Concat" or node.domain != "" or len(node.inputs) != 2:
        return softmax_input, None
    scores, sink = node.inputs
    dims = None if scores is None else lab.observation.dims(scores)
    if scores is None or sink is None or dims is None or attribute(node, "axis", 0) not in (-1, len(dims) - 1) or lab.graph.is_data(sink):
        return softmax_input, None
    return scores, sink


def _unshifted(value: ir.Value) -> ir.Value:
    """x of x − max(x) over the last axis."""
    node = value.producer()
    if node is None or node.op_type != "Sub" or node.domain != "" or node.inputs[0] is None or node.inputs[1] is None:
        return value
    shift = node.inputs[1].producer()
    if shift is None or shift.op_type != "ReduceMax" or shift.inputs[0] is not node.inputs[0] or not attribute(shift, "keepdims", 1):
        return value
    axes = attribute(shift, "axes", None)
    if len(shift.inputs) > 1 and shift.inputs[1] is not None:
        constant = ir.convenience.get_const_tensor(shift.inputs[1])
        axes = None if constant is None else constant.numpy().reshape(-1).tolist()
    return node.inputs[0] if axes is not None and list(axes) in ([-1], [3]) else value


def sink_logits(lab: Laboratory, sink: ir.Value, heads: int) -> tuple[float, ...] | None:
    """The logit of each head, where `sink` [B|1, H|1, S|1, 1] is the same for every sequence, query and length."""
    found: np.ndarray | None = None
    for probe in lab.probes:
        try:
            values = lab.observation.evaluate([sink], probe)[0]
        except ObservationError:
            return None
        if values.ndim != 4 or values.shape[-1] != 1 or values.shape[1] not in (1, heads):
            return None
        row = np.broadcast_to(values[0, :, 0, 0], (heads,))
        if not np.array_equal(values, np.broadcast_to(row[: values.shape[1], None, None], values.shape)):
            return None
        if found is not None and not np.array_equal(found, row):
            return None
        found = row
    return None if found is None else tuple(float(logit) for logit in found)
