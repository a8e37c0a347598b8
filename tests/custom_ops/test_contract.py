"""The ops that the library declares are those of the contract: names, order, optional ports, types. Layout helpers invert each other."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnxruntime as ort
import pytest
from octavo import custom_ops
from octavo.custom_ops.contract import (
    BLOCK_SIZES,
    CACHE_FORMATS,
    CHUNK,
    DOMAIN,
    OPS,
    OPSET,
    OpContract,
    pack_key,
    pack_value,
    unpack_key,
    unpack_value,
)
from onnx import TensorProto, helper

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
_REQUIRED = {"K": 32}  # every other required attribute may be 2
_PORTS = [(contract, index) for contract in OPS.values() for index in range(len(contract.inputs))]


def _create(contract: OpContract, names: list[str], types: dict[str, int], outputs: int = 1) -> ort.InferenceSession:
    attributes = {a.name: _REQUIRED.get(a.name, 2) if a.default is None else a.default for a in contract.attributes}
    node = helper.make_node(contract.name, names, [f"output{i}" for i in range(outputs)], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, types[n], None) for n in names if n],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET)], ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    custom_ops.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _types(contract: OpContract) -> dict[str, int]:
    return {port.name: _TYPES[port.dtypes[0]] for port in contract.inputs}


@pytest.mark.parametrize("contract", OPS.values(), ids=lambda c: c.name)
def test_every_input_of_the_contract_exists_and_no_more(contract: OpContract) -> None:
    names, types = [port.name for port in contract.inputs], _types(contract)
    session = _create(contract, names, types)
    assert [i.name for i in session.get_inputs()] == names
    with pytest.raises(Exception, match=contract.name):
        _create(contract, [*names, "one_more"], types | {"one_more": TensorProto.FLOAT})
    with pytest.raises(Exception, match=contract.name):
        _create(contract, names, types, outputs=len(contract.outputs) + 1)


@pytest.mark.parametrize("contract", OPS.values(), ids=lambda c: c.name)
def test_exactly_the_optional_inputs_may_be_absent(contract: OpContract) -> None:
    _create(contract, ["" if port.optional else port.name for port in contract.inputs], _types(contract))
    for absent in contract.inputs:
        if absent.optional:
            continue
        names = ["" if port is absent else port.name for port in contract.inputs]
        inputs = {port.name: np.zeros((1,) * 4, port.dtypes[0]) for port in contract.inputs}
        with pytest.raises(Exception, match=rf"{contract.name}|{absent.name}"):
            session = _create(contract, names, _types(contract))
            session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})


@pytest.mark.parametrize(("contract", "index"), _PORTS, ids=lambda v: str(getattr(v, "name", v)))
def test_an_input_takes_the_types_of_the_contract(contract: OpContract, index: int) -> None:
    """Ports of one type are typed at load; those of several are checked when the op runs (test_status)."""
    port, names = contract.inputs[index], [p.name for p in contract.inputs]
    for dtype in port.dtypes:
        _create(contract, names, _types(contract) | {port.name: _TYPES[dtype]})
    if len(port.dtypes) == 1:
        with pytest.raises(Exception, match=r"[Tt]ype"):
            _create(contract, names, _types(contract) | {port.name: TensorProto.DOUBLE})


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("P", BLOCK_SIZES)
def test_pack_and_unpack_are_inverse(name: Literal["fp32", "fp16"], P: int) -> None:
    f = CACHE_FORMATS[name]
    assert CHUNK % P == 0
    rng = np.random.default_rng(P)
    tokens = rng.standard_normal((P, 3, 24)).astype(f.dtype)
    assert pack_key(tokens).shape == f.key_shape(1, 3, 24, P)[1:]
    assert pack_value(tokens).shape == f.value_shape(1, 3, 24, P)[1:]
    assert (unpack_key(pack_key(tokens)) == tokens).all() and (unpack_value(pack_value(tokens)) == tokens).all()


def test_packed_blocks_are_what_the_kernel_reads() -> None:
    """A full block written through the helpers, read by one query: the same as the stateless reference over the tokens."""
    from attention_run import run_op
    from octavo.custom_ops.reference import Heads, flash_attention

    rng = np.random.default_rng(3)
    keys, values, query = (rng.standard_normal(s).astype(np.float32) for s in ((16, 2, 24), (16, 2, 40), (1, 4 * 24)))
    inputs = {
        "query": query,
        "key": np.zeros((1, 48), np.float32),
        "value": np.zeros((1, 80), np.float32),
        "key_cache": pack_key(keys)[None].copy(),
        "value_cache": pack_value(values)[None].copy(),
        "cumulative_sequence_length": np.array([0, 1], np.int32),
        "past_seqlens": np.array([15], np.int32),
        "block_table": np.array([[0]], np.int32),
        "slot_mapping": np.array([-1], np.int32),
        "parent": np.array([-1], np.int32),
    }
    got = run_op("PagedAttention", inputs, {"num_heads": 4, "kv_num_heads": 2})
    expected = flash_attention(Heads(4, 2), query=query[None], key=keys.reshape(1, 16, 48), value=values.reshape(1, 16, 80))[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)  # 16 keys of 24 elements, values about 1: 16 eps
