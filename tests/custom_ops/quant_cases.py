"""The declared cases of QuantLinear and QuantEmbedding, and how they run. Reference, kernels and every instruction set go over this one list."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from attention_run import node_session
from octavo.custom_ops import quant_reference
from octavo.custom_ops.contract import DOMAIN, GATES, OPS, OPSET, WeightFormat
from octavo.custom_ops.packing import QuantizedWeight, pack
from onnx import TensorProto, helper

Array = np.ndarray


@dataclass(frozen=True)
class QuantCase:
    """`parts` are the optional inputs in use; `rows` the leading shape."""

    name: str
    K: int = 192
    M: int = 40
    bits: int = 4
    group: int = 32
    zero: str = "none"
    scale: str = "float16"
    activation_bits: int = 8
    gate: str = "none"
    parts: tuple[str, ...] = ()
    rows: tuple[int, ...] = (3,)
    epsilon: float = 1e-5

    @property
    def attributes(self) -> dict[str, Any]:
        return {"activation_bits": self.activation_bits, "gate": GATES.index(self.gate), "norm_epsilon": self.epsilon}

    @property
    def outputs(self) -> int:
        return self.M if self.gate == "none" else 2 * self.M

    def weight(self) -> QuantizedWeight:
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        shape, top = (self.outputs, self.K // self.group), 1 << self.bits
        scales = (rng.standard_normal(shape) / top).astype(self.scale)  # negative ones too, as Q4_0 has them
        return QuantizedWeight(
            rng.integers(0, top, (self.outputs, self.K), dtype=np.uint8),
            scales,
            self.bits,  # type: ignore[arg-type]
            self.group,  # type: ignore[arg-type]
            rng.integers(0, top, shape, dtype=np.uint8) if self.zero == "uint8" else None,
            rng.standard_normal(shape).astype(self.scale) if self.zero == "float" else None,
        )

    def build(self) -> dict[str, Array]:
        """All inputs but the weight, by the contract's names."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()) + 1)
        shapes = {
            "input": (*self.rows, self.K),
            "norm_weight": (self.K,),
            "skip": (*self.rows, self.K),
            "bias": (self.outputs,),
            "residual": (*self.rows, self.M),
            "activation_scale": (self.K // self.group,),
        }
        found = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in ("input", *self.parts)}
        if "activation_scale" in found:
            found["activation_scale"] = np.exp2(found["activation_scale"]) / 50  # some groups saturate, some hardly step
        return found

    def tolerance(self, inputs: Mapping[str, Array]) -> float:
        """The gates are polynomials within 4 units in the last place of their argument's size, multiplied by the values."""
        if self.gate == "none":
            return 0.0
        plain = {name: inputs[name] for name in inputs if name != "residual"}
        sums = quant_reference.quant_linear(self.weight(), **plain, activation_bits=self.activation_bits, norm_epsilon=self.epsilon).output
        # gelu_tanh: an argument of 4 rounds by 4 eps/2, and its exponential with it
        return float(8 * np.finfo(np.float32).eps * np.abs(sums[..., : self.M] * sums[..., self.M :]).max()) + 1e-6


_ALL = ("norm_weight", "skip", "bias", "residual")
_WEIGHTS = tuple(
    QuantCase(f"w{bits}_g{group}_{zero}_{scale}_a{activation}", K=group * (5 if group < 128 else 3), bits=bits, group=group, zero=zero, scale=scale,
              activation_bits=activation)
    for bits in (4, 8)
    for group in (32, 64, 128)
    for zero, scale in (("none", "float16"), ("uint8", "float32"), ("float", "float16"), ("none", "float32"), ("float", "float32"))
    for activation in (8, 32)
)  # fmt: skip
_ROWS = tuple(
    QuantCase(f"rows{n}_{zero}_a{activation}", rows=(n,), zero=zero, activation_bits=activation, M=70)
    for n in (1, 2, 4, 5, 6, 7, 8, 9, 16, 23, 47, 48, 63, 64, 65, 70, 130)
    for zero, activation in (("none", 8), ("uint8", 8), ("float", 32))
)
_BYTES = tuple(QuantCase(f"bytes_rows{n}", rows=(n,), bits=8, zero="uint8", group=64, M=33) for n in (1, 3, 8, 50))
_WIDTHS = tuple(QuantCase(f"m{M}_k{K}", M=M, K=K) for M, K in ((1, 32), (15, 64), (16, 544), (17, 576), (31, 1024), (32, 1056), (33, 2080), (300, 96)))
_PARTS = tuple(QuantCase(f"part_{p}_a{a}", parts=(p,), activation_bits=a) for p in _ALL for a in (8, 32))
_GATES = tuple(
    QuantCase(f"gate_{gate}_m{M}_rows{n}", gate=gate, M=M, rows=(n,), parts=_ALL if M == 21 else ())
    for gate in GATES[1:]
    for M in (16, 21)
    for n in (1, 9)
)
_STATIC = (
    *(QuantCase(f"static_w{bits}_g{group}_{zero}", K=group * 5, bits=bits, group=group, zero=zero, parts=("activation_scale",), rows=(9,))
      for bits in (4, 8) for group in (32, 64, 128) for zero in ("none", "uint8", "float")),
    *(QuantCase(f"static_rows{n}", rows=(n,), bits=8, parts=("norm_weight", "activation_scale")) for n in (1, 2, 7, 8, 23, 70, 130)),
    QuantCase("static_everything", K=1664, M=53, bits=8, zero="float", parts=(*_ALL, "activation_scale"), rows=(2, 35)),
    QuantCase("static_gate", M=21, bits=8, gate="silu", parts=(*_ALL, "activation_scale"), rows=(9,)),
)  # fmt: skip
QUANT_CASES = (
    *_WEIGHTS,
    *_ROWS,
    *_BYTES,
    *_WIDTHS,
    *_PARTS,
    *_GATES,
    *_STATIC,
    QuantCase("everything_int8", K=640, M=53, group=64, zero="float", parts=_ALL, rows=(2, 35), epsilon=1e-6),
    QuantCase("everything_float", K=640, M=53, group=64, zero="uint8", parts=_ALL, rows=(2, 5), activation_bits=32),
    QuantCase("everything_bytes", K=640, M=53, bits=8, group=128, zero="float", parts=_ALL, rows=(70,)),
    QuantCase("many_panels", K=1664, M=40, group=128, zero="uint8", rows=(66,)),
    QuantCase("one_vector", rows=()),
    QuantCase("no_rows", rows=(0,), parts=_ALL),
)


def quant_model(op: str, fmt: WeightFormat, packed: Array, inputs: Mapping[str, Array], attributes: Mapping[str, Any], sums: bool) -> bytes:
    """A graph of one node with a constant weight."""
    contract = OPS[op]
    names = [port.name if port.name in inputs or port.name == "weight" else "" for port in contract.inputs]
    while not names[-1]:
        names.pop()
    outputs = [port.name for port in contract.outputs][: 2 if sums else 1]
    node = helper.make_node(op, names, outputs, domain=DOMAIN, **fmt.attributes(), **attributes)
    types = {"ids": TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), None) for n in names if n and n != "weight"],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        initializer=[helper.make_tensor("weight", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def run_quant(case: QuantCase, inputs: Mapping[str, Array], threads: int = 1) -> quant_reference.QuantLinearResult:
    weight, gated = case.weight(), case.gate != "none"
    model = quant_model("QuantLinear", weight.format(gated=gated), pack(weight, gated=gated), inputs, case.attributes, sums=True)
    return quant_reference.QuantLinearResult(*node_session(model, threads).run(None, dict(inputs)))


def run_embedding(weight: QuantizedWeight, ids: Array) -> Array:
    model = quant_model("QuantEmbedding", weight.format(), pack(weight), {"ids": ids}, {}, sums=False)
    return node_session(model, 1).run(None, {"ids": ids})[0]


def reference_of(case: QuantCase, inputs: Mapping[str, Array]) -> quant_reference.QuantLinearResult:
    return quant_reference.quant_linear(case.weight(), **inputs, **case.attributes)


def only(case: QuantCase, inputs: Mapping[str, Array], rows: slice) -> tuple[QuantCase, dict[str, Array]]:
    """The same case with some of its rows (one leading dimension)."""
    picked = {name: array[rows] if name in ("input", "skip", "residual") else array for name, array in inputs.items()}
    return replace(case, rows=(picked["input"].shape[0],)), picked
