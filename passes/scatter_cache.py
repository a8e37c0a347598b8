"""Caches with a fixed number of places, into which a graph writes this step's keys and values by index (`ScatterND`, `TensorScatter`, …).

Nothing in the interface tells such a cache from any other tensor: its length does not grow. What the graph does with it does. Where every
write goes from one of the graph's inputs to one of its outputs, the inputs get the roles of a past, the outputs those of a present, and
what the indices are computed from that of positions. Whether they are, and whether the mask hides the places that are not written yet, is
proved where the attention is matched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from ..models.interface import GraphInterface, GraphPort, Role
from .extract import cone
from .normalize import is_standard

_WRITES = ("ScatterND", "ScatterElements", "TensorScatter")
_MOVES = ("Transpose", "Reshape", "Identity", "Cast", "Unsqueeze", "Squeeze", "Expand")


def scatter_interface(model: ir.Model, interface: GraphInterface) -> GraphInterface:
    """`interface` with the roles of such a cache; unchanged where there is none, or where it is not whole."""
    if any(port.role in ("past_key", "past_value") for port in interface.inputs):
        return interface
    pairs, indices = dict[ir.Value, ir.Value](), dict[str, Role]()
    for node in model.graph:
        past = _input_behind(node.inputs[0]) if is_standard(node, *_WRITES) else None
        if past is None or past in pairs or not _is_cache(interface, str(past.name)):
            continue
        present = _output_after(node.outputs[0])
        if present is None:
            return interface
        pairs[past] = present
        place = 2 if node.op_type == "TensorScatter" else 1
        index = node.inputs[place] if place < len(node.inputs) else None
        role: Role = "write_indices" if node.op_type == "TensorScatter" else "cache_position"
        indices.update({str(leaf.name): role for leaf in cone([] if index is None else [index]).leaves if _counts(interface, str(leaf.name))})
    order = [value for value in model.graph.inputs if value in pairs]
    if not order or len(order) % 2:
        return interface
    sides = _sides([str(value.name) for value in order])
    into: dict[str, tuple[Role, int | None]] = {name: (role, None) for name, role in indices.items()}
    out: dict[str, tuple[Role, int | None]] = {}
    for value in order:
        side, layer = sides[str(value.name)]
        into[str(value.name)] = ("past_key" if side == "key" else "past_value", layer)
        out[str(pairs[value].name)] = ("present_key" if side == "key" else "present_value", layer)
    return GraphInterface(tuple(_with(port, into) for port in interface.inputs), tuple(_with(port, out) for port in interface.outputs))


def _with(port: GraphPort, roles: Mapping[str, tuple[Role, int | None]]) -> GraphPort:
    role, layer = roles.get(port.name, (port.role, port.layer))
    return replace(port, role=role, layer=layer)


def _input_behind(value: ir.Value | None) -> ir.Value | None:
    """The graph input that `value` is a movement of."""
    while value is not None and (node := value.producer()) is not None:
        if not is_standard(node, *_MOVES):
            return None
        value = node.inputs[0]
    return value if value is not None and value.is_graph_input() else None


def _output_after(value: ir.Value) -> ir.Value | None:
    """The graph output that `value` is moved into."""
    frontier = [value]
    while frontier:
        value = frontier.pop()
        if value.is_graph_output():
            return value
        frontier += [use.node.outputs[0] for use in value.uses() if use.idx == 0 and is_standard(use.node, *_MOVES)]
    return None


def _is_cache(interface: GraphInterface, name: str) -> bool:
    """A float [B, G, places, D] of which all but the batch is fixed."""
    port = next((port for port in interface.inputs if port.name == name), None)
    if port is None or port.shape is None or len(port.shape) != 4 or not port.dtype.startswith("float"):
        return False
    return all(isinstance(size, int) for size in port.shape[1:])


def _counts(interface: GraphInterface, name: str) -> bool:
    """An input of whole numbers, one for each token or each sequence, that nothing else is known of."""
    port = next((port for port in interface.inputs if port.name == name), None)
    return port is not None and port.role == "other" and port.dtype in ("int64", "int32") and port.shape is not None and len(port.shape) == 1


def _sides(names: list[str]) -> dict[str, tuple[str, int]]:
    """Keys and values by name where one half of the names say so, else in turns. Which is which is for the matcher to find: this labels them."""
    keys = [name for name in names if "key" in name.lower().replace("key_value", "")]
    values = [name for name in names if name not in keys]
    if len(keys) != len(values):
        keys, values = names[::2], names[1::2]
    return {name: (side, layer) for side, group in (("key", keys), ("value", values)) for layer, name in enumerate(group)}
