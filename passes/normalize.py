"""Bringing a graph to the form the other passes read: one flat graph, constants as initializers, nothing dead, every value named."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from time import perf_counter

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from .extract import PreparedCone, cone, prepare, reads
from .outcome import Outcome, PassResult
from .plain_products import plain_products
from .plain_softmax import plain_softmax

# Constants of more bytes are weights, and weights are left as they are: never folded, copied or read.
FOLD_LIMIT = 1024

_TYPES = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)

_UNFOLDABLE = {
    # what is random, and what says that a weight is quantized
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "DequantizeLinear",
    # these can make something large out of something small, and are left to whoever reads them
    "ConstantOfShape", "Expand", "Tile", "Range", "Loop", "Scan",
}


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether `node` is one of these ONNX operators."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def graph_size(model: ir.Model) -> tuple[int, int]:
    """Nodes of the main graph, and bytes of its initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return len(model.graph), sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Normalize(ir.passes.InPlacePass):
    """1. Functions are inlined. 2. Constants become initializers, initializers are no inputs, names are unique. 3. Identities go. 4. Types
    are inferred, and CastLike says which type it means. 5. Products and softmaxes in other words become MatMul and Softmax over the last
    axis. 6. Small constant subgraphs are computed (by onnxruntime, so that the bits are those the graph itself would have).
    """

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size), defaults = perf_counter(), graph_size(model), _defaults(model)
        modified = False
        for step in (
            common.InlinePass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.RemoveInitializersFromInputsPass(),
            common.TopologicalSortPass(),
            common.NameFixPass(),
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
            _TYPES,
        ):
            modified |= step(model).modified
        modified |= _infer_more_types(model)
        modified |= _plain_casts(model)
        modified |= plain_products(model) | plain_softmax(model)
        folded, note = _fold_small(model)
        modified |= common.RemoveUnusedNodesPass()(model).modified
        notes = tuple(text for text in (note, defaults) if text)
        after = graph_size(model)
        seconds = perf_counter() - start
        outcome = Outcome("normalize", "constant nodes", folded, folded, (), notes, nodes, after[0], size, after[1], seconds)
        return PassResult(model, modified or bool(folded), outcome)

    def ensures(self, model: ir.Model) -> None:
        if model.functions:
            raise ir.passes.PostconditionError(f"functions are left: {[str(key) for key in model.functions]}")
        if any(value in model.graph.inputs for value in model.graph.initializers.values()):
            raise ir.passes.PostconditionError("an initializer is still an input")
        if any(is_standard(node, "Constant") for node in model.graph):
            raise ir.passes.PostconditionError("a Constant is still a node")


def _defaults(model: ir.Model) -> str:
    """Before IR version 4 all initializers are inputs; later, those that are can be overridden, and we don't keep that."""
    names = [str(value.name) for value in model.graph.inputs if value.name in model.graph.initializers]
    return f"inputs with a default are constants now: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}" if names else ""


# Which input has the type of a fused operator's outputs, where it isn't the first.
_TYPED_BY = {"MatMulIntegerToFloat": 2, "DequantizeLinear": 1, "QuantizeLinear": 2, "GatherBlockQuantized": 2}


def _infer_more_types(model: ir.Model) -> bool:
    """Types behind operators that ONNX's inference doesn't know (other domains): it stops there, and everything that follows has none."""
    changed = False
    for node in model.graph:
        if all(value.type is not None for value in node.outputs):
            continue
        # onnxruntime puts some of its own operators into ONNX's domain.
        known_to_onnx = node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type)
        types = _standard_types(node, model) if known_to_onnx else _fused_types(node)
        for value, known in zip(node.outputs, types):
            if value.type is None and known is not None:
                value.type, changed = known, True
    return changed


def _standard_types(node: ir.Node, model: ir.Model) -> list[ir.TypeProtocol | None]:
    """What the operator's own rule says of its outputs; nothing where it doesn't know enough of the inputs."""
    operands = {str(value.name): value for value in node.inputs if value is not None}
    known = {name: ir.serde.serialize_type(value.type) for name, value in operands.items() if value.type is not None}
    try:
        schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get("", 1), "")
        found = onnx.shape_inference.infer_node_outputs(schema, ir.serde.serialize_node(node), known)
    except Exception:  # inputs without types: the caller can do without
        return []
    return [ir.serde.deserialize_type_proto_for_type(found[str(value.name)]) if value.name in found else None for value in node.outputs]


def _fused_types(node: ir.Node) -> list[ir.TypeProtocol | None]:
    place = _TYPED_BY.get(node.op_type, 0)
    operand = node.inputs[place] if place < len(node.inputs) else None
    return [operand.type if operand is not None and isinstance(operand.type, ir.TensorType) else None] * len(node.outputs)


def _plain_casts(model: ir.Model) -> bool:
    """CastLike reads its second input for the type alone: as a Cast it doesn't depend on it. Left where the type is not known."""
    changed = False
    for node in list(model.graph):
        like = node.inputs[1] if is_standard(node, "CastLike") and len(node.inputs) == 2 else None
        if like is not None and like.dtype is not None:
            result = ir.Value(type=ir.TensorType(like.dtype), shape=node.outputs[0].shape)
            cast = ir.node("Cast", [node.inputs[0]], {"to": int(like.dtype)}, outputs=[result], name=node.name)
            cast.metadata_props.update(node.metadata_props)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [cast], node.outputs, cast.outputs)
            changed = True
    return changed


def _fold_small(model: ir.Model) -> tuple[int, str]:
    """Replaces what follows from small constants alone by initializers. Returns how many values, and a note where it failed."""
    foldable = _foldable_nodes(model)
    kept = set(model.graph.outputs)
    frontier = [
        value for node in foldable for value in node.outputs
        if value not in kept and any(use.node not in foldable for use in value.uses())
    ]
    if not frontier:
        return 0, ""
    try:
        found = prepare(model, cone(frontier), {}).open().run({})
    except Exception as error:  # onnxruntime raises a dozen unrelated classes; the graph is as right unfolded as folded
        return 0, f"constants not folded: {str(error).splitlines()[0][:200]}"
    count = 0
    for value, array in zip(frontier, found):
        if array.nbytes <= FOLD_LIMIT:
            replace_by_constant(model, value, ir.Tensor(array, name=value.name))
            count += 1
    return count, ""


def _foldable_nodes(model: ir.Model) -> set[ir.Node]:
    small = {
        value for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes <= FOLD_LIMIT and value.const_value.dtype != ir.DataType.STRING
    }
    nodes: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type not in _UNFOLDABLE and node.domain in ("", "ai.onnx") and all(value in small for value in reads(node)):
            nodes.add(node)
            small.update(node.outputs)
    return nodes


def replace_by_constant(model: ir.Model, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """An initializer of the same name in `value`'s place; what computed it is left for the removal of dead nodes."""
    name = str(value.name)
    constant = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    constant.metadata_props.update(value.metadata_props)
    value.name = f"{name}:folded"
    ir.convenience.replace_all_uses_with(value, constant)
    model.graph.register_initializer(constant)


# ---- quantized weights as fp32

# What lies between a DequantizeLinear and the weight it means: the block minimum of Q4_1, and blocks made rows again. A Transpose is left
# in the graph, so that a tied embedding and head go on sharing one tensor.
_AFTER_DEQUANTIZE = ("Reshape", "Add", "Sub", "Mul", "Squeeze", "Unsqueeze", "Identity")
_WIDENING = {("FLOAT16", "FLOAT"), ("BFLOAT16", "FLOAT"), ("FLOAT16", "DOUBLE"), ("BFLOAT16", "DOUBLE"), ("FLOAT", "DOUBLE")}


class FoldDequantize(ir.passes.InPlacePass):
    """Constants that are stored quantized, or in half precision and cast up, become the floats that they mean.

    Bits are onnxruntime's own, as it would compute them unfused. Each tensor is computed when its contents are asked for, and not kept: the
    peak is one tensor, not the model.
    """

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        kept = set(model.graph.outputs)
        folded = [value for value in _dequantized(model) if value not in kept]
        if any(value.shape is None or value.dtype is None for value in folded):  # known sizes spare computing each once for its shape
            _TYPES(model)
        for value in folded:
            replace_by_constant(model, value, computed_lazily(prepare(model, cone([value]), {}), value))
        if folded:
            common.RemoveUnusedNodesPass()(model)
        after = graph_size(model)
        count, seconds = len(folded), perf_counter() - start
        outcome = Outcome("fold_dequantize", "quantized constants", count, count, (), (), nodes, after[0], size, after[1], seconds)
        return PassResult(model, bool(folded), outcome)


def _dequantized(model: ir.Model) -> Iterator[ir.Value]:
    """The last values of each chain: constant, from a DequantizeLinear or a widening Cast on, and read by something else."""
    constant = set(model.graph.initializers.values()) - set(model.graph.inputs)
    chain: set[ir.Node] = set()
    for node in model.graph:
        operands = list(reads(node))
        if not all(value in constant for value in operands) or node.op_type in _UNFOLDABLE - {"DequantizeLinear"}:
            continue
        constant.update(node.outputs)
        follows = any(value.producer() in chain for value in operands)
        if is_standard(node, "DequantizeLinear") or _widens(node) or (follows and is_standard(node, *_AFTER_DEQUANTIZE)):
            chain.add(node)
    for node in model.graph:
        if node in chain and any(use.node not in chain for use in node.outputs[0].uses()):
            yield node.outputs[0]


def _widens(node: ir.Node) -> bool:
    """A Cast that loses nothing, of a constant that is no result of arithmetic."""
    operand = node.inputs[0] if node.inputs else None
    if not is_standard(node, "Cast") or operand is None or operand.const_value is None:
        return False
    return (operand.const_value.dtype.name, ir.DataType(node.attributes.get_int("to")).name) in _WIDENING


def computed_lazily(prepared: PreparedCone, value: ir.Value) -> ir.LazyTensor:
    """`value`, computed from its constants when asked for."""
    compute = partial(_compute, prepared)
    if value.dtype is not None and value.shape is not None and value.shape.is_static():
        dtype, shape = value.dtype, ir.Shape(value.shape.numpy())
    else:
        computed = compute()
        dtype, shape = computed.dtype, computed.shape
    return ir.LazyTensor(compute, dtype=dtype, shape=shape, name=str(value.name))


def _compute(prepared: PreparedCone) -> ir.Tensor:
    return ir.Tensor(prepared.open().run({})[0])
