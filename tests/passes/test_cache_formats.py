"""Which layer gets which cache format, and keys that name nothing."""

from __future__ import annotations

import pytest
from octavo.errors import OptionError
from octavo.passes.cache_formats import cache_formats, check_formats


@pytest.mark.parametrize("formats, expected", [
    ({"*": "int8"}, ["int8"] * 4),
    ({"0-1": "fp32", "*": "int8"}, ["fp32", "fp32", "int8", "int8"]),
    ({"3": "fp32"}, ["fp16", "fp16", "fp16", "fp32"]),
    ({"1": "fp32", "0-2": "int8"}, ["int8", "fp32", "int8", "fp16"]),
    ({}, ["fp16"] * 4),
])
def test_the_first_range_that_holds_a_layer_decides(formats, expected):
    assert cache_formats(formats, 4) == expected


@pytest.mark.parametrize("formats, message", [
    ({"0-4": "fp32"}, "'0-4' names layer 4, and the model has 4"),
    ({"7": "fp32", "*": "int8"}, "'7' names layer 7"),
    ({"*": "int8", "0": "fp32"}, "'0' decides nothing"),
    ({"0-1": "int8", "2-3": "int8", "*": "fp32"}, r"'\*' decides nothing"),
])
def test_a_key_that_names_or_decides_nothing_is_an_error(formats, message):
    with pytest.raises(OptionError, match=message):
        cache_formats(formats, 4)


@pytest.mark.parametrize("formats, message", [
    ({"first": "fp16"}, "'first' is no layer"), ({"2-1": "fp16"}, "'2-1' is no layer"), ({"-1": "fp16"}, "'-1' is no layer"),
    ({0: "fp16"}, "0 is no layer"), ({"0": "int4"}, "'int4' for '0'"), ({"*": False}, r"False for '\*'"), ({}, "the map is empty"),
])
def test_a_malformed_map_is_an_error_when_it_is_made(formats, message):
    with pytest.raises(OptionError, match=message):
        check_formats(formats)
