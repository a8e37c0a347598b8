"""How good a model is on text: perplexity, and how far its distributions lie from those of the graph that it came from.

The text is cut into windows of `context` tokens; each is read from nothing. Perplexity is over all tokens of a window but its first;
divergence and agreement are over every row. The other side is opened as `check` opens a source: fp32 weights, no fusions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, OptionError, RequestError
from ..models.runner import Runner
from .check import Load, dequantized
from .divergence import divergence, log_probabilities


@dataclass(frozen=True)
class Divergence:
    """Of each row, KL(reference ‖ model) in nats: mean and its standard error, median, 99th percentile, largest. `top1`: share of rows with
    the same most likely token. `perplexity` is the reference's own.
    """

    mean_kl: float
    mean_kl_error: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top1: float
    perplexity: float


@dataclass(frozen=True)
class EvalReport:
    """`perplexity` with its standard error (of the mean log-probability, carried over), over `predicted` tokens; `rows` of logits compared."""

    model: str
    text: str
    context: int
    rows: int
    predicted: int
    perplexity: float
    perplexity_error: float
    against: str | None = None
    divergence: Divergence | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        lines = [
            f"{self.model} on {self.text}: {self.rows:,} tokens in windows of {self.context}",
            f"  perplexity          {self.perplexity:.4f} ± {self.perplexity_error:.4f}",
        ]
        if (d := self.divergence) is not None:
            lines += [
                f"against {self.against}",
                f"  its perplexity      {d.perplexity:.4f}",
                f"  mean KL             {d.mean_kl:.3e} ± {d.mean_kl_error:.1e}",
                f"  median, 99 %, max   {d.median_kl:.3e}, {d.p99_kl:.3e}, {d.max_kl:.3e}",
                f"  same top-1 token    {d.top1:.2%}",
            ]
        return "\n".join(lines)


def evaluate(
    model: str | PathLike[str], text: str | PathLike[str], *, load: Load, against: str | PathLike[str] | None = None, context: int = 512,
    tokens: int | None = None, progress: Callable[[str], None] | None = None,
) -> EvalReport:
    """Evaluates `model` (an artifact or an `.onnx`) on the first `tokens` tokens (None: all) of the UTF-8 file `text`.

    Raises OptionError (context below 2, no UTF-8, too little text), RequestError (no tokenizer.json beside the model), ModelError (`against`
    has another vocabulary), and what `load` and `predict` raise (CapacityError for a context that the model doesn't have).
    """
    for name, value, least in (("context", context, 2), ("tokens", tokens, 2)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise OptionError(f"{name}={value!r} is not an int ≥ {least}")
    say = progress or (lambda _: None)
    windows = list(windows_of(token_ids(Path(model), Path(text))[:tokens], context))
    with ExitStack() as stack:
        say("loading the model")
        runner = stack.enter_context(closing(load(Path(model), True)))
        reference: Runner | None = None
        if against is not None:
            say("dequantizing the other side")
            path = Path(against)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="octavo-eval-"))
            path = path if path.is_dir() else dequantized(path, Path(scratch))
            reference = stack.enter_context(closing(load(path, False)))
        report = evaluate_runners(runner, reference, windows, say)
    return EvalReport(str(model), str(text), context, against=None if against is None else str(against), **report)


def token_ids(model: Path, text: Path) -> NDArray[np.int64]:
    """The text's ids by the tokenizer.json in the folder of the model."""
    from .text_ids import text_ids

    tokenizer = (model if model.is_dir() else model.parent) / "tokenizer.json"
    if not tokenizer.is_file():
        raise RequestError(f"there is no {tokenizer} to read the text with", hint="put the model's tokenizer.json there")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{text} is not UTF-8 text: {error}") from error
    return np.array(text_ids(tokenizer, content), dtype=np.int64)


def windows_of(ids: NDArray[np.int64], context: int) -> Iterator[NDArray[np.int64]]:
    """Windows of `context` ids, the last one shorter; one that has nothing to predict is left out."""
    if len(ids) < 2:
        raise OptionError(f"the text has {len(ids)} tokens: there is nothing to predict", hint="give a longer text")
    for first in range(0, len(ids), context):
        if len(window := ids[first : first + context]) > 1:
            yield window


def evaluate_runners(
    model: Runner, reference: Runner | None, windows: Sequence[NDArray[np.int64]], say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The figures of an EvalReport, for any two models that satisfy the protocol. ModelError where their logits differ in width."""
    ours: list[float] = []      # log-probabilities of the tokens that came
    theirs: list[float] = []
    kl: list[float] = []
    same = 0
    for number, ids in enumerate(windows):
        say(f"window {number + 1} of {len(windows)}")
        rows = model.predict(ids)
        others = None if reference is None else reference.predict(ids)
        if others is not None and others.shape != rows.shape:
            message = f"logits of {rows.shape[-1]} and of {others.shape[-1]} tokens can't be compared"
            raise ModelError(message, hint="give two models of one vocabulary")
        for at, row in enumerate(rows):
            log_q = log_probabilities(row)
            following = ids[at + 1] if at + 1 < len(ids) else None
            if following is not None:
                ours.append(float(log_q[following]))
            if others is None:
                continue
            log_p = log_probabilities(others[at])
            kl.append(divergence(log_q, log_p))
            same += int(row.argmax() == others[at].argmax())
            if following is not None:
                theirs.append(float(log_p[following]))
    perplexity = float(np.exp(-np.mean(ours)))
    figures: dict[str, Any] = {
        "rows": sum(map(len, windows)), "predicted": len(ours), "perplexity": perplexity, "perplexity_error": perplexity * _error(ours),
    }
    if reference is not None:
        median, p99 = np.quantile(kl, (0.5, 0.99))
        figures["divergence"] = Divergence(
            float(np.mean(kl)), _error(kl), float(median), float(p99), max(kl), same / len(kl), float(np.exp(-np.mean(theirs))),
        )
    return figures


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
