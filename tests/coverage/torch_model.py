"""A family's torch model with seeded weights, and the logits it gives: the oracle of the matrix. Runs with transformers 4 and 5."""

from __future__ import annotations

import inspect
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from families import Family, token_ids


def build(family: Family) -> Any:
    """The model in float32, evaluation mode. The same names and shapes get the same weights, whatever transformers made them.

    Raises KeyError for a model type that this transformers doesn't have and ValueError for a config key that it doesn't know.
    """
    config = dict(family.config)
    kind = config.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise KeyError(f"transformers {transformers.__version__} has no {kind}")
    _check_keys(kind, config)
    made = transformers.AutoConfig.for_model(kind, **config)
    made.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=None)
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, name)
    return model


def _check_keys(kind: str, config: dict[str, Any]) -> None:
    """A misspelt key would be kept and ignored, and the family would not vary what it says."""
    cls = transformers.CONFIG_MAPPING[kind]
    # What the two generations of transformers moved, renamed, or read without declaring it.
    moved = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct", "head_dim", "global_rope_theta",
             "local_rope_theta", "global_attn_every_n_layers", "layer_types", "no_rope_layers",
             "local_attention"}
    known = set(cls().to_dict()) | set(cls.attribute_map) | moved
    if unknown := config.keys() - known:
        raise ValueError(f"{kind} has no {', '.join(sorted(unknown))}")


def _fill(parameter: Any, name: str) -> None:
    """Wide weights: scores spread by about one, so that a wrong angle, scale or window shows. Norms and biases differ from one and zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if parameter.ndim == 1:
        parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
        return
    spread = 0.5 if parameter.shape[0] > 256 or "pos" in name or "wpe" in name else max(parameter.shape[-2:]) ** -0.5
    parameter.normal_(0.0, spread, generator=generator)


def logits(model: Any, family: Family) -> dict[str, np.ndarray]:
    """`ids.{i}` int64 [S], `prefill.{i}` float32 [S, V] and `decode.{i}` float32 [family.decode, V], each sequence alone.

    `decode` continues a cached prefix one token at a time; models without a cache have none.
    """
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for i, ids in enumerate(token_ids(family)):
            row = torch.from_numpy(ids)[None]
            found[f"ids.{i}"] = ids
            found[f"prefill.{i}"] = model(row, use_cache=False).logits[0].numpy().astype(np.float32)
            if (steps := _decode(model, row, family.decode)) is not None:
                found[f"decode.{i}"] = steps
    return found


def _decode(model: Any, row: Any, count: int) -> np.ndarray | None:
    # transformers 5.24 renamed it.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cut = row.shape[1] - count
    output = model(row[:, :cut], use_cache=True)
    cache = getattr(output, name, None)
    if cache is None:
        return None
    rows = []
    for t in range(cut, row.shape[1]):
        output = model(row[:, t : t + 1], **{name: cache}, use_cache=True)
        cache = getattr(output, name)
        rows.append(output.logits[0, -1].numpy().astype(np.float32))
    return np.stack(rows)


def save_checkpoint(model: Any, folder: Path, tokenizer: Path) -> None:
    """A Hugging Face checkpoint folder with the tokenizer files of `tokenizer`."""
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
