"""The GGUF reader takes what the gguf package writes and answers everything else with a ModelError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.errors import ModelError
from octavo.models.gguf_file import GgufFile

MakeGguf = Callable[..., Path]


def test_every_truncation_is_an_error(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    whole = path.read_bytes()
    GgufFile(path)
    for length in [*range(0, 200), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError) as caught:
            GgufFile(path)
        assert caught.value.hint


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_never_escape_the_reader(data: st.DataObject, make_gguf: MakeGguf, tmp_path: Path) -> None:
    """Corrupt headers read, or are refused; they never hang, exhaust memory or raise something else."""
    original = tmp_path / "model.gguf"
    if not original.exists():
        make_gguf()
    content = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 4000))] = data.draw(st.sampled_from([0, 1, 8, 9, 0x7F, 0xFF]))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content)
    try:
        GgufFile(changed)
    except ModelError as error:
        assert error.hint


FOREIGN = [b"GGML....", b"GGUF" + (1).to_bytes(4, "little") + bytes(16), b"GGUF" + (3).to_bytes(4, "big") + bytes(16)]


@pytest.mark.parametrize("content", FOREIGN, ids=["magic", "version 1", "big-endian"])
def test_another_format_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"not a GGUF file|GGUF version"):
        GgufFile(path)


def test_a_value_of_another_type_is_refused(make_gguf: MakeGguf) -> None:
    file = GgufFile(make_gguf())
    assert file.get("llama.block_count", int) == 2
    assert file.get("llama.block_count", float) == 2.0
    assert file.get("absent", str, "x") == "x"
    with pytest.raises(ModelError, match="no str"):
        file.get("llama.block_count", str)
    with pytest.raises(ModelError, match="no metadata key 'absent'"):
        file.get("absent", int)
