"""Seeded inputs fit the interface they are made from: onnxruntime takes them, symbols agree, padding is there."""

from __future__ import annotations

import numpy as np
import pytest
from octavo.compiler.check_inputs import BATCH, FEW_IDS, seeded_inputs
from octavo.errors import UnsupportedError
from octavo.models.interface import GraphInterface, GraphPort

ENCODER = GraphInterface(
    inputs=(
        GraphPort("input_ids", "int64", ("batch", "seq"), "input_ids"),
        GraphPort("attention_mask", "int64", ("batch", "seq"), "attention_mask"),
        GraphPort("token_type_ids", "int64", ("batch", "seq"), "other"),
        GraphPort("position_ids", "int32", (1, "seq"), "position_ids"),
        GraphPort("pixels", "float32", ("batch", 3, "side", None), "other"),
        GraphPort("flags", "bool", ("seq",), "other"),
    ),
    outputs=(),
)


def test_shapes_types_and_meanings():
    arrays = seeded_inputs(ENCODER, 8, seed=0)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "input_ids": ((BATCH, 8), "int64"), "attention_mask": ((BATCH, 8), "int64"), "token_type_ids": ((BATCH, 8), "int64"),
        "position_ids": ((1, 8), "int32"), "pixels": ((BATCH, 3, 8, 8), "float32"), "flags": ((8,), "bool"),
    }
    assert arrays["input_ids"].max() < FEW_IDS and len(np.unique(arrays["input_ids"])) > 1
    assert arrays["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert arrays["position_ids"].tolist() == [list(range(8))]
    assert arrays["token_type_ids"].sum() == 0


def test_the_seed_decides():
    a, b, c = (seeded_inputs(ENCODER, 8, seed)["input_ids"] for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("port", [GraphPort("x", "float32", None, "other"), GraphPort("x", "str", (1,), "other")])
def test_what_can_not_be_made_up_is_an_error(port):
    with pytest.raises(UnsupportedError, match="input x"):
        seeded_inputs(GraphInterface((port,), ()), 8, seed=0)
