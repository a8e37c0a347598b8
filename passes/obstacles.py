"""What a graph's inputs alone say against rewriting it as a decoder: found before it is run, and told by name."""

from __future__ import annotations

import onnx_ir as ir

from ..models.interface import GraphInterface, GraphPort
from .extract import cone
from .normalize import is_standard
from .outcome import Refusal


def obstacle(model: ir.Model, interface: GraphInterface) -> Refusal | None:
    """The first of: two decoders behind one `If`; embeddings in place of token ids beside a cache; a fixed number of tokens a run."""
    return _merged(model) or _embeddings(interface) or _fixed(interface)


def _merged(model: ir.Model) -> Refusal | None:
    """An If that a graph input chooses by, with attention's products in its branches, is a decoder with a cache and one without."""
    for node in model.graph:
        condition = node.inputs[0] if is_standard(node, "If") else None
        if condition is None:
            continue
        branches = [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]
        if not all(any(inner.op_type in ("Softmax", "MatMul", "Attention") for inner in branch) for branch in branches):
            continue
        chosen = [leaf for leaf in cone([condition]).leaves if leaf.is_graph_input()]
        if chosen:
            names = ", ".join(str(leaf.name) for leaf in chosen)
            return Refusal("an If-merged decoder: two graphs in one", node.name or "If", f"the input {names} chooses; export with and without a past apart")
    return None


def _embeddings(interface: GraphInterface) -> Refusal | None:
    cached = any(port.role == "past_key" for port in interface.inputs)
    if not cached or interface.input("input_ids") is not None:
        return None
    wide = next((port for port in interface.inputs if port.role == "other" and port.dtype.startswith("float") and _rank(port) == 3), None)
    if wide is None:
        return None
    return Refusal("it takes embeddings and no token ids", wide.name, "expected token ids; export the decoder with its embedding table")


def _fixed(interface: GraphInterface) -> Refusal | None:
    """Another number of tokens than the one that is written can't be fed: nothing can be learned of other lengths."""
    ids = interface.input("input_ids")
    if ids is None or _rank(ids) != 2 or ids.shape is None or not isinstance(ids.shape[1], int):
        return None
    if all(port.shape is not None and all(isinstance(size, int) for size in port.shape) for port in interface.inputs):
        return None  # fixed throughout: what it means at its one size is another question
    return Refusal("static shapes: the number of tokens a run is fixed", ids.name, f"{ids.shape[1]} tokens; export with a dynamic sequence length")


def _rank(port: GraphPort) -> int | None:
    return None if port.shape is None else len(port.shape)
