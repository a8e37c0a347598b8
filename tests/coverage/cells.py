"""Which cells the matrix asks for: principal families by every main exporter and by some that take long or differ little from a main one,
the other families by the broad exporters.
"""

from __future__ import annotations

from exporters import EXPORTERS
from families import FAMILIES

# What users have. Every one of them is something that the others are not: see `varies`.
PRINCIPAL = (
    "llama", "mistral", "mistral-4096", "mistral-8192", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "gptj",
    "opt", "bloom", "mpt", "falcon", "falcon-new", "falcon-alibi", "stablelm", "starcoder2", "olmo2", "cohere", "cohere2", "granite", "smollm3",
    "exaone4", "glm", "mixtral", "qwen3_moe", "gpt_oss",
)

# Exporters that take a minute a cell, or differ little from another: they are asked for these principal families.
CHOSEN = {
    **dict.fromkeys(
        ("transformers5-cpu-prefill", "transformers5-cpu-decode-many"),
        tuple(name for name in PRINCIPAL if name not in ("mistral-4096", "mistral-8192", "exaone4")),
    ),
    **dict.fromkeys(("transformers5", "transformers5-decode-many", "transformers5-static"), ("llama", "mistral")),
}

# One of each kind.
BROAD = ("dynamo18", "torchscript17", "torchscript17-nocache", "optimizer-torchscript17", "optimum", "genai-fp32")

# The rows of the matrix, and the order in which it is filled.
ROWS = (*PRINCIPAL, *(name for name in FAMILIES if name not in PRINCIPAL))

assert set(PRINCIPAL) <= set(FAMILIES) and {*CHOSEN, *BROAD} <= set(EXPORTERS)


def asked(family: str, exporter: str) -> bool:
    """Whether the matrix has this cell. One that it hasn't is empty in the table."""
    if exporter in CHOSEN:
        return family in CHOSEN[exporter]
    return family in PRINCIPAL or exporter in BROAD
