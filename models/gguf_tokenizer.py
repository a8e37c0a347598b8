"""The tokenizer in a GGUF file's metadata as a `tokenizers` Tokenizer. What the file names and we can't state with certainty is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..errors import ModelError
from .gguf_file import GgufFile

# tokenizer.ggml.token_type, as llama.cpp numbers them
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_UNSUPPORTED = "import another GGUF file of the model, or export the model to ONNX with its own tokenizer.json beside it"
_CORRUPT = "the file is inconsistent: download or convert it again"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Pre:
    """How a byte-level vocabulary cuts text before merging. `split` None: GPT-2's own pattern."""

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words_first: bool = False  # a piece that is a token as a whole is not merged
    adds_bos: bool = False


_LLAMA3 = _Pre(split=_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST, whole_words_first=True, adds_bos=True)
_PRES = {
    "gpt-2": _Pre(),
    "smollm": _Pre(single_digits=True),
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _Pre(split=_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST, nfc=True),
}


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of `file`: byte-level BPE (model "gpt2") or SentencePiece BPE with byte fallback (model "llama").

    Control tokens are special, user-defined ones plain added tokens; encoding adds BOS and EOS as the file says. Raises ModelError for
    another model or pre-tokenizer, by name, and for lists that don't fit each other.
    """
    tokens = _strings(file, "tokenizer.ggml.tokens")
    kind = file.get("tokenizer.ggml.model", str)
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{file.path}: the vocabulary has a token twice", hint=_CORRUPT)
    if kind == "gpt2":
        name = file.get("tokenizer.ggml.pre", str, "default")
        if name not in _PRES:
            message = f"{file.path} names the pre-tokenizer {name!r}; {', '.join(_PRES)} are supported"
            raise ModelError(message, hint=_UNSUPPORTED)
        tokenizer, adds_bos = _byte_level(file, tokens, _PRES[name]), _PRES[name].adds_bos
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(file, tokens), True
    else:
        raise ModelError(f"{file.path} has a tokenizer of model {kind!r}; gpt2 and llama are supported", hint=_UNSUPPORTED)
    _add_tokens(tokenizer, tokens, _types(file, len(tokens)))
    bos = special_id(file, "bos") if file.get("tokenizer.ggml.add_bos_token", bool, adds_bos) else None
    eos = special_id(file, "eos") if file.get("tokenizer.ggml.add_eos_token", bool, False) else None
    _add_template(tokenizer, tokens, bos, eos)
    return tokenizer


def special_id(file: GgufFile, name: str) -> int | None:
    """The id of the special token `name` (bos, eos, eot, unknown, padding), None where the file has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    token = file.get(key, int)
    if not 0 <= token < len(file.get("tokenizer.ggml.tokens", list)):
        raise ModelError(f"{file.path}: {key} is {token}, outside the vocabulary", hint=_CORRUPT)
    return token


def _byte_level(file: GgufFile, tokens: list[str], pre: _Pre) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if any(part not in vocabulary for part in (left, right, left + right)):
            raise ModelError(f"{file.path}: the merge {merge!r} does not fit the vocabulary", hint=_CORRUPT)
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words_first))
    cuts: list[Any] = []
    if pre.single_digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        cuts.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, False)
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens) or not all(isinstance(score, int | float) for score in scores):
        raise ModelError(f"{file.path}: the vocabulary has {len(tokens)} tokens and {len(scores)} scores", hint=_CORRUPT)
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in set(tokens)]
    unknown = special_id(file, "unknown")
    if missing and unknown is None:
        raise ModelError(f"{file.path}: the vocabulary has neither all bytes ({missing[0]}) nor an unknown token", hint=_UNSUPPORTED)
    merges = merges_from_scores(tokens, scores, _types(file, len(tokens)))
    model = BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, fuse_unk=True, byte_fallback=True,
        unk_token=None if unknown is None else tokens[unknown],
    )
    tokenizer = Tokenizer(model)
    # A space before each stretch of text, as SentencePiece and llama.cpp put it: at the start, and again after a special token.
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    stripped = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    return tokenizer


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges, best first, by which BPE builds the pieces that SentencePiece ranks by score.

    Only normal and user-defined pieces take part: control tokens and bytes are never made out of text.
    """
    pieces = {token: score for token, score, kind in zip(tokens, scores, types) if kind in (_NORMAL, _USER_DEFINED)}
    ranked = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((score, len(left), len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Makes control tokens special and keeps user-defined ones whole, both found in the text as they are written."""
    added = [(token, kind) for token, kind in zip(tokens, types) if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and token]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in added if kind != _USER_DEFINED])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token, kind in added if kind == _USER_DEFINED])
    assert tokenizer.get_vocab_size() == len(tokens), "added tokens are in the vocabulary already"


def _add_template(tokenizer: Tokenizer, tokens: list[str], bos: int | None, eos: int | None) -> None:
    """Encoding puts BOS before and EOS after, where the file asks for them."""
    before = [] if bos is None else [tokens[bos]]
    after = [] if eos is None else [tokens[eos]]
    if before or after:
        special = [(tokens[token], token) for token in {bos, eos} - {None} if token is not None]
        single, pair = [*before, "$A", *after], [*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
        pair += [f"{token}:1" for token in after]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def _types(file: GgufFile, count: int) -> list[int]:
    """token_type of each token; all normal where the file has none."""
    types = file.get("tokenizer.ggml.token_type", list, [_NORMAL] * count)
    if len(types) != count:
        raise ModelError(f"{file.path}: the vocabulary has {count} tokens and {len(types)} token types", hint=_CORRUPT)
    return types


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.get(key, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise ModelError(f"{file.path}: metadata key {key!r} holds no list of strings", hint=_CORRUPT)
    return values
