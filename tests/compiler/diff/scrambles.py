"""Ways to write the same model differently, and random models to write. Each scramble takes a ModelProto and changes it in place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

Scramble = Callable[[ModelProto, random.Random], None]


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graphs_of(inner)


def rename(model: ModelProto, rng: random.Random) -> None:
    """Every value that is no input or output of the model, every node and the graphs get other names."""
    fixed = {value.name for value in (*model.graph.input, *model.graph.output)} | {""}
    new: dict[str, str] = {}

    def name(old: str) -> str:
        return old if old in fixed else new.setdefault(old, f"v{rng.randrange(10**9)}_{len(new)}")

    for graph in graphs_of(model.graph):
        graph.name = f"g{rng.randrange(10**6)}"
        for tensor in graph.initializer:
            tensor.name = name(tensor.name)
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.name = name(value.name)
        for node in graph.node:
            node.name = f"n{rng.randrange(10**9)}"
            node.input[:] = [name(value) for value in node.input]
            node.output[:] = [name(value) for value in node.output]
    symbols: dict[str, str] = {}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.setdefault(dim.dim_param, f"d{rng.randrange(10**6)}_{len(symbols)}")


def reorder(model: ModelProto, rng: random.Random) -> None:
    """Nodes in another order that is one; initializers and attributes in any."""
    for graph in graphs_of(model.graph):
        made_here = {name for node in graph.node for name in node.output if name}
        nodes, done, order = list(graph.node), set(), []
        while nodes:
            ready = [node for node in nodes if all(name not in made_here or name in done for name in reads(node))]
            node = rng.choice(ready)
            nodes.remove(node)
            done.update(node.output)
            order.append(node)
        _replace(graph.node, order)
        _replace(graph.initializer, rng.sample(list(graph.initializer), len(graph.initializer)))
        for node in graph.node:
            _replace(node.attribute, rng.sample(list(node.attribute), len(node.attribute)))


def reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, by its subgraphs too."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            found |= {name for child in inner.node for name in reads(child)} | {value.name for value in inner.output}
    return found


def constants(model: ModelProto, rng: random.Random) -> None:
    """Some initializers become Constant nodes, Constant nodes become initializers, and some bytes move between their fields."""
    for graph in graphs_of(model.graph):
        moved = [tensor for tensor in graph.initializer if rng.random() < 0.5 and not tensor.external_data]
        kept = [tensor for tensor in graph.initializer if tensor not in moved]
        lifted = [node for node in graph.node if node.op_type == "Constant" and rng.random() < 0.5 and node.attribute[0].name == "value"]
        nodes = [node for node in graph.node if node not in lifted]
        for node in lifted:
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            kept.append(tensor)
        made = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in moved]
        _replace(graph.initializer, [_retyped(tensor, rng) for tensor in kept])
        _replace(graph.node, [*made, *nodes])


def _retyped(tensor: TensorProto, rng: random.Random) -> TensorProto:
    if rng.random() < 0.5 or tensor.data_type not in (TensorProto.FLOAT, TensorProto.INT64) or tensor.external_data:
        return tensor
    array = numpy_helper.to_array(tensor)
    return helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.ravel().tolist())


def defaults(model: ModelProto, rng: random.Random) -> None:
    """Attributes that have their default are spelled out, or left out."""
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    for graph in graphs_of(model.graph):
        for node in graph.node:
            if node.domain or node.op_type == "Constant":
                continue
            for name, attribute in onnx.defs.get_schema(node.op_type, opset, "").attributes.items():
                present = [a for a in node.attribute if a.name == name]
                if attribute.default_value.type == AttributeProto.UNDEFINED:
                    continue
                if not present and rng.random() < 0.7:
                    node.attribute.append(attribute.default_value)
                elif present and present[0] == attribute.default_value:
                    node.attribute.remove(present[0])


def dead(model: ModelProto, rng: random.Random) -> None:
    """Nodes and weights that nothing needs."""
    for graph in graphs_of(model.graph):
        values = [name for node in graph.node for name in node.output if name]
        tag = rng.randrange(10**9)
        graph.initializer.append(numpy_helper.from_array(np.ones(40, np.float32), f"dead{tag}"))
        graph.node.append(helper.make_node("Add", [rng.choice(values) if values else f"dead{tag}", f"dead{tag}"], [f"dead_out{tag}"]))
        graph.node.append(helper.make_node("Relu", [f"dead_out{tag}"], [f"dead_end{tag}"]))


def remarks(model: ModelProto, rng: random.Random) -> None:
    """Documentation, metadata, a producer, shapes of values on the way."""
    model.producer_name, model.doc_string = f"p{rng.random()}", "a model"
    for graph in graphs_of(model.graph):
        graph.doc_string = "a graph"
        for node in graph.node:
            node.doc_string = f"at {rng.random()}"
            node.metadata_props.add(key="namespace", value=f"layer {rng.random()}")
            if node.output and node.output[0] and rng.random() < 0.3 and graph is model.graph:
                graph.value_info.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))


SCRAMBLES: tuple[Scramble, ...] = (rename, reorder, constants, defaults, dead, remarks)


def _replace(field, values) -> None:
    copies = []
    for value in values:
        copy = type(value)()
        copy.CopyFrom(value)
        copies.append(copy)
    del field[:]
    field.extend(copies)


UNARY = ("Relu", "Sigmoid", "Tanh", "Softmax", "Cast", "Transpose", "Identity")
BINARY = ("Add", "Mul", "Sub", "MatMul")


@st.composite
def models(draw) -> ModelProto:
    """Small models of one type: layers that repeat with other weights, nodes between, branches with captures, functions, constants."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values, nodes, weights = ["x", "y"], [], []

    def weight() -> str:
        size = int(rng.choice([1, 3, 40]))
        weights.append(numpy_helper.from_array(rng.standard_normal((size,)).astype(np.float32), f"w{len(weights)}"))
        return weights[-1].name

    def attributes(op: str) -> dict[str, object]:
        return {"Softmax": {"axis": int(rng.integers(-1, 2))}, "Cast": {"to": 1}, "Transpose": {"perm": [0, 1]}}.get(op, {})

    def operand(code: int, local: list[str]) -> str:
        return weight() if code % 3 == 0 else local[-1 - code % min(len(local), 4)]

    def emit(code: int, local: list[str], into: list) -> None:
        out = f"t{sum(map(len, (nodes, into)))}_{len(local)}_{len(weights)}"
        if code % 7 == 6 and into is nodes:
            inner = [helper.make_node("Add", [local[-1], weight()], [f"{out}_i"]), helper.make_node("Relu", [f"{out}_i"], [f"{out}_j"])]
            branches = [helper.make_graph(inner[: k + 1], f"b{k}", [], [helper.make_empty_tensor_value_info(inner[k].output[0])]) for k in (0, 1)]
            into.append(helper.make_node("If", ["flag"], [out], then_branch=branches[0], else_branch=branches[1]))
        elif code % 7 == 5:
            into.append(helper.make_node("Twice", [local[-1]], [out], domain="test"))
        elif code % 2:
            op = UNARY[code % len(UNARY)]
            into.append(helper.make_node(op, [local[-1]], [out], **attributes(op)))
        else:
            into.append(helper.make_node(BINARY[code // 2 % len(BINARY)], [operand(code, local), operand(code + 1, local)], [out]))
        local.append(out)

    for code in draw(st.lists(st.integers(0, 50), max_size=5)):
        emit(code, values, nodes)
    body = draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    for _ in range(draw(st.integers(1, 5))):
        for code in body:
            emit(code, values, nodes)
    for code in draw(st.lists(st.integers(0, 50), max_size=5)):
        emit(code, values, nodes)
    if not nodes:
        emit(1, values, nodes)
    outputs = list(dict.fromkeys([nodes[-1].output[0], nodes[len(nodes) // 2].output[0]]))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in ("x", "y")]
    info.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    graph = helper.make_graph(
        nodes, "g", info, [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "k"]) for name in outputs], weights,
    )
    twice = helper.make_function("test", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("test", 1)], functions=[twice], ir_version=10)
