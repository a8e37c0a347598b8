"""Small seeded models in exporters' spelling, and a small tokenizer: what tests run on when the meaning matters and the size doesn't.

`TINY` holds configs with the keys of a Hugging Face `config.json`; `models/export.py` turns one into a torch model and exports it.
`tiny_llama_onnx` needs no torch: it builds the same architecture by hand at opset 23, in milliseconds.

Weights are drawn wide (a standard deviation near 1/√hidden) so that attention scores spread by about one: with the usual 0.02 every softmax
is nearly uniform, and a wrong rotary angle or scale would pass unseen. Norm weights and biases are random too: a dropped one must show.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from .artifact import GRAPH, WEIGHTS

if TYPE_CHECKING:
    import os

    import onnx_ir as ir

Config = dict[str, Any]

_LLAMA: Config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TINY: dict[str, Config] = {
    "llama": _LLAMA,
    "llama3": {**_LLAMA, "num_hidden_layers": 3, "tie_word_embeddings": False},
    "one_layer": {**_LLAMA, "num_hidden_layers": 1},
    "mha": {**_LLAMA, "num_key_value_heads": 4},
    # Biases on Q, K and V and none on the output projection.
    "qwen2": {**_LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
}


def tiny_config(name: str, **changes: Any) -> Config:
    """A copy of `TINY[name]` with `changes`. Raises OptionError for an unknown name or key."""
    if name not in TINY:
        raise OptionError(f"no tiny model {name!r}", hint=f"one of {', '.join(TINY)}")
    if unknown := changes.keys() - TINY[name].keys():
        raise OptionError(f"the tiny config {name!r} has no {', '.join(sorted(unknown))}", hint=f"its keys: {', '.join(TINY[name])}")
    return {**TINY[name], **changes}


# ---------------------------------------------------------------------------------------------------------------------------------
# A decoder built by hand
# ---------------------------------------------------------------------------------------------------------------------------------


def tiny_llama_onnx(path: str | os.PathLike[str], *, seed: int = 0, layers: int | None = None, config: Config | None = None) -> Path:
    """Writes a decoder of `config` (default `TINY["llama"]`, with `layers` layers) into the folder `path` and returns its `model.onnx`.

    Opset 23 with `RMSNormalization`, `RotaryEmbedding` and `Attention`, external data, the usual inputs and outputs: `input_ids [B, S]`,
    `attention_mask [B, past + S]`, `position_ids [B, S]`, `past_key_values.{i}.key/.value [B, G, past, D]`, `logits [B, S, V]`,
    `present.{i}.key/.value [B, G, past + S, D]`. `config.json`, `generation_config.json` and a tokenizer lie beside it.
    """
    import onnx_ir as ir

    config = dict(config or TINY["llama"])
    if layers is not None:
        config["num_hidden_layers"] = layers
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(build_llama(config, tiny_weights(config, seed)), folder / GRAPH, external_data=WEIGHTS)
    write_config(folder, config)
    write_tiny_tokenizer(folder)
    return folder / GRAPH


def tiny_weights(config: Config, seed: int) -> dict[str, NDArray[np.float32]]:
    """Random float32 parameters of a Llama or Qwen2 decoder under the names and in the layouts ([out, in]) of a Hugging Face checkpoint."""
    rng = np.random.default_rng(seed)
    K, M, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads = {"q": config["num_attention_heads"] * D, "k": config["num_key_value_heads"] * D, "v": config["num_key_value_heads"] * D}

    def linear(*shape: int) -> NDArray[np.float32]:
        return rng.normal(0.0, config["initializer_range"], shape).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return rng.uniform(0.7, 1.3, (K,)).astype(np.float32)

    weights = {"model.embed_tokens.weight": linear(config["vocab_size"], K), "model.norm.weight": norm()}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = linear(config["vocab_size"], K)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, size in heads.items():
            weights[f"{layer}.self_attn.{name}_proj.weight"] = linear(size, K)
            if config["model_type"] == "qwen2":
                weights[f"{layer}.self_attn.{name}_proj.bias"] = linear(size)
        weights[f"{layer}.self_attn.o_proj.weight"] = linear(K, heads["q"])
        weights[f"{layer}.mlp.gate_proj.weight"] = linear(M, K)
        weights[f"{layer}.mlp.up_proj.weight"] = linear(M, K)
        weights[f"{layer}.mlp.down_proj.weight"] = linear(K, M)
        weights[f"{layer}.input_layernorm.weight"] = norm()
        weights[f"{layer}.post_attention_layernorm.weight"] = norm()
    return weights


def build_llama(config: Config, weights: dict[str, NDArray[np.float32]]) -> ir.Model:
    """The decoder of `tiny_llama_onnx` as a model in memory, from checkpoint-named `weights`."""
    return _LlamaBuilder(config, weights).build()


@dataclass
class _LlamaBuilder:
    """Collects nodes and initializers. A value is named after what it holds, as exporters that keep scopes do."""

    config: Config
    weights: dict[str, NDArray[np.float32]]
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, ir.Value] = field(default_factory=dict)

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, outputs: int = 1, **attributes: Any) -> Any:
        """Appends a node and returns its output (a tuple of them if `outputs` > 1)."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}.{i}" if i else name
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, name: str, array: Any) -> ir.Value:
        """An initializer, made once per name."""
        import onnx_ir as ir

        if name not in self.initializers:
            self.initializers[name] = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
        return self.initializers[name]

    def ints(self, *values: int) -> ir.Value:
        return self.constant("int." + ".".join(map(str, values)), np.array(values, np.int64))

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        weight = np.ascontiguousarray(self.weights[f"{name}.weight"].T)  # [in, out], as MatMul wants it
        y = self.op("MatMul", x, self.constant(f"{name}.weight", weight), name=f"{name}/MatMul")
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else self.op("Add", y, self.constant(f"{name}.bias", bias), name=f"{name}/Add")

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        weight = self.constant(f"{name}.weight", self.weights[f"{name}.weight"])
        return self.op("RMSNormalization", x, weight, name=f"{name}/RMSNormalization", axis=-1, epsilon=self.config["rms_norm_eps"])

    def build(self) -> ir.Model:
        import onnx_ir as ir

        from .. import __version__

        c = self.config
        ids, mask, positions = (
            ir.val(name, ir.DataType.INT64, ["batch", size])
            for name, size in (("input_ids", "sequence"), ("attention_mask", "total_sequence"), ("position_ids", "sequence"))
        )
        pasts = [
            [ir.val(f"past_key_values.{i}.{part}", ir.DataType.FLOAT, ["batch", c["num_key_value_heads"], "past_sequence", c["head_dim"]])
             for part in ("key", "value")]
            for i in range(c["num_hidden_layers"])
        ]
        embedding = self.constant("model.embed_tokens.weight", self.weights["model.embed_tokens.weight"])
        x = self.op("Gather", embedding, ids, name="model.embed_tokens/Gather", axis=0)
        visible = self.visible(ids, mask)
        presents = []
        for i, past in enumerate(pasts):
            x, present = self.layer(i, x, positions, visible, past)
            presents += present
        x = self.norm(x, "model.norm")
        if c["tie_word_embeddings"]:
            logits = self.op("MatMul", x, self.op("Transpose", embedding, name="lm_head/Transpose", perm=[1, 0]), name="logits")
        else:
            logits = self.linear(x, "lm_head")
            logits.name = "logits"
        logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", c["vocab_size"]])
        for present in presents:
            present.type = ir.TensorType(ir.DataType.FLOAT)
            present.shape = ir.Shape(["batch", c["num_key_value_heads"], "total_sequence", c["head_dim"]])
        graph = ir.Graph(
            [ids, mask, positions, *(value for past in pasts for value in past)], [logits, *presents],
            nodes=self.nodes, initializers=list(self.initializers.values()), opset_imports={"": 23}, name="decoder",
        )
        return ir.Model(graph, ir_version=11, producer_name="octavo", producer_version=__version__)

    def visible(self, ids: ir.Value, mask: ir.Value) -> ir.Value:
        """bool [B, 1, S, past + S]: key j is at or before query i's place in the sequence, and not padding."""
        total = self.op("Squeeze", self.op("Shape", mask, name="mask/total", start=1, end=2), self.ints(0), name="mask/total/Squeeze")
        new = self.op("Squeeze", self.op("Shape", ids, name="mask/new", start=1, end=2), self.ints(0), name="mask/new/Squeeze")
        zero, one = self.constant("int.scalar.0", np.int64(0)), self.constant("int.scalar.1", np.int64(1))
        keys = self.op("Range", zero, total, one, name="mask/keys")
        queries = self.op("Range", self.op("Sub", total, new, name="mask/past"), total, one, name="mask/queries")
        queries = self.op("Unsqueeze", queries, self.ints(1), name="mask/queries/Unsqueeze")
        causal = self.op("LessOrEqual", keys, queries, name="mask/causal")
        real = self.op("Unsqueeze", self.op("Cast", mask, name="mask/real", to=9), self.ints(1, 2), name="mask/real/Unsqueeze")
        return self.op("And", causal, real, name="mask/visible")

    def layer(self, i: int, x: ir.Value, positions: ir.Value, visible: ir.Value, past: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        c, layer = self.config, f"model.layers.{i}"
        H, G, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        y = self.norm(x, f"{layer}.input_layernorm")
        q, k, v = (self.linear(y, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        q, k = (self.rotary(value, positions, heads, f"{layer}.self_attn/{part}") for value, heads, part in ((q, H, "q"), (k, G, "k")))
        attended, key, value = self.op(
            "Attention", q, k, v, visible, *past, name=f"{layer}.self_attn/Attention", outputs=3,
            q_num_heads=H, kv_num_heads=G, scale=D**-0.5,
        )
        key.name, value.name = f"present.{i}.key", f"present.{i}.value"
        x = self.op("Add", x, self.linear(attended, f"{layer}.self_attn.o_proj"), name=f"{layer}/residual.attention")
        y = self.norm(x, f"{layer}.post_attention_layernorm")
        gate = self.linear(y, f"{layer}.mlp.gate_proj")
        gate = self.op("Mul", gate, self.op("Sigmoid", gate, name=f"{layer}.mlp/Sigmoid"), name=f"{layer}.mlp/SiLU")
        y = self.op("Mul", gate, self.linear(y, f"{layer}.mlp.up_proj"), name=f"{layer}.mlp/Mul")
        return self.op("Add", x, self.linear(y, f"{layer}.mlp.down_proj"), name=f"{layer}/residual.mlp"), [key, value]

    def rotary(self, x: ir.Value, positions: ir.Value, heads: int, name: str) -> ir.Value:
        c = self.config
        D, theta = c["head_dim"], c["rope_parameters"]["rope_theta"]
        angles = np.arange(c["max_position_embeddings"])[:, None] * theta ** (-np.arange(0, D, 2) / D)  # [positions, D/2]
        cos, sin = (self.constant(f"rotary.{f.__name__}", f(angles).astype(np.float32)) for f in (np.cos, np.sin))
        return self.op("RotaryEmbedding", x, cos, sin, positions, name=f"{name}/RotaryEmbedding", num_heads=heads)


# ---------------------------------------------------------------------------------------------------------------------------------
# Files beside a model
# ---------------------------------------------------------------------------------------------------------------------------------

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1 (bos) and 2 (eos), as in SmolLM2

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Pairs in the order in which they merge ("Ġ" is a space in the byte-level alphabet): enough to give tokens of one to seven bytes.
_MERGES = (
    "t h", "th e", "Ġ the", "i n", "e r", "a n", "Ġ a", "o n", "r e", "Ġ s", "e n", "a t", "o r", "Ġ w", "e s", "i s", "in g", "Ġ o", "e d",
    "o u", "i t", "a s", "l l", "h e", "Ġ c", "an d", "Ġ and", "Ġ in", "Ġ t", "Ġt o", "u s", "s er", "us er", "Ã ©", "ð Ł",
)  # fmt: skip


def write_config(folder: Path, config: Config) -> None:
    """`config.json` and `generation_config.json` of `config`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_tiny_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """A byte-level BPE tokenizer with a chat template: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.

    Fewer than 320 tokens: three specials (`SPECIALS`), all 256 bytes, and the results of some merges, so that any text round-trips and a
    character of several bytes is split over several tokens. Returns the path of `tokenizer.json`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [(left, right) for left, right in (pair.split(" ") for pair in _MERGES)]
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "pad_token": SPECIALS[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder / "tokenizer.json"
