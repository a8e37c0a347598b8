"""Imports a GGUF model as plain standard ONNX, with its tokenizer, chat template and generation config beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..errors import ModelError
from .artifact import GRAPH, TOKENIZER_FILES, WEIGHTS
from .gguf_file import GgufFile
from .gguf_graph import build_graph
from .gguf_spec import ARCHITECTURES, GgufSpec, read_spec
from .gguf_tokenizer import build_tokenizer, special_id
from .staging import StagedFolder

Progress = Callable[[str, int, int], None]

# Below this a tensor stays in the graph file, where shape inference can see it.
_EXTERNAL_FROM = 1024
_PAGE = 4096


def import_gguf(path: str | os.PathLike[str], out_dir: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """Writes the model in the GGUF file `path` into the folder `out_dir` and returns the path of its `model.onnx`.

    The folder gets model.onnx, model.onnx.data (tensors aligned to pages), tokenizer.json, tokenizer_config.json, generation_config.json,
    config.json and, where the file has one, chat_template.jinja. It is written beside and renamed; an existing folder is replaced only if
    it holds nothing but such files. `progress(tensor name, tensors written, tensors in all)` is called as the weights are written.

    Raises ModelError for a file that is no GGUF model, truncated, inconsistent (the message names the tensor), or of an architecture,
    tensor type or tokenizer that is not supported (the message names what is).
    """
    file = GgufFile(path)
    spec = read_spec(file)
    model = build_graph(file, spec)
    tokenizer = build_tokenizer(file)
    with StagedFolder(out_dir, _is_import, error=ModelError) as staged:
        _save(model, staged.folder, progress)
        tokenizer.save(str(staged.folder / "tokenizer.json"))
        for name, data in (
            ("tokenizer_config.json", _tokenizer_config(file, spec)),
            ("generation_config.json", _generation_config(file)),
            ("config.json", _config(file, spec)),
        ):
            (staged.folder / name).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if "tokenizer.chat_template" in file.metadata:
            (staged.folder / "chat_template.jinja").write_text(file.get("tokenizer.chat_template", str), encoding="utf-8")
        return staged.commit() / GRAPH


def _is_import(folder: Path) -> bool:
    """Holds nothing but what an import writes."""
    return (folder / GRAPH).is_file() and all(file.name in (GRAPH, WEIGHTS, *TOKENIZER_FILES) for file in folder.iterdir())


def _save(model: ir.Model, folder: Path, progress: Progress | None) -> None:
    written = 0

    def tell(tensor: ir.TensorProtocol, info: Any) -> None:
        nonlocal written
        written += 1
        if progress is not None:
            progress(tensor.name or "", written, info.total)

    ir.save(
        model, folder / GRAPH, external_data=WEIGHTS, size_threshold_bytes=_EXTERNAL_FROM, alignment=_PAGE, align_threshold=0, callback=tell,
    )


def _special_ids(file: GgufFile) -> dict[str, int]:
    """bos_token_id and the like, for those that the file has."""
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    found = {f"{ours}_token_id": special_id(file, theirs) for theirs, ours in names.items()}
    return {key: token for key, token in found.items() if token is not None}


def _config(file: GgufFile, spec: GgufSpec) -> dict[str, Any]:
    """The model's sizes under the keys of a transformers config.json."""
    architecture, model_type, _ = ARCHITECTURES[spec.architecture]
    config: dict[str, Any] = {
        "architectures": [architecture], "model_type": model_type, "vocab_size": spec.vocab, "hidden_size": spec.hidden,
        "intermediate_size": spec.inner, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_size, "max_position_embeddings": spec.max_context,
        "rms_norm_eps": spec.epsilon, "rope_theta": spec.rope_base, "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_special_ids(file),
    }
    if spec.rope_factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": spec.rope_factor}
    return config


def _generation_config(file: GgufFile) -> dict[str, Any]:
    """The ids that begin, end and pad a text. A turn's end (eot) ends generation as well."""
    ids = {key: token for key, token in _special_ids(file).items() if key != "unk_token_id"}
    ends = [token for token in (special_id(file, "eos"), special_id(file, "eot")) if token is not None]
    config: dict[str, Any] = dict(ids)
    if len(set(ends)) > 1:
        config["eos_token_id"] = sorted(set(ends))
    return config


def _tokenizer_config(file: GgufFile, spec: GgufSpec) -> dict[str, Any]:
    tokens = file.get("tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {key.removesuffix("_id"): tokens[token] for key, token in _special_ids(file).items()}
    for key in ("add_bos_token", "add_eos_token"):
        if f"tokenizer.ggml.{key}" in file.metadata:
            config[key] = file.get(f"tokenizer.ggml.{key}", bool)
    config |= {"model_max_length": spec.max_context, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return config
