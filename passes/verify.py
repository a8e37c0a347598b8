"""Postconditions of the rewriting, checked on what came out and not on how it was made.

First the contracts: every node of our domain satisfies its own, no attention of another kind is left, inputs and outputs are the
interface's. Then the rows: with attention stubbed, none sees another (stub_run.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np
import onnx_ir as ir

from ..custom_ops.contract import DOMAIN, OPS, OPSET, OpContract
from ..models.interface import GraphInterface
from .normalize import graph_size
from .outcome import Outcome, PassResult, Refusal
from .stub_run import ROWS, row_refusals

_OTHER_ATTENTION = {
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "PackedAttention", "SparseAttention",
    "DecoderMaskedSelfAttention", "PackedMultiHeadAttention", "PagedAttention", "LinearAttention", "QAttention", "LongformerAttention",
}


class Verify(ir.passes.InPlacePass):
    """Changes nothing. What does not hold is a refusal in the outcome: the artifact must not be written as `paged`."""

    def __init__(self, interface: GraphInterface) -> None:
        super().__init__()
        self._interface = interface

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        refusals = contract_refusals(model, self._interface) or row_refusals(model, self._interface)
        count = sum(node.domain == DOMAIN for node in model.graph)
        notes = () if refusals else (f"{ROWS} rows do not see each other outside attention",)
        outcome = Outcome("verify", "custom op nodes", count, 0, refusals, notes, nodes, nodes, size, size, perf_counter() - start)
        return PassResult(model, False, outcome)


def contract_refusals(model: ir.Model, interface: GraphInterface) -> tuple[Refusal, ...]:
    """What in the graph breaks an op's contract or the interface; empty where nothing does."""
    return tuple(_contract_breaches(model, interface))


def _contract_breaches(model: ir.Model, interface: GraphInterface) -> Iterator[Refusal]:
    if any(node.domain == DOMAIN for node in model.graph) and model.opset_imports.get(DOMAIN) != OPSET:
        yield Refusal(f"{DOMAIN} is imported in version {model.opset_imports.get(DOMAIN)}", "opset imports", f"expected {OPSET}")
    for node in model.graph:
        if node.domain == DOMAIN:
            contract = OPS.get(node.op_type)
            if contract is None:
                yield Refusal("no op of this name exists", str(node.name), node.op_type)
            else:
                yield from (Refusal(text, str(node.name), node.op_type) for text in _breaches(node, contract))
        elif node.op_type in _OTHER_ATTENTION:
            yield Refusal("an attention is left that was not rewritten", str(node.name), f"{node.domain}::{node.op_type}")
    for side, values, ports in (("input", model.graph.inputs, interface.inputs), ("output", model.graph.outputs, interface.outputs)):
        found = [(str(value.name), _type_name(value)) for value in values]
        expected = [(port.name, port.dtype) for port in ports]
        for name in dict(expected).keys() ^ dict(found).keys():
            yield Refusal(f"the graph's {side}s are not the interface's", name, f"found {found}")
        for name, dtype in found:
            if dtype != dict(expected).get(name, dtype):
                yield Refusal(f"{side} {name} is {dtype}", name, f"expected {dict(expected)[name]}")


def _breaches(node: ir.Node, contract: OpContract) -> Iterator[str]:
    needed = sum(not port.optional for port in contract.outputs)
    if len(node.inputs) > len(contract.inputs) or not needed <= len(node.outputs) <= len(contract.outputs):
        yield f"{len(node.inputs)} inputs and {len(node.outputs)} outputs of {len(contract.inputs)} and {len(contract.outputs)}"
    for index, port in enumerate(contract.inputs):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            if not port.optional:
                yield f"input {port.name} is absent"
        elif port.shape == "RESERVED":
            yield f"input {port.name} has no meaning yet and is given"
        elif value.dtype is not None and _type_name(value) not in port.dtypes:
            yield f"input {port.name} is {_type_name(value)}, not {' or '.join(port.dtypes)}"
    known = {attribute.name: attribute for attribute in contract.attributes}
    for name, given in node.attributes.items():
        wanted = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT}.get(known[name].type) if name in known else None
        if given.type != wanted:
            yield f"attribute {name} does not exist" if name not in known else f"attribute {name} is no {known[name].type}"
    for name, attribute in known.items():
        if attribute.default is None and name not in node.attributes:
            yield f"attribute {name} is absent"
    heads, kv_heads = node.attributes.get_int("num_heads", 1), node.attributes.get_int("kv_num_heads", 1)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        yield f"{heads} heads over {kv_heads} key/value heads"


def _type_name(value: ir.Value) -> str:
    return "?" if value.dtype is None else str(np.dtype(value.dtype.numpy()))
