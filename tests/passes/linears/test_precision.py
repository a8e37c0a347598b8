"""Patterns decide in their order, and none of them in vain."""

from __future__ import annotations

import pytest
from octavo.errors import OptionError
from octavo.passes.linears.precision import precisions

NAMES = ["layers.0.attn.q", "layers.0.mlp.down", "layers.10.attn.q", "layers.10.mlp.down", "head"]


def test_the_first_pattern_that_fits_decides() -> None:
    found = precisions({"layers.0.*": "int8", "head": "fp32", "*": "int4"}, NAMES)
    assert list(found.values()) == ["int8", "int8", "int4", "int4", "fp32"]


def test_what_no_pattern_takes_stays_as_stored() -> None:
    assert set(precisions({"*.down": "int4"}, NAMES).values()) == {"int4", "stored"}


def test_a_star_is_no_part_of_a_number() -> None:
    assert precisions({"layers.1.*": "int4", "*": "int8"}, [*NAMES, "layers.1.attn.q"])["layers.10.attn.q"] == "int8"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"*": "int3"}, r"'int3' for '\*' is not one of 'stored', 'fp32', 'int8', 'int4'"),
        ({"layers.0.attn.w": "int4"}, r"no linear is called 'layers\.0\.attn\.w'.*near it: layers\.0\.attn\.q"),
        ({"lm_head": "int8", "*": "int4"}, r"'lm_head'.*near it: .*head"),
        ({"*": "int4", "head": "int8"}, r"'head' decides nothing, '\*' come first.*put the general one last"),
        ({"layers.0.*": "int8", "layers.1*": "int8", "layers.*": "int4"}, r"'layers\.\*' decides nothing"),
    ],
)
def test_patterns_that_say_nothing_are_errors(patterns: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        precisions(patterns, NAMES)
