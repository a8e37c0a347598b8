"""How far quantized models lie from the fp32 graph on one text: llama.cpp's GGUF and any artifacts, by the figures of `octavo eval`.

    python tests/perf/peers/quality.py --text book.txt --against plain/model.onnx --octavo art/ [--tokens 4000] [--context 500] [--llama MODEL.gguf]

All read the same windows of the same token ids. The reference is read once and kept in a temporary file, so that one model is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import octavo
from octavo.compiler.check import dequantized
from octavo.compiler.evaluate import EvalReport, evaluate_runners, token_ids, windows_of

HERE = Path(__file__).parent
HOME = Path(os.environ.get("PEERS_HOME", Path.home() / ".cache" / "octavo-peers"))


class LlamaCpp:
    """A model in llama.cpp's own environment, as far as an evaluation drives one."""

    def __init__(self, model: Path) -> None:
        command = [HOME / "llama_cpp/bin/python", HERE / "peer_llama_cpp_logits.py", model]
        self._process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def predict(self, ids: np.ndarray) -> np.ndarray:
        wire = self._process
        wire.stdin.write(json.dumps(ids.tolist()).encode() + b"\n")
        wire.stdin.flush()
        size = int(np.frombuffer(wire.stdout.read(8), np.uint64)[0])
        return np.frombuffer(wire.stdout.read(size), np.float32).reshape(len(ids), -1)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Kept:
    """What the reference said to each window, in a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def predict(self, ids: np.ndarray) -> np.ndarray:
        return np.load(self._folder / f"{hash(ids.tobytes())}.npy", mmap_mode="r")

    def keep(self, model: Any, windows: list[np.ndarray]) -> None:
        for ids in windows:
            np.save(self._folder / f"{hash(ids.tobytes())}.npy", model.predict(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--against", required=True, type=Path, metavar="ONNX")
    parser.add_argument("--octavo", action="append", default=[], metavar="[NAME=]ART")
    parser.add_argument("--llama", type=Path, default=HOME / "models/q4_0.gguf", metavar="MODEL.gguf")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--context", type=int, default=500)
    args = parser.parse_args()
    windows = list(windows_of(token_ids(args.against, args.text)[: args.tokens], args.context))
    sides: dict[str, Callable[[], Any]] = {"llama.cpp": lambda: LlamaCpp(args.llama)}
    for given in args.octavo:
        name, _, art = given.rpartition("=")
        sides[name or art] = lambda art=art: octavo.load(art)  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as scratch:
        reference = Kept(Path(scratch))
        with closing(octavo.load(dequantized(args.against, Path(scratch)), options=octavo.RuntimeOptions(optimize_graph=False))) as model:
            reference.keep(model, windows)
        for name, opened in sides.items():
            with closing(opened()) as model:
                figures = evaluate_runners(model, reference, windows)
            print(EvalReport(name, str(args.text), args.context, against=str(args.against), **figures).to_text(), flush=True)


if __name__ == "__main__":
    main()
