"""Graphs and scrambles for the tests of the diff; no test leaves hashes in the user's cache."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def own_hash_cache():
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        yield Path(folder)
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    """A four-layer decoder with its weights in the file."""
    import onnx
    from octavo.models.tiny import tiny_llama_onnx

    folder = tmp_path_factory.mktemp("decoder")
    path = folder / "decoder.onnx"
    onnx.save(onnx.load(tiny_llama_onnx(folder / "out", layers=4)), path)
    return path


@pytest.fixture(scope="session")
def models(decoder, tmp_path_factory) -> tuple[Path, Path]:
    """The decoder, and one with a Cast before every attention and another opset."""
    import onnx
    from onnx import helper

    model = onnx.load(decoder)
    for node in [node for node in model.graph.node if node.op_type == "Attention"]:
        new = helper.make_node("Cast", [node.input[0]], [f"{node.name}/cast"], to=1)
        node.input[0] = new.output[0]
        model.graph.node.insert(list(model.graph.node).index(node), new)
    model.opset_import[0].version = 24
    path = tmp_path_factory.mktemp("models") / "b.onnx"
    onnx.save(model, path)
    return decoder, path
