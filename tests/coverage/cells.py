"""Which cells the matrix asks for: principal families are exported by every exporter, the others by the broad ones."""

from __future__ import annotations

from exporters import EXPORTERS
from families import FAMILIES

# What users have. Every one of them is something that the others are not: see `varies`.
PRINCIPAL = (
    "llama", "llama-mha", "llama-mqa", "llama-llama3", "mistral", "mistral-4096", "mistral-8192", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "phi", "phi3", "gpt2", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "opt", "bloom", "mpt", "falcon", "falcon-new", "falcon-alibi", "stablelm",
    "starcoder2", "olmo", "olmo2", "cohere", "cohere2", "granite", "smollm3", "exaone4", "glm", "mixtral", "qwen3_moe", "gpt_oss",
)

# One or two of each kind. The rest differ from one of them in the opset alone, or in what they do to a graph of it, and the principal families show that.
BROAD = (
    "dynamo18", "torchscript14", "torchscript17", "torchscript17-nocache", "optimizer-torchscript17", "optimum", "optimum-nocache",
    "optimizer-optimum", "genai-fp32", "genai-fp16", "genai-int4",
)

# The rows of the matrix, and the order in which it is filled.
ROWS = (*PRINCIPAL, *(name for name in FAMILIES if name not in PRINCIPAL))

assert set(PRINCIPAL) <= set(FAMILIES) and set(BROAD) <= set(EXPORTERS)


def asked(family: str, exporter: str) -> bool:
    """Whether the matrix has this cell. One that it hasn't is empty in the table."""
    return family in PRINCIPAL or exporter in BROAD
