"""SkipSimplifiedLayerNormalization as the Add and the norm that it is: the sum can then end the product before it, the norm begin the next."""

from __future__ import annotations

import onnx_ir as ir


def split_skip_norms(model: ir.Model) -> int:
    """Rewrites every one that has no bias and whose statistics nobody reads. Returns how many."""
    count = 0
    for node in list(model.graph):
        if node.domain != "com.microsoft" or node.op_type != "SkipSimplifiedLayerNormalization":
            continue
        x, skip, weight = node.inputs[:3]
        bias = node.inputs[3] if len(node.inputs) > 3 else None
        if bias is not None or any(value.uses() or value.is_graph_output() for value in node.outputs[1:3]):
            continue
        total = ir.node("Add", [x, skip], name=f"{node.name}/Add")
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        norm = ir.node("SimplifiedLayerNormalization", [total.outputs[0], weight], {"axis": -1, "epsilon": epsilon}, name=node.name)
        for new, old in ((total.outputs[0], node.outputs[3] if len(node.outputs) > 3 else None), (norm.outputs[0], node.outputs[0])):
            new.type = ir.TensorType(ir.DataType.FLOAT)
            if old is not None:
                new.name, new.type, new.shape = old.name, old.type, old.shape
        olds, news = [node.outputs[0]], [norm.outputs[0]]
        if len(node.outputs) > 3:
            olds.append(node.outputs[3])
            news.append(total.outputs[0])
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [total, norm], olds, news)
        count += 1
    return count
