"""Exports a torch decoder to ONNX the way its users do: the only file that imports torch, and only when it is called.

    decoder = load_checkpoint("SmolLM2-135M-Instruct.gguf")     # or a Hugging Face checkpoint folder; `load_tiny` for a seeded small model
    decoder.export("out18/")                                    # the dynamo exporter at opset 18, with a past
    decoder.export("out17/", ExportVariant(exporter="torchscript", opset=17))

An exported folder holds `model.onnx`, `model.onnx.data`, and the configuration and tokenizer files of the source, so that it can be
compiled as it is. The graphs are left exactly as the exporter wrote them: their spellings are what the compiler has to understand.
"""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ModelError, OptionError, UnsupportedError
from .artifact import GRAPH, TOKENIZER_FILES, WEIGHTS
from .staging import StagedFolder
from .tiny import Config, tiny_config, tiny_weights, write_config, write_tiny_tokenizer

if TYPE_CHECKING:
    import os

OPSETS = {"dynamo": (18, 20, 23, 24), "torchscript": (14, 15, 16, 17)}

# Sizes of the example inputs. None is 0 or 1, which the exporters take for constants (and transformers treats a single query as a case of
# its own), and no two are equal, so that no two axes are taken for one.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


@dataclass(frozen=True)
class ExportVariant:
    """How a decoder is exported.

    `with_past`: `past_key_values.{i}.key/.value` in and `present.{i}.key/.value` out. `position_ids` and `attention_mask`: whether they are
    inputs; without them positions count from the past's length and every token is real (dynamo at opset 23 without `position_ids` gives a
    graph that onnxruntime runs for a batch of one only). `attention`: transformers' implementation, `sdpa`
    (`torch.nn.functional.scaled_dot_product_attention`) or `eager` (plain products).
    """

    exporter: Literal["dynamo", "torchscript"] = "dynamo"
    opset: int = 18
    with_past: bool = True
    position_ids: bool = True
    attention_mask: bool = True
    attention: Literal["sdpa", "eager"] = "sdpa"

    def __post_init__(self) -> None:
        if self.exporter not in OPSETS:
            raise OptionError(f"no exporter {self.exporter!r}", hint=f"one of {', '.join(OPSETS)}")
        if self.opset not in OPSETS[self.exporter]:
            raise OptionError(f"the {self.exporter} exporter is not used at opset {self.opset}", hint=f"one of {OPSETS[self.exporter]}")
        if self.attention not in ("sdpa", "eager"):
            raise OptionError(f"no attention implementation {self.attention!r}", hint="sdpa or eager")


@dataclass
class TorchDecoder:
    """A torch model ready for export. `model` is a transformers causal language model in evaluation mode; `write_side_files(folder)` writes
    the configuration and tokenizer files that belong to it. Several exports of one decoder share the load and, for dynamo, the capture.
    """

    model: Any
    write_side_files: Callable[[Path], None]
    _captured: dict[ExportVariant, Any] = field(default_factory=dict)

    def export(self, out_dir: str | os.PathLike[str], variant: ExportVariant | None = None) -> Path:
        """Writes the exported folder and returns the path of its `model.onnx`. An earlier export at `out_dir` is replaced."""
        torch, _ = _import_torch()
        variant = variant or ExportVariant()
        self.model.set_attn_implementation(variant.attention)
        interface = _Interface.of(self.model, variant)
        with StagedFolder(out_dir, lambda folder: (folder / GRAPH).is_file(), error=ModelError) as staged:
            with torch.no_grad(), warnings.catch_warnings():
                # TracerWarnings for every branch on a shape, deprecation notes, renamed axes: nothing the caller can act on.
                warnings.simplefilter("ignore")
                export = self._export_dynamo if variant.exporter == "dynamo" else self._export_torchscript
                try:
                    export(staged.folder, variant, interface)
                except RuntimeError as error:  # what both exporters and torch.export derive their errors from
                    message = f"the {variant.exporter} exporter of torch can't export this model: {str(error).splitlines()[0]}"
                    raise UnsupportedError(message, hint="try the other exporter, or another opset") from error
            self.write_side_files(staged.folder)
            return staged.commit() / GRAPH

    def _export_dynamo(self, folder: Path, variant: ExportVariant, interface: _Interface) -> None:
        torch, _ = _import_torch()
        # The capture knows no opset: variants that differ in it alone share one.
        key = ExportVariant(**{**variant.__dict__, "opset": 18})
        if key not in self._captured:
            dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in interface.axes)
            module = _flat_decoder(self.model, variant, interface)
            self._captured[key] = torch.export.export(module, interface.example, dynamic_shapes=(dynamic,), strict=False)
        program = torch.onnx.export(
            self._captured[key], dynamo=True, opset_version=variant.opset, input_names=interface.inputs, output_names=interface.outputs,
            dynamic_shapes=(interface.axes,), verbose=False,
        )
        program.save(str(folder / GRAPH), external_data=True)

    def _export_torchscript(self, folder: Path, variant: ExportVariant, interface: _Interface) -> None:
        import onnx_ir as ir

        torch, _ = _import_torch()
        # This exporter keeps weights in the file up to 2 GB and writes one file per tensor above: both end as one data file here.
        raw = folder / "torchscript"
        raw.mkdir()
        torch.onnx.export(
            _flat_decoder(self.model, variant, interface), interface.example, str(raw / GRAPH), dynamo=False, opset_version=variant.opset,
            input_names=interface.inputs, output_names=interface.outputs, dynamic_axes=dict(zip(interface.inputs, interface.axes)),
        )
        ir.save(ir.load(raw / GRAPH), folder / GRAPH, external_data=WEIGHTS)
        shutil.rmtree(raw)


def export_checkpoint(source: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, dtype: str = "float32", **variant: Any) -> Path:
    """Exports the checkpoint `source` (see `load_checkpoint`) with the ExportVariant of these fields. Returns the path of `model.onnx`."""
    chosen = ExportVariant(**variant)
    return load_checkpoint(source, dtype=dtype).export(out_dir, chosen)


def export_tiny(
    config: str | Config | Any, out_dir: str | os.PathLike[str], *, seed: int = 0, dtype: str = "float32", **variant: Any
) -> Path:
    """Exports a seeded small model (see `load_tiny`) with the ExportVariant of these fields. Returns the path of `model.onnx`."""
    chosen = ExportVariant(**variant)
    return load_tiny(config, seed=seed, dtype=dtype).export(out_dir, chosen)


def load_checkpoint(source: str | os.PathLike[str], *, dtype: str = "float32") -> TorchDecoder:
    """Loads a Hugging Face checkpoint folder, or a `.gguf` file (its weights dequantized), in `dtype` (`float32` or `float16`).

    Nothing is fetched and no code from the folder is run. Raises ModelError for a source that can't be read, UnsupportedError where torch
    is not installed.
    """
    torch, transformers = _import_torch()
    path = Path(source)
    if path.is_dir():
        folder, file = path, {}
    elif path.is_file() and path.suffix == ".gguf":
        folder, file = path.parent, {"gguf_file": path.name}
    else:
        raise ModelError(f"{path} is neither a checkpoint folder nor a .gguf file", hint="give the folder with config.json and weights")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, **file, dtype=_torch_dtype(torch, dtype), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} can't be loaded by transformers: {error}", hint="check that it is a causal language model") from error

    def write_side_files(out: Path) -> None:
        if not file:
            for name in TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, out / name)
            return
        model.generation_config.save_pretrained(out)
        config = model.config.to_dict()
        config.pop("quantization_config", None)  # how the source was stored; what is exported is plain `dtype`
        (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        transformers.AutoTokenizer.from_pretrained(folder, **file, local_files_only=True).save_pretrained(out)

    return TorchDecoder(model.eval(), write_side_files)


def load_tiny(config: str | Config | Any, *, seed: int = 0, dtype: str = "float32") -> TorchDecoder:
    """A small model with random weights: a name of `TINY`, a config dict like those (the weights are then those of `tiny_llama_onnx` with
    the same seed), or any transformers config object (weights from torch's generator, seeded; the global generator is left alone).
    """
    torch, transformers = _import_torch()
    kind = _torch_dtype(torch, dtype)
    if isinstance(config, str):
        config = tiny_config(config)
    if isinstance(config, dict):
        plain = config
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=torch.float32)
        state = {name: torch.from_numpy(array) for name, array in tiny_weights(config, seed).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, f"tiny weights don't fit: {missing}, {unexpected}"
        model.tie_weights()
    else:
        plain = config.to_dict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                # Fresh norms are all ones and biases all zeros: a graph that lost one would still agree.
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))

    def write_side_files(out: Path) -> None:
        write_config(out, plain)
        write_tiny_tokenizer(out)

    return TorchDecoder(model.to(kind).eval(), write_side_files)


@dataclass(frozen=True)
class _Interface:
    """Names, example tensors and dynamic axes of an exported decoder's inputs, and the names of its outputs."""

    inputs: list[str]
    outputs: list[str]
    example: tuple[Any, ...]
    axes: tuple[dict[int, str], ...]
    layers: int

    @staticmethod
    def of(model: Any, variant: ExportVariant) -> _Interface:
        torch, transformers = _import_torch()
        # The shapes of a past are read off one that the model has made: no config field says them for every family.
        with torch.no_grad():
            made = getattr(model(torch.zeros(_BATCH, _PAST, dtype=torch.int64), use_cache=True), _cache_name(model))
        if type(made) is not transformers.DynamicCache:
            message = f"the cache of this model is a {type(made).__name__}, not keys and values per layer"
            raise UnsupportedError(message, hint="export decoders with attention in every layer")
        kept = [layer for layer in made.layers if layer.keys is not None]  # a layer that reads another's keys and values has none of its own
        past = _PAST if variant.with_past else 0
        rows = {0: "batch", 1: "sequence"}
        ports: dict[str, tuple[Any, dict[int, str]]] = {"input_ids": (torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64), rows)}
        if variant.attention_mask:
            axes = {0: "batch", 1: "total_sequence" if past else "sequence"}
            ports["attention_mask"] = (torch.ones(_BATCH, past + _SEQUENCE, dtype=torch.int64), axes)
        if variant.position_ids:
            ports["position_ids"] = (torch.arange(past, past + _SEQUENCE).repeat(_BATCH, 1), rows)
        outputs = ["logits"]
        for i, layer in enumerate(kept if past else ()):
            for part, tensor in (("key", layer.keys), ("value", layer.values)):
                ports[f"past_key_values.{i}.{part}"] = (tensor.clone(), {0: "batch", 2: "past_sequence"})
                outputs.append(f"present.{i}.{part}")
        example, axes_of = zip(*ports.values())
        return _Interface(list(ports), outputs, example, axes_of, len(kept))


def _flat_decoder(model: Any, variant: ExportVariant, interface: _Interface) -> Any:
    """The model as a module from tensors to tensors: ONNX has no cache object, so the past goes in and comes out layer by layer.

    The mask goes to the model as its users hand it over. transformers builds the causal mask from it inside the graph, by plain indexing
    (vmap comes in only where a caller adds a masking function of its own), and both exporters follow that for any past and padding.
    """
    torch, transformers = _import_torch()
    module: Any = torch.nn.Module

    class FlatDecoder(module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            feeds = dict(zip(interface.inputs, tensors))
            past = [feeds.pop(name) for name in interface.inputs if name.startswith("past_key_values.")]
            if not variant.with_past:
                return (self.model(**feeds, use_cache=False).logits,)
            cache = transformers.DynamicCache(list(zip(past[::2], past[1::2])))
            logits = self.model(**feeds, **{_cache_name(model): cache}, use_cache=True).logits
            return (logits, *(tensor for layer in cache.layers[: interface.layers] for tensor in (layer.keys, layer.values)))

    return FlatDecoder().eval()


def _cache_name(model: Any) -> str:
    """What the model calls its cache, going in and coming out: transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _torch_dtype(torch: Any, dtype: str) -> Any:
    if dtype not in ("float32", "float16"):
        raise OptionError(f"no export in {dtype!r}", hint="float32 or float16 (onnxruntime runs no bfloat16 decoder on a CPU)")
    return getattr(torch, dtype)


def _import_torch() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnsupportedError(f"exporting needs torch and transformers ({error})", hint='pip install "octavo[export]"') from error
    return torch, transformers
