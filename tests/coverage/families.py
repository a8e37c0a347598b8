"""Decoder families as tiny configs: what each one does differently, small enough to export in seconds.

Configs use the keys that transformers 4 and 5 both read (`rope_theta` and `rope_scaling`). Sizes are small, but what a family varies is
kept: grouped heads, norms on q and k, windows, partial or interleaved rotary, scales, biases, parallel blocks, learned positions, slopes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A decoder family. `lengths`: tokens of each sequence it is checked on; the last `decode` of them are also fed one at a time.

    `varies` says in a few words what it is here for. `expected` names the only refusal that is allowed ("" = it must page).
    """

    name: str
    config: Config
    varies: str
    lengths: tuple[int, ...] = (37, 18, 6)
    decode: int = 5
    expected: str = ""

    @property
    def head_size(self) -> int:
        config = self.config
        hidden = config.get("hidden_size") or config.get("n_embd") or config["d_model"]
        heads = config.get("num_attention_heads") or config.get("n_head") or config.get("num_heads") or config.get("n_heads")
        return config.get("head_dim") or hidden // (heads or config.get("attention_heads") or 1)

    @property
    def capacity(self) -> int:
        """Tokens that the model has positions for, or that are plenty for one without a bound."""
        config = self.config
        return config.get("max_position_embeddings") or config.get("n_positions") or config.get("max_seq_len") or 64


def _without(config: Config, name: str) -> Config:
    return {key: value for key, value in config.items() if key != name}


# GQA with two groups, and sizes of which no two are equal where they could be confused.
_BASE: Config = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
_HEAD: Config = {**_BASE, "head_dim": 16}
_MHA: Config = _without(_BASE, "num_key_value_heads")
# Two windowed layers, one full, one windowed: neither the first nor the last layer tells the others.
_MIXED: Config = {
    **_HEAD, "num_hidden_layers": 4, "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
_MOE: Config = {**_BASE, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LONG = (4103, 23)
_LONGER = (8199, 23)


def _rope(kind: str, factor: float = 4.0, **more: Any) -> Config:
    return {"rope_theta": 10000.0, "rope_scaling": {"rope_type": kind, "factor": factor, **more}}


def _families() -> Iterable[Family]:
    def family(name: str, model_type: str, base: Config, varies: str, *, lengths: tuple[int, ...] = (37, 18, 6), expected: str = "",
               **changes: Any) -> Family:
        return Family(name, {"model_type": model_type, **base, **changes}, varies, lengths, expected=expected)

    # Llama and what differs from it in one thing
    yield family("llama", "llama", _HEAD, "GQA, full rotary")
    yield family("llama-mha", "llama", _HEAD, "one head per KV head, tied head", num_key_value_heads=4, tie_word_embeddings=True)
    yield family("llama-mqa", "llama", _HEAD, "one KV head", num_key_value_heads=1)
    yield family("llama-1head", "llama", _HEAD, "a single head", num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    yield family("llama-bias", "llama", _HEAD, "biases on all projections", attention_bias=True, mlp_bias=True)
    yield family("llama-linear", "llama", _HEAD, "rotary scaled linearly", **_rope("linear"))
    yield family("llama-llama3", "llama", _HEAD, "rotary scaled as in Llama 3",
                 **_rope("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))
    yield family("llama-yarn", "llama", _HEAD, "YaRN", **_rope("yarn", original_max_position_embeddings=16))
    yield family("llama-dynamic", "llama", _HEAD, "dynamic NTK: rotary by the longest position, the same up to the context's end",
                 **_rope("dynamic"))
    yield family("mistral", "mistral", _HEAD, "window of 8", sliding_window=8)
    yield family("mistral-4096", "mistral", _HEAD, "window of 4096", sliding_window=4096, max_position_embeddings=4224, lengths=_LONG)
    yield family("mistral-nowindow", "mistral", _HEAD, "no window, wide heads", sliding_window=None, head_dim=32)
    yield family("qwen2", "qwen2", _BASE, "biases on q, k, v")
    yield family("qwen2-window", "qwen2", _BASE, "window on upper layers only", num_hidden_layers=3, use_sliding_window=True,
                 sliding_window=8, max_window_layers=1)
    yield family("qwen3", "qwen3", _HEAD, "norms on q and k", num_attention_heads=4)
    yield family("gemma", "gemma", _HEAD, "scaled embeddings, MQA, 1 + weight norms", num_key_value_heads=1)
    yield family("gemma2", "gemma2", _MIXED, "softcap, own scale, norms around, window of 8", query_pre_attn_scalar=24,
                 attn_logit_softcapping=5.0, final_logit_softcapping=8.0)
    yield family("gemma2-4096", "gemma2", {**_HEAD, "num_attention_heads": 2, "num_key_value_heads": 1}, "softcap and a window of 4096",
                 query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=8.0, sliding_window=4096,
                 max_position_embeddings=4224, layer_types=["sliding_attention", "full_attention"], lengths=_LONG)
    yield family("gemma3", "gemma3_text", _MIXED, "two rotary bases, window of 8, norms on q and k", query_pre_attn_scalar=24,
                 rope_theta=1000000.0, rope_local_base_freq=10000.0)
    yield family("phi", "phi", _BASE, "parallel block, partial rotary, biases", partial_rotary_factor=0.5, num_key_value_heads=4, hidden_size=128)
    yield family("phi3", "phi3", _BASE, "fused qkv and gate/up, window of 8", sliding_window=8, original_max_position_embeddings=64)
    yield family("phi3-longrope", "phi3", _BASE, "longrope: two tables, chosen by length", expected="rotary that depends on data",
                 lengths=(37, 30, 25), original_max_position_embeddings=16,
                 rope_scaling={"type": "longrope", "short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2 + i for i in range(8)]})
    # Learned positions, slopes, and blocks from before Llama
    yield family("gpt2", "gpt2", {}, "learned positions, fused qkv as Conv1D", vocab_size=320, n_embd=64, n_layer=2, n_head=4,
                 n_positions=64, bos_token_id=1, eos_token_id=2)
    yield family("gpt2-layerscale", "gpt2", {}, "scale by layer index", vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=64,
                 scale_attn_by_inverse_layer_idx=True, bos_token_id=1, eos_token_id=2)
    yield family("gpt_neo", "gpt_neo", {}, "no scale, local and global layers", vocab_size=320, hidden_size=64, num_layers=2, num_heads=4,
                 window_size=8, attention_types=[[["local", "global"], 1]], max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    yield family("gpt_neox", "gpt_neox", _MHA, "parallel block, partial rotary, interleaved fused qkv", rotary_pct=0.25)
    yield family("gptj", "gptj", {}, "interleaved partial rotary, parallel block", vocab_size=320, n_embd=64, n_layer=2, n_head=4,
                 n_positions=64, rotary_dim=8, bos_token_id=1, eos_token_id=2)
    yield family("codegen", "codegen", {}, "fused qkv in four parts", vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                 n_ctx=64, rotary_dim=8, bos_token_id=1, eos_token_id=2)
    yield family("opt", "opt", {}, "learned positions with an offset of 2", vocab_size=320, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    yield family("opt-postnorm", "opt", {}, "norm after the block, projected embeddings", vocab_size=320, hidden_size=64, ffn_dim=96,
                 num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False,
                 bos_token_id=1, eos_token_id=2, pad_token_id=0)
    yield family("bloom", "bloom", {}, "ALiBi", vocab_size=320, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
                 pad_token_id=0)
    yield family("bloom-6heads", "bloom", {}, "ALiBi, a head count that is no power of two", vocab_size=320, hidden_size=96, n_layer=2,
                 n_head=6, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    yield family("mpt", "mpt", {}, "ALiBi out of a constant table, no biases", vocab_size=320, d_model=64, n_heads=4, n_layers=2,
                 expansion_ratio=2, max_seq_len=64)
    yield family("falcon", "falcon", {}, "MQA, parallel block, rotary", vocab_size=320, hidden_size=64, num_hidden_layers=2,
                 num_attention_heads=4, multi_query=True, parallel_attn=True, bias=False, max_position_embeddings=64, bos_token_id=1,
                 eos_token_id=2)
    yield family("falcon-new", "falcon", {}, "new decoder: GQA, two norms", vocab_size=320, hidden_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, bias=False, max_position_embeddings=64,
                 bos_token_id=1, eos_token_id=2)
    yield family("falcon-alibi", "falcon", {}, "MHA, sequential block, ALiBi", vocab_size=320, hidden_size=64, num_hidden_layers=2,
                 num_attention_heads=4, multi_query=False, parallel_attn=False, alibi=True, bias=True, bos_token_id=1, eos_token_id=2)
    yield family("stablelm", "stablelm", _BASE, "partial rotary, layer norm", partial_rotary_factor=0.25)
    yield family("stablelm-2", "stablelm", _BASE, "parallel residual, norms per head on q and k", partial_rotary_factor=0.25,
                 use_qkv_bias=True, qk_layernorm=True, use_parallel_residual=True)
    yield family("starcoder2", "starcoder2", _BASE, "biases, window of 8", sliding_window=8)
    yield family("starcoder2-4096", "starcoder2", _BASE, "biases, window of 4096", sliding_window=4096, max_position_embeddings=4224,
                 lengths=_LONG)
    yield family("gpt_bigcode", "gpt_bigcode", {}, "MQA, learned positions", vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                 multi_query=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    yield family("gpt_bigcode-mha", "gpt_bigcode", {}, "MHA, learned positions", vocab_size=320, n_embd=64, n_layer=2, n_head=4,
                 n_positions=64, multi_query=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    yield family("persimmon", "persimmon", _MHA, "norms per head, partial rotary, fused qkv", partial_rotary_factor=0.5, qk_layernorm=True)
    yield family("xglm", "xglm", {}, "sinusoidal positions", vocab_size=320, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4,
                 max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    yield family("biogpt", "biogpt", _MHA, "learned positions from the mask, scaled embeddings")
    yield family("openai-gpt", "openai-gpt", {}, "no cache, norm after the block", vocab_size=320, n_embd=64, n_layer=2, n_head=4,
                 n_positions=64)
    yield family("gpt_neox_japanese", "gpt_neox_japanese", _without(_MHA, "intermediate_size"), "bias on the last layer's projection alone",
                 intermediate_multiple_size=2)
    # Newer decoders
    yield family("olmo", "olmo", _BASE, "norms without weights, clipped qkv", clip_qkv=1.5)
    yield family("olmo2", "olmo2", _BASE, "norm after the sublayer, norms on whole q and k")
    yield family("olmo3", "olmo3", _without(_MIXED, "head_dim"), "window of 8 on three layers of four")
    yield family("cohere", "cohere", _BASE, "interleaved rotary, parallel block, norms on q and k", use_qk_norm=True, logit_scale=0.25)
    yield family("cohere2", "cohere2", _MIXED, "rotary in windowed layers only", logit_scale=0.25)
    yield family("cohere2-4096", "cohere2", {**_HEAD, "num_attention_heads": 2, "num_key_value_heads": 1},
                 "window of 4096, full layer without rotary", sliding_window=4096, layer_types=["sliding_attention", "full_attention"],
                 logit_scale=0.25, max_position_embeddings=4224, lengths=_LONG)
    yield family("granite", "granite", _BASE, "four multipliers, own scale", attention_multiplier=0.2, embedding_multiplier=3.0,
                 residual_multiplier=0.5, logits_scaling=2.0)
    yield family("smollm3", "smollm3", _BASE, "layers without rotary", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0],
                 layer_types=["full_attention"] * 4, use_sliding_window=False)
    yield family("exaone4", "exaone4", {**_MIXED, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
                 "window of 8, full layer without rotary, norms on q and k", sliding_window_pattern=4)
    yield family("ernie4_5", "ernie4_5", _HEAD, "interleaved rotary", use_bias=True)
    yield family("glm", "glm", _HEAD, "interleaved partial rotary, fused gate", partial_rotary_factor=0.5, attention_bias=True)
    yield family("glm4", "glm4", _HEAD, "interleaved partial rotary, norms around", partial_rotary_factor=0.5, attention_bias=True)
    yield family("helium", "helium", _HEAD, "interleaved rotary")
    yield family("nemotron", "nemotron", _HEAD, "partial rotary, 1 + weight layer norm, squared ReLU", partial_rotary_factor=0.5, head_dim=32)
    yield family("arcee", "arcee", _HEAD, "squared ReLU, YaRN", **_rope("yarn", original_max_position_embeddings=16))
    yield family("seed_oss", "seed_oss", _HEAD, "head size apart from hidden size, biases", head_dim=32, attention_bias=True)
    yield family("hunyuan", "hunyuan_v1_dense", _HEAD, "norms on q and k after rotary")
    yield family("apertus", "apertus", _HEAD, "xIELU, norms on q and k",
                 **_rope("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))
    yield family("bitnet", "bitnet", _HEAD, "norm before the output projection")
    yield family("ministral", "ministral", _MIXED, "window of 8 on some layers")
    yield family("nanochat", "nanochat", _HEAD, "norms without weights on q and k, softcapped logits", num_key_value_heads=2)
    yield family("vaultgemma", "vaultgemma", _MIXED, "softcap, window of 8", query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                 final_logit_softcapping=8.0)
    yield family("jais2", "jais2", _HEAD, "layer norm, squared ReLU")
    yield family("cwm", "cwm", _MIXED, "window of 8 on some layers, llama3 rotary")
    yield family("internlm3", "internlm3", _HEAD, "biases that can be left out")
    yield family("modernbert-decoder", "modernbert-decoder", {**_MHA, "num_hidden_layers": 4}, "two rotary bases, fused qkv, window of 8",
                 local_attention=16, global_attn_every_n_layers=2, global_rope_theta=160000.0, local_rope_theta=10000.0, cls_token_id=1,
                 sep_token_id=2)
    yield family("mistral-8192", "mistral", {**_HEAD, "num_attention_heads": 2, "num_key_value_heads": 1}, "window of 8192",
                 sliding_window=8192, max_position_embeddings=8320, lengths=_LONGER)
    # Experts
    yield family("mixtral", "mixtral", _BASE, "experts", num_local_experts=4, num_experts_per_tok=2)
    yield family("qwen2_moe", "qwen2_moe", _MOE, "experts and a shared one", num_experts=4, shared_expert_intermediate_size=48)
    yield family("qwen3_moe", "qwen3_moe", {**_MOE, "head_dim": 16}, "experts, norms on q and k", num_experts=4, norm_topk_prob=True)
    yield family("gpt_oss", "gpt_oss", {**_HEAD, "num_attention_heads": 4}, "sinks, window of 8, experts, biases", num_local_experts=4,
                 num_experts_per_tok=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
                 **_rope("yarn", original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, truncate=False))
    yield family("olmoe", "olmoe", _BASE, "experts, norms on whole q and k", num_experts=4, num_experts_per_tok=2)
    yield family("granitemoe", "granitemoe", _BASE, "experts, multipliers", num_local_experts=4, num_experts_per_tok=2,
                 attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0)
    yield family("phimoe", "phimoe", _BASE, "experts, layer norm, biases", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    yield family("ernie4_5_moe", "ernie4_5_moe", _BASE, "experts and shared ones", moe_num_experts=4, moe_k=2, moe_intermediate_size=48,
                 moe_num_shared_experts=1, moe_layer_start_index=1)
    yield family("dots1", "dots1", {**_MOE, "head_dim": 16}, "experts in groups, norms on q and k", n_routed_experts=4, n_group=1,
                 topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
    yield family("glm4_moe", "glm4_moe", {**_MOE, "head_dim": 16}, "experts, partial rotary, norms on q and k", n_routed_experts=4,
                 n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, partial_rotary_factor=0.5, use_qk_norm=True)
    # What looks like attention, and what isn't
    yield family("deepseek_v3", "deepseek_v3", _MOE, "latent attention", expected="MLA", num_key_value_heads=4, n_routed_experts=4,
                 n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8,
                 qk_nope_head_dim=16, v_head_dim=16)
    yield family("minicpm3", "minicpm3", _BASE, "latent attention, dense", expected="MLA", num_key_value_heads=4, kv_lora_rank=16,
                 q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
    yield family("diffllama", "diffllama", _HEAD, "a difference of two softmaxes")
    yield family("doge", "doge", _BASE, "a mask made of the values", keep_window_size=64)
    yield family("lfm2", "lfm2", _BASE, "short convolutions between attention layers", expected="recurrent or convolutional state",
                 layer_types=["conv", "full_attention"], conv_L_cache=3)
    yield family("mamba", "mamba", {}, "state space", expected="recurrent or convolutional state", vocab_size=320, hidden_size=32,
                 num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    yield family("minimax", "minimax", _HEAD, "linear attention", expected="recurrent or convolutional state",
                 layer_types=["linear_attention", "full_attention"], num_local_experts=4, block_size=8)
    yield family("recurrent_gemma", "recurrent_gemma", _without(_HEAD, "max_position_embeddings"), "gated recurrence",
                 expected="recurrent or convolutional state", num_hidden_layers=3, lru_width=64, attention_window_size=8,
                 num_key_value_heads=1)


FAMILIES: dict[str, Family] = {family.name: family for family in _families()}


def token_ids(family: Family) -> list[np.ndarray]:
    """The sequences that a family is checked on, int64 [S] each. Ids below 3 are special in some families: none is used."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, family.config["vocab_size"], length, dtype=np.int64) for length in family.lengths]
