"""Builds the ONNX graph of a llama-family GGUF decoder: standard operators of opset 23, and nothing that a runtime would have to guess.

    input_ids [batch, sequence]   attention_mask [batch, past+sequence]   position_ids [batch, sequence]
    past_key_values.{i}.key/value [batch, G, past, D]   →   logits [batch, sequence, V]   present.{i}.key/value [batch, G, past+sequence, D]

Nodes are named after the modules of the checkpoint (`/model/layers.3/self_attn/q_proj/MatMul`), initializers after its parameters.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import ModelError
from .gguf_file import GgufFile
from .gguf_parameters import GraphParts, scope
from .gguf_spec import GgufSpec, rotary_tables
from .gguf_weights import dequantize, half_split_rows

OPSET = 23
IR_VERSION = 11


def build_graph(file: GgufFile, spec: GgufSpec) -> ir.Model:
    """The model of `file`. Weights are lazy: they are read from the file when the model is written.

    ModelError names a tensor that is missing, has another shape, or has no place in the graph.
    """
    return _Decoder(file, spec).model()


class _Decoder(GraphParts):
    """The decoder's modules, from the whole to its parts."""

    def __init__(self, file: GgufFile, spec: GgufSpec) -> None:
        super().__init__(file)
        self.spec = spec
        self.ids = _input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        self.mask = _input("attention_mask", ir.DataType.INT64, ["batch", "past+sequence"])
        self.positions = _input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        self.visible = self.visible_keys()
        self.cos, self.sin = self.rotary_caches()

    def model(self) -> ir.Model:
        spec = self.spec
        table = self.matrix("token_embd.weight", "model.embed_tokens", (spec.vocab, spec.hidden))
        hidden = self.op("Gather", [table, self.ids], "/model/embed_tokens/Gather")
        pasts: list[ir.Value] = []
        presents: list[ir.Value] = []
        for i in range(spec.layers):
            cache: list[int | str] = ["batch", spec.kv_heads, "past", spec.head_size]
            past = [_input(f"past_key_values.{i}.{side}", ir.DataType.FLOAT, cache) for side in ("key", "value")]
            hidden, *present = self.layer(i, hidden, past)
            pasts += past
            presents += present
        hidden = self.norm(hidden, "output_norm.weight", "model.norm", spec.hidden)
        logits = self.head(hidden, table)
        _typed(logits, "logits", ["batch", "sequence", spec.vocab])
        if unused := sorted(set(self.file.tensors) - self.used):
            message = f"{self.file.path}: tensor {unused[0]!r} has no place in a {spec.architecture} decoder"
            raise ModelError(message, hint="this variant of the architecture is not supported: export it to ONNX from its own framework")
        graph = ir.Graph(
            [self.ids, self.mask, self.positions, *pasts], [logits, *presents],
            nodes=self.nodes, initializers=list(self.initializers.values()), opset_imports={"": OPSET}, name=spec.architecture,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="octavo")

    def layer(self, i: int, hidden: ir.Value, past: list[ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One decoder layer over its past key and value: (hidden states, present key, present value)."""
        spec, module, stored = self.spec, f"model.layers.{i}", f"blk.{i}"
        queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        x = self.norm(hidden, f"{stored}.attn_norm.weight", f"{module}.input_layernorm", spec.hidden)
        attention = f"{module}.self_attn"
        q = self.linear(x, f"{stored}.attn_q", f"{attention}.q_proj", (queries, spec.hidden), heads=spec.heads)
        k = self.linear(x, f"{stored}.attn_k", f"{attention}.k_proj", (keys, spec.hidden), heads=spec.kv_heads)
        v = self.linear(x, f"{stored}.attn_v", f"{attention}.v_proj", (keys, spec.hidden))
        if spec.architecture == "qwen3":
            q = self.head_norm(q, f"{stored}.attn_q_norm.weight", f"{attention}.q_norm", spec.heads)
            k = self.head_norm(k, f"{stored}.attn_k_norm.weight", f"{attention}.k_norm", spec.kv_heads)
        q = self.rotate(q, spec.heads, f"{scope(attention)}/q_rotary/RotaryEmbedding")
        k = self.rotate(k, spec.kv_heads, f"{scope(attention)}/k_rotary/RotaryEmbedding")
        output, present_key, present_value = self.node(
            "Attention", [q, k, v, self.visible, *past], f"{scope(attention)}/Attention", outputs=3,
            q_num_heads=spec.heads, kv_num_heads=spec.kv_heads, scale=float(spec.head_size**-0.5),
        )
        for value, side in ((present_key, "key"), (present_value, "value")):
            _typed(value, f"present.{i}.{side}", ["batch", spec.kv_heads, "past+sequence", spec.head_size])
        x = self.linear(output, f"{stored}.attn_output", f"{attention}.o_proj", (spec.hidden, queries))
        hidden = self.op("Add", [hidden, x], f"{scope(module)}/Add")
        x = self.norm(hidden, f"{stored}.ffn_norm.weight", f"{module}.post_attention_layernorm", spec.hidden)
        return self.op("Add", [hidden, self.mlp(x, stored, f"{module}.mlp")], f"{scope(module)}/Add_1"), present_key, present_value

    def mlp(self, x: ir.Value, stored: str, module: str) -> ir.Value:
        """down(silu(gate(x)) · up(x))"""
        spec = self.spec
        gate = self.linear(x, f"{stored}.ffn_gate", f"{module}.gate_proj", (spec.inner, spec.hidden))
        up = self.linear(x, f"{stored}.ffn_up", f"{module}.up_proj", (spec.inner, spec.hidden))
        sigmoid = self.op("Sigmoid", [gate], f"{scope(module)}/act_fn/Sigmoid")
        silu = self.op("Mul", [gate, sigmoid], f"{scope(module)}/act_fn/Mul")
        product = self.op("Mul", [silu, up], f"{scope(module)}/Mul")
        return self.linear(product, f"{stored}.ffn_down", f"{module}.down_proj", (spec.hidden, spec.inner))

    def head(self, hidden: ir.Value, table: ir.Value) -> ir.Value:
        """Logits, from the embedding table where the file has no output matrix of its own."""
        if "output.weight" in self.file.tensors:
            return self.linear(hidden, "output", "lm_head", (self.spec.vocab, self.spec.hidden))
        columns = self.op("Transpose", [table], "/lm_head/Transpose", perm=[1, 0])
        return self.op("MatMul", [hidden, columns], "/lm_head/MatMul")

    def visible_keys(self) -> ir.Value:
        """bool [batch, 1, sequence, past+sequence]: a row sees the keys at or before it that attention_mask does not hide."""
        name = "/model/mask"
        total = self.op("Squeeze", [self.op("Shape", [self.mask], f"{name}/Shape", start=1, end=2)], f"{name}/Squeeze")
        fresh = self.op("Squeeze", [self.op("Shape", [self.ids], f"{name}/Shape_1", start=1, end=2)], f"{name}/Squeeze_1")
        past = self.op("Sub", [total, fresh], f"{name}/Sub")
        zero, one = self.constant("zero", np.int64(0)), self.constant("one", np.int64(1))
        keys = self.op("Range", [zero, total, one], f"{name}/Range")
        rows = self.op("Range", [past, total, one], f"{name}/Range_1")
        rows = self.op("Unsqueeze", [rows, self.constant("axis_1", np.array([1]))], f"{name}/Unsqueeze")
        causal = self.op("LessOrEqual", [keys, rows], f"{name}/LessOrEqual")
        real = self.op("Cast", [self.mask], f"{name}/Cast", to=int(ir.DataType.BOOL))
        real = self.op("Unsqueeze", [real, self.constant("axes_1_2", np.array([1, 2]))], f"{name}/Unsqueeze_1")
        return self.op("And", [causal, real], f"{name}/And")

    def rotary_caches(self) -> tuple[ir.Value, ir.Value]:
        half = (self.spec.head_size // 2,)
        factors = dequantize(self.tensor("rope_freqs.weight", half)) if "rope_freqs.weight" in self.file.tensors else None
        cos, sin = rotary_tables(self.spec, factors)
        return self.constant("model.rotary_emb.cos", cos), self.constant("model.rotary_emb.sin", sin)

    def rotate(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        return self.op("RotaryEmbedding", [x, self.cos, self.sin, self.positions], name, num_heads=heads, interleaved=0)

    def norm(self, x: ir.Value, stored: str, module: str, size: int) -> ir.Value:
        weight = self.vector(stored, f"{module}.weight", size)
        return self.op("RMSNormalization", [x, weight], f"{scope(module)}/RMSNormalization", axis=-1, epsilon=self.spec.epsilon)

    def head_norm(self, x: ir.Value, stored: str, module: str, heads: int) -> ir.Value:
        """RMSNorm of each head of [batch, sequence, heads·D]."""
        size = self.spec.head_size
        apart = self.op("Reshape", [x, self.shape((0, 0, heads, size))], f"{scope(module)}/Reshape")
        normed = self.norm(apart, stored, module, size)
        return self.op("Reshape", [normed, self.shape((0, 0, -1))], f"{scope(module)}/Reshape_1")

    def linear(self, x: ir.Value, stored: str, module: str, shape: tuple[int, int], *, heads: int = 0) -> ir.Value:
        """x · Wᵀ (+ bias) with W [M, K] of `shape`. `heads`: the rows are a rotated projection's, which the converter may have permuted."""
        order = half_split_rows(heads, self.spec.head_size) if heads and self.spec.permuted else None
        weight = self.matrix(f"{stored}.weight", module, shape, order, transposed=True)
        y = self.op("MatMul", [x, weight], f"{scope(module)}/MatMul")
        if f"{stored}.bias" not in self.file.tensors:
            return y
        return self.op("Add", [y, self.vector(f"{stored}.bias", f"{module}.bias", shape[0], order)], f"{scope(module)}/Add")


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _typed(value: ir.Value, name: str, shape: list[int | str]) -> None:
    """Makes a float graph output of `value`."""
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
