"""Four spellings of one tiny decoder: token-flat with PagedAttention, with past and present, without a cache, and as a plain `.onnx`.

The graphs are written by hand from the same weights, so that the runtime is tested without the compiler.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from octavo.custom_ops import library_path
from octavo.custom_ops.contract import CACHE_FORMATS, CACHE_LAYOUT
from octavo.errors import LibraryError
from octavo.models.artifact import GRAPH, WEIGHTS, ArtifactWriter, Manifest, SourceRecord
from octavo.models.external_data import source_sha256
from octavo.models.interface import GraphInterface, GraphPort
from octavo.models.spec import CacheGroup, CacheLayer, ModelSpec
from octavo.models.tiny import TINY, tiny_llama_onnx, tiny_weights
from octavo.runtime import RuntimeOptions, load
from onnx import TensorProto, helper, numpy_helper

CONFIG = TINY["llama"]
V, MAX_CONTEXT = CONFIG["vocab_size"], CONFIG["max_position_embeddings"]
KINDS = ("paged", "contiguous", "stateless", "baseline")


def paged_graph(cache: str = "fp32", window: int = -1) -> onnx.ModelProto:
    """The token-flat decoder, weights inside. With a window, the second layer is a group of its own."""
    c, weights = CONFIG, tiny_weights(CONFIG, 0)
    H, G, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    nodes, arrays = [], {}
    cache_format = CACHE_FORMATS[cache]  # type: ignore[index]
    cache_type = helper.np_dtype_to_tensor_dtype(np.dtype(cache_format.dtype))

    def constant(name: str, array: np.ndarray) -> str:
        arrays[name] = np.ascontiguousarray(array)
        return name

    def op(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def linear(x: str, name: str) -> str:
        return op("MatMul", [x, constant(f"{name}.weight", weights[f"{name}.weight"].T)], f"{name}.out")

    def norm(x: str, name: str) -> str:
        return op("RMSNormalization", [x, constant(name, weights[f"{name}.weight"])], f"{name}.out", axis=-1, epsilon=c["rms_norm_eps"])

    angles = np.arange(MAX_CONTEXT)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = constant("cos", np.cos(angles).astype(np.float32)), constant("sin", np.sin(angles).astype(np.float32))
    flat = constant("flat", np.array([0], np.int64))
    x = op("Gather", [constant("embed", weights["model.embed_tokens.weight"]), op("Squeeze", ["input_ids", flat], "ids")], "x")
    for i in range(c["num_hidden_layers"]):
        layer, group = f"model.layers.{i}", i if window > 0 else 0
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(y, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        inputs = [q, k, v, f"kv.{i}.key", f"kv.{i}.value", "cumulative_sequence_length", "past_seqlens", f"block_table.{group}", cos, sin,
                  f"slot_mapping.{group}", *[""] * 6, "parent"]
        y = op("PagedAttention", inputs, f"{layer}.attention", domain="ai.octavo", num_heads=H, kv_num_heads=G,
               local_window_size=window if i == 1 else -1)
        x = op("Add", [x, linear(y, f"{layer}.self_attn.o_proj")], f"{layer}.x1")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(y, f"{layer}.mlp.gate_proj")
        gate = op("Mul", [gate, op("Sigmoid", [gate], f"{layer}.sigmoid")], f"{layer}.silu")
        y = op("Mul", [gate, linear(y, f"{layer}.mlp.up_proj")], f"{layer}.gated")
        x = op("Add", [x, linear(y, f"{layer}.mlp.down_proj")], f"{layer}.x2")
    x = op("Gather", [norm(x, "model.norm"), "logit_rows"], "rows")
    op("MatMul", [x, constant("head", weights["model.embed_tokens.weight"].T)], "logits")
    groups = range(2 if window > 0 else 1)
    inputs = [
        helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in [
            ("input_ids", TensorProto.INT64, [1, "T"]), ("cumulative_sequence_length", TensorProto.INT32, ["B+1"]),
            ("past_seqlens", TensorProto.INT32, ["B"]), ("logit_rows", TensorProto.INT64, ["R"]), ("parent", TensorProto.INT32, ["T"]),
            *((f"block_table.{g}", TensorProto.INT32, ["B", "M"]) for g in groups),
            *((f"slot_mapping.{g}", TensorProto.INT32, ["T"]) for g in groups),
            *((f"kv.{i}.key", cache_type, ["N", G, cache_format.key_width(D), "P"]) for i in range(c["num_hidden_layers"])),
            *((f"kv.{i}.value", cache_type, ["N", G, "P", cache_format.value_width(D)]) for i in range(c["num_hidden_layers"])),
        ]
    ]
    graph = helper.make_graph(
        nodes, "paged", inputs, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["R", V])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("ai.octavo", 1)], ir_version=11)


def spec(cache: str = "fp32", window: int = -1) -> ModelSpec:
    layers = tuple(
        CacheLayer(i if window > 0 else 0, CONFIG["num_key_value_heads"], CONFIG["head_dim"], CONFIG["head_dim"], cache)
        for i in range(CONFIG["num_hidden_layers"])
    )
    return ModelSpec(V, MAX_CONTEXT, layers, (CacheGroup(None), CacheGroup(window)) if window > 0 else (CacheGroup(None),))


def write_artifact(
    folder: Path, kind: str, model: onnx.ModelProto | Path, *, interface: GraphInterface, source: Path, model_spec: ModelSpec,
) -> Path:
    """An artifact around a graph, with the source's tokenizer."""
    with ArtifactWriter(folder) as writer:
        if isinstance(model, Path):
            ir.save(ir.load(model), writer.folder / GRAPH, external_data=WEIGHTS)
        else:
            onnx.save(model, writer.folder / GRAPH)
        writer.copy_tokenizer(source.parent)
        writer.finish(Manifest(
            kind=kind, interface=interface, spec=model_spec, source=SourceRecord(source.name, source_sha256(source)), options={},
            decisions=(), files={}, cache_layout=CACHE_LAYOUT if kind == "paged" else None, octavo_version="test",
        ))
    return folder


def stateless_graph(source: Path) -> onnx.ModelProto:
    """The source with an empty past built in, and no present."""
    model = onnx.load(source)
    graph = model.graph
    pasts = [value for value in graph.input if value.name.startswith("past_")]
    for value in pasts:
        graph.input.remove(value)
        empty = np.zeros((1, CONFIG["num_key_value_heads"], 0, CONFIG["head_dim"]), np.float32)
        graph.initializer.append(numpy_helper.from_array(empty, value.name))
    for value in [value for value in graph.output if value.name != "logits"]:
        graph.output.remove(value)
    return model


@pytest.fixture(scope="session")
def op_library() -> Path:
    try:
        return library_path()
    except LibraryError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder with past and present, its tokenizer beside it."""
    return tiny_llama_onnx(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def paths(source: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One path per kind, and `paged_fp16`, `paged_int8`, `paged_hybrid` (two KV groups, the second with a window of 24)."""
    from octavo.models.roles import guess_interface

    root = tmp_path_factory.mktemp("artifacts")

    def interface(model: onnx.ModelProto) -> GraphInterface:
        def triple(value: onnx.ValueInfoProto) -> tuple:
            tensor = value.type.tensor_type
            return value.name, TensorProto.DataType.Name(tensor.elem_type), [d.dim_value or d.dim_param for d in tensor.shape.dim]
        return guess_interface(map(triple, model.graph.input), map(triple, model.graph.output))

    nothing = GraphInterface((), (GraphPort("logits", "float32", ("R", V), "logits"),))
    plain, bare = onnx.load(source), stateless_graph(source)
    paged = {
        name: write_artifact(root / name, "paged", paged_graph(cache, window), interface=nothing, source=source,
                             model_spec=spec(cache, window))
        for name, cache, window in (("paged", "fp32", -1), ("paged_fp16", "fp16", -1), ("paged_int8", "int8", -1), ("paged_hybrid", "fp32", 24))
    }
    return SimpleNamespace(
        **paged,
        contiguous=write_artifact(root / "contiguous", "contiguous", source, interface=interface(plain), source=source, model_spec=spec()),
        stateless=write_artifact(root / "stateless", "stateless", bare, interface=interface(bare), source=source, model_spec=spec()),
        baseline=source,
    )


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param in ("paged", "stateless"):
        request.getfixturevalue("op_library")
    return request.param


@pytest.fixture
def model(kind: str, paths: SimpleNamespace):
    """The tiny decoder in each kind; afterwards the engine's invariants are checked."""
    with load(getattr(paths, kind), options=RuntimeOptions(threads=1)) as model:
        yield model
        check_idle(model)


@pytest.fixture
def paged(op_library: Path, paths: SimpleNamespace):
    """The paged model with room for 24 blocks of 16 tokens."""
    with small_paged(paths, blocks=24) as model:
        yield model
        check_idle(model)


def small_paged(paths: SimpleNamespace, blocks: int, name: str = "paged", **options):
    """A paged model whose pool has exactly `blocks` blocks of 16 tokens."""
    from octavo.runtime.kv.budget import block_bytes

    folder = getattr(paths, name)
    cache, window = {"paged_fp16": "fp16", "paged_int8": "int8"}.get(name, "fp32"), (24 if name == "paged_hybrid" else -1)
    memory = (folder / GRAPH).stat().st_size + blocks * block_bytes(spec(cache, window), 16)
    return load(folder, options=RuntimeOptions(threads=1, block_size=16, memory=memory, **options))


def check_idle(model) -> None:
    """The invariants; and nothing is running."""
    with model.engine.turn:
        model.engine.collect_dropped()
        model.engine.check()
    stats = model.stats()
    assert stats["requests_running"] == stats["requests_waiting"] == 0
    if "blocks_total" in stats:
        assert stats["blocks_free"] + stats["blocks_cached"] + stats["blocks_used"] == stats["blocks_total"]
        assert stats["blocks_reserved"] == 0
        if stats["sequences"] == 0:
            assert stats["blocks_used"] == 0


@pytest.fixture
def tools() -> SimpleNamespace:
    return SimpleNamespace(check_idle=check_idle, small_paged=small_paged, V=V, MAX_CONTEXT=MAX_CONTEXT)
