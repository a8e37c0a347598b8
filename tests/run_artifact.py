"""Runs an artifact where only what running needs is installed: ids out of `python run_artifact.py ART ID ID …`, as `make ort-oldest` compares them."""

from __future__ import annotations

import importlib.util
import sys

import octavo

COMPILER_ONLY = ("onnx", "onnx_ir", "onnxscript", "gguf", "typer", "torch")


def main() -> None:
    found = [name for name in COMPILER_ONLY if importlib.util.find_spec(name) is not None]
    assert not found or "--anywhere" in sys.argv, f"{found} are installed: this proves nothing"
    path, *ids = (word for word in sys.argv[1:] if not word.startswith("--"))
    params = octavo.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with octavo.load(path, options=octavo.RuntimeOptions(threads=2)) as model:
        results = model.generate([[int(word) for word in ids], [5, 6, 7]], params)
        assert not any(completion.error for result in results for completion in result.completions)
        print(model.kind, [result.completions[0].token_ids for result in results])


if __name__ == "__main__":
    main()
