"""Every exporter of the matrix: a name, the environment that it needs, and the function that writes its graph.

An export gets the torch model (and its checkpoint folder, for tools that start from one) and leaves `model.onnx` and the files beside it in
a folder. Nothing is repaired: what an exporter can't do is its exception, and the matrix shows it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from families import Family, token_ids

Environment = Literal["transformers5", "transformers4"]


@dataclass
class Subject:
    """A family being exported. `work` is the family's folder, kept between exporters: its checkpoint and other exports lie in it.
    `attention` and `experts` are the implementations that transformers chose: some families have plain products only.
    """

    family: Family
    model: Any
    work: Path
    tokenizer: Path
    decoder: Any = None
    attention: str = field(init=False)
    experts: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.attention = self.model.config._attn_implementation
        self.experts = getattr(self.model.config, "_experts_implementation", None)

    @property
    def checkpoint(self) -> Path:
        folder = self.work / "checkpoint"
        if not (folder / "config.json").is_file():
            import torch_model

            torch_model.save_checkpoint(self.model, folder, self.tokenizer)
        return folder


@dataclass(frozen=True)
class Exporter:
    """`exact`: the graph must give torch's logits. Otherwise it has lost accuracy on purpose, and is its own oracle at full accuracy.

    `expected` names the only refusal that is allowed ("" = what it writes must page). `stores_quantized`: weights, which are then kept to
    the bit and multiplied with float32 activations. `sideways`: what a token gives depends on which others are run with it, even in the
    graph itself, so that only runs of the same tokens can be compared.
    """

    name: str
    environment: Environment
    export: Callable[[Subject, Path], None]
    exact: bool = True
    expected: str = ""
    stores_quantized: bool = False
    sideways: bool = False


def _torch(subject: Subject, out: Path, **variant: Any) -> None:
    from octavo.models.export import ExportVariant, TorchDecoder

    if subject.decoder is None:
        subject.decoder = TorchDecoder(subject.model, partial(_side_files, subject))
    # The default is a grouped product that neither of torch's exporters knows.
    _set_experts(subject, "batched_mm")
    if variant.get("with_past", True) and not _has_cache(subject):
        raise NotImplementedError("the model has no cache of keys and values")
    usual = {"position_ids": _takes(subject, "position_ids"), "attention": subject.attention}
    subject.decoder.export(out, ExportVariant(**{**usual, **variant}))


def _set_experts(subject: Subject, implementation: str | None) -> None:
    if subject.model._can_set_experts_implementation():
        subject.model.set_experts_implementation(implementation)


def _takes(subject: Subject, name: str) -> bool:
    import inspect

    return name in inspect.signature(subject.model.forward).parameters


def _has_cache(subject: Subject) -> bool:
    # transformers 5.24 renamed it.
    return _takes(subject, "cache") or _takes(subject, "past_key_values")


def _side_files(subject: Subject, out: Path) -> None:
    for file in subject.checkpoint.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, out / file.name)


def _transformers5(subject: Subject, out: Path, *, part: str, fused: bool, static: bool = False, several: bool = False) -> None:
    import torch
    from transformers import GenerationConfig
    from transformers.exporters import OnnxConfig, OnnxExporter

    subject.model.set_attn_implementation(subject.attention)
    _set_experts(subject, subject.experts)
    ids = torch.from_numpy(token_ids(subject.family)[1][:7]).repeat(2, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = OnnxConfig(dynamic=True, ort_fusions="cpu" if fused else None)
    cache = {"cache_implementation": "static", "max_cache_len": subject.family.capacity} if static else {}
    if part == "forward":
        exported = OnnxExporter().export(subject.model, {**inputs, "use_cache": False}, config)
    else:
        exported = OnnxExporter().export_for_generation(
            subject.model, inputs, config, generation_config=GenerationConfig(pad_token_id=0, **cache), multi_token_decode=several
        )
    raw = out / "raw"
    exported.save_pretrained(raw)
    [graph] = [file for file in raw.glob("*.onnx") if part == "forward" or part in file.stem]
    _resave(graph, out / "model.onnx")
    shutil.rmtree(raw)
    _side_files(subject, out)


def _resave(graph: Path, out: Path) -> None:
    """One graph file and one data file, whatever names the exporter chose."""
    import onnx

    onnx.save(onnx.load(graph), out, save_as_external_data=True, location=out.name + ".data")


def _optimum(subject: Subject, out: Path, *, task: str) -> None:
    from optimum.exporters.onnx import main_export

    raw = out / "raw"
    main_export(str(subject.checkpoint), output=raw, task=task, do_validation=False, local_files_only=True)
    _resave(raw / "model.onnx", out / "model.onnx")
    shutil.rmtree(raw)
    _side_files(subject, out)


def _genai(subject: Subject, out: Path, *, precision: str, provider: str = "cpu") -> None:
    package = importlib.util.find_spec("onnxruntime_genai")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("onnxruntime-genai is not installed")
    # The builder is a script beside its modules. In this process, since importing it takes longer than building a tiny model.
    folder = str(Path(package.origin).parent / "models")
    if folder not in sys.path:
        sys.path.append(folder)
    from builder import create_model, parse_extra_options

    where = ("", str(subject.checkpoint), str(out), precision, provider, str(out / "cache"))
    try:
        create_model(*where, **parse_extra_options(*where, ["hf_token=false"]))
    except SystemExit as end:
        raise NotImplementedError(f"the builder ended with {end.code}") from end
    shutil.rmtree(out / "cache", ignore_errors=True)
    _side_files(subject, out)


# The fusions of onnxruntime.transformers are written per architecture; decoders without one of their own are given GPT-2's by its users.
_MODEL_TYPES = {"gpt_neox": "gpt_neox"}


def _optimizer(subject: Subject, out: Path, *, source: str) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    graph = _other(subject, source)
    config = subject.model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    kind = _MODEL_TYPES.get(config.model_type, "gpt2")
    optimized = optimize_model(str(graph), model_type=kind, num_heads=heads, hidden_size=hidden, opt_level=0, use_gpu=False)
    optimized.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)
    _side_files(subject, out)


def _half(subject: Subject, out: Path, *, source: str) -> None:
    """What most people do for an fp16 model: convert the fp32 one, keeping nothing."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(_other(subject, source))), out / "model.onnx")
    _side_files(subject, out)


def _dynamic_int8(subject: Subject, out: Path, *, source: str) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_other(subject, source), out / "model.onnx")
    _side_files(subject, out)


def _other(subject: Subject, source: str) -> Path:
    graph = subject.work / source / "model.onnx"
    if not graph.is_file():
        raise FileNotFoundError(f"there is no {source} export to start from")
    return graph


def _exporters() -> Iterable[Exporter]:
    def torch(name: str, **variant: Any) -> Exporter:
        return Exporter(name, "transformers5", partial(_torch, **variant))

    for opset in (18, 20, 23, 24):
        yield torch(f"dynamo{opset}", exporter="dynamo", opset=opset)
        yield torch(f"dynamo{opset}-nocache", exporter="dynamo", opset=opset, with_past=False)
    yield torch("dynamo18-eager", exporter="dynamo", opset=18, attention="eager")
    yield torch("dynamo18-bare", exporter="dynamo", opset=18, attention_mask=False, position_ids=False)
    for opset in (14, 17):
        yield torch(f"torchscript{opset}", exporter="torchscript", opset=opset)
        yield torch(f"torchscript{opset}-nocache", exporter="torchscript", opset=opset, with_past=False)
    yield torch("torchscript17-eager", exporter="torchscript", opset=17, attention="eager")
    yield Exporter("transformers5", "transformers5", partial(_transformers5, part="forward", fused=False))
    for fused in (False, True):
        name = "transformers5-cpu" if fused else "transformers5"
        yield Exporter(f"{name}-prefill", "transformers5", partial(_transformers5, part="prefill", fused=fused))
        yield Exporter(f"{name}-decode", "transformers5", partial(_transformers5, part="decode", fused=fused))
        yield Exporter(f"{name}-decode-many", "transformers5", partial(_transformers5, part="decode", fused=fused, several=True))
    yield Exporter("transformers5-static", "transformers5", partial(_transformers5, part="decode", fused=False, static=True),
                   expected="static shapes")
    yield Exporter("optimizer-torchscript17", "transformers5", partial(_optimizer, source="torchscript17"))
    yield Exporter("fp16-torchscript17", "transformers5", partial(_half, source="torchscript17"), exact=False)
    yield Exporter("int8-torchscript17", "transformers5", partial(_dynamic_int8, source="torchscript17"), exact=False,
                   expected="per-tensor dynamic quantization", sideways=True)
    yield Exporter("optimum", "transformers4", partial(_optimum, task="text-generation-with-past"))
    yield Exporter("optimum-nocache", "transformers4", partial(_optimum, task="text-generation"))
    yield Exporter("optimizer-optimum", "transformers4", partial(_optimizer, source="optimum"))
    yield Exporter("genai-fp32", "transformers5", partial(_genai, precision="fp32"))
    # The builder knows fp16 for GPUs; for a CPU it leaves out GroupQueryAttention and writes a mask that only runs without a past.
    yield Exporter("genai-fp16", "transformers5", partial(_genai, precision="fp16", provider="cuda"), exact=False)
    yield Exporter("genai-int4", "transformers5", partial(_genai, precision="int4"), exact=False, stores_quantized=True)


EXPORTERS: dict[str, Exporter] = {exporter.name: exporter for exporter in _exporters()}


@contextlib.contextmanager
def quiet() -> Any:
    """Exporters warn about every branch on a shape; nothing there is the reader's."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
