"""Makes smollm2_greedy.json and smollm2_logits.npz: what SmolLM2-135M-Instruct (Q4_1, dequantized to float32) says, according to transformers.

    python tests/data/make_smollm2_greedy.py SmolLM2-135M-Instruct.Q4_1.gguf

smollm2_greedy.json   per prompt: its token ids, 64 greedy token ids (end of sequence ignored), and per step the margin between the largest
                      and the second largest logit. Every margin is above `MARGIN`: rounding moved no logit by more than 1.8e-3
                      (exports in onnxruntime against torch, on random tokens).
smollm2_logits.npz    per prompt, of the logits after its last token: the 64 largest (`values` [8, 64] float32), where they are (`indices`
                      [8, 64] int32), and log Σ exp over the whole vocabulary (`log_sum_exp` [8] float64).

Made with torch 2.13.0 and transformers 5.23.0 on one prompt at a time; the versions of the last run are written into the json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

STEPS = 64
MARGIN = 1e-2
HERE = Path(__file__).parent

LIGHTHOUSE = (
    "The lighthouse at Cape Morrow was built in 1871, after three ships had been lost on the same reef within one winter. Its tower is made of "
    "grey granite, which was cut in a quarry forty miles inland and brought down the river on flat barges. The first keeper, a retired whaler "
    "named Josiah Penn, lived there with his wife and four daughters, and it was the youngest of them, Ada, who kept the written log after his "
    "eyesight failed. She noted the weather, the passing sails, the oil that was burned, and now and then a sentence about the birds that "
    "struck the glass in foggy nights. In 1912 the oil lamp was replaced by an electric one, and the log became shorter. The last keeper left "
    "in 1964, when the light was made automatic. Today the house is a small museum, and the log lies open in a case on the ground floor, at a "
    "page from the storm of 1889."
)

# (name, is it a chat message?, text)
PROMPTS = [
    ("chat short", True, "What is the capital of France?"),
    ("chat list", True, "Name five things that a good kitchen knife should have."),
    ("chat code", True, "Write a Python function that returns the n-th Fibonacci number."),
    ("chat long", True, f"{LIGHTHOUSE}\n\nWho kept the written log, and why?"),
    ("raw short", False, "Once upon a time, there was a"),
    ("raw code", False, "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot ="),
    ("raw French", False, "La tour Eiffel a été construite en 1889 à Paris. Elle est"),
    ("raw long", False, LIGHTHOUSE + " The museum is open"),
]


def main(path: Path) -> None:
    torch.set_num_threads(2)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    prompts, first = [], []
    for name, chat, text in PROMPTS:
        shown = text
        if chat:
            shown = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(shown, add_special_tokens=False).input_ids
        tokens, margins, logits = greedy(model, ids)
        first.append(logits)
        prompts.append({"name": name, "chat": chat, "text": text, "min_margin": min(margins), "prompt_token_ids": ids,
                        "greedy_token_ids": tokens, "margins": margins})
        print(f"{name}: {len(ids)} tokens, smallest margin {min(margins):.4f}: {tokenizer.decode(tokens)!r}")
    near = [prompt["name"] for prompt in prompts if prompt["min_margin"] <= MARGIN]
    assert not near, f"near-ties in {near}: choose other prompts"
    record = {
        "model": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"},
        "prompts": prompts,
    }
    text = json.dumps(record, ensure_ascii=False, indent=1)
    (HERE / "smollm2_greedy.json").write_text(one_line_lists(text) + "\n")
    values, indices = torch.stack(first).topk(64)
    total = torch.stack(first).double().logsumexp(-1)
    np.savez_compressed(HERE / "smollm2_logits.npz", values=values.numpy(), indices=indices.numpy().astype(np.int32), log_sum_exp=total.numpy())


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int]) -> tuple[list[int], list[float], torch.Tensor]:
    """`STEPS` token ids, the margin at each, and the logits [V] after the prompt."""
    out = model(torch.tensor([ids]), use_cache=True)
    first = out.logits[0, -1]
    tokens, margins = [], []
    for _ in range(STEPS):
        top = out.logits[0, -1].topk(2)
        tokens.append(int(top.indices[0]))
        margins.append(round(float(top.values[0] - top.values[1]), 5))
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens, margins, first


def one_line_lists(text: str) -> str:
    """Puts lists of numbers on one line each, so that a change shows as one line."""
    lines: list[str] = []
    for line in text.split("\n"):
        if lines and lines[-1].endswith(("[", ",")) and line.strip().rstrip(",").lstrip("-").replace(".", "").replace("e-", "").isdigit():
            lines[-1] += ("" if lines[-1].endswith("[") else " ") + line.strip()
        elif lines and line.strip().startswith("]") and lines[-1][-1].isdigit():
            lines[-1] += line.strip()
        else:
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
