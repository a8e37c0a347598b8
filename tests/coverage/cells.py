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

# The export of transformers 5 takes a minute a cell: families that between them have all that its graphs vary in.
_TRANSFORMERS5 = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "olmo2", "mixtral",
)
# Opsets between and after the main ones, one token at a time.
_NEIGHBOURS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")

# Exporters that are not asked for all principal families, and those that they are asked for.
CHOSEN = {
    **dict.fromkeys(("transformers5-cpu-prefill", "transformers5-cpu-decode-many"), _TRANSFORMERS5),
    **dict.fromkeys(("dynamo20", "dynamo24", "transformers5-decode"), _NEIGHBOURS),
    **dict.fromkeys(
        ("dynamo20-nocache", "dynamo24-nocache", "dynamo18-eager", "dynamo18-bare", "transformers5", "transformers5-prefill",
         "transformers5-decode-many", "transformers5-cpu-decode", "transformers5-static"),
        (),
    ),
}

# One of each kind.
BROAD = ("torchscript17", "torchscript17-nocache", "optimizer-torchscript17", "optimum", "genai-fp32")

# The rows of the matrix, and the order in which it is filled.
ROWS = (*PRINCIPAL, *(name for name in FAMILIES if name not in PRINCIPAL))

assert set(PRINCIPAL) <= set(FAMILIES) and {*CHOSEN, *BROAD} <= set(EXPORTERS) and {name for names in CHOSEN.values() for name in names} <= set(PRINCIPAL)


def asked(family: str, exporter: str) -> bool:
    """Whether the matrix has this cell. One that it hasn't is empty in the table."""
    if exporter in CHOSEN:
        return family in CHOSEN[exporter]
    return family in PRINCIPAL or exporter in BROAD
