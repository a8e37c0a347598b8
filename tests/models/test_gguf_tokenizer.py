"""The converted tokenizer encodes as transformers' own conversion does, and decodes what it encoded.

They part in two places, where the expected tokens are written out: transformers cuts "smollm" text by GPT-2's pattern alone, which keeps
digits and the space before them together, and adds no SentencePiece space after a special token or before a leading space.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.errors import ModelError
from octavo.models.gguf_file import GgufFile
from octavo.models.gguf_tokenizer import build_tokenizer, merges_from_scores
from tokenizers import Tokenizer

MakeGguf = Callable[..., Path]

TRICKY = [
    "", " ", "   ", "hello world", " hello", "hello  hello   hello", "\n\n\nhello\r\n\tworld", "tab\tseparated\t\t",
    "it's we'll I'M DON'T 'tis", "12 121 1212 3.14159 1,000,000", "x=1;y=12", "naïve café e\u0301 É", "日本語 中文 한국어",
    "Привет мир", "مرحبا ١٢٣",
    "🙂 👩‍👩‍👧 🇩🇪", "def f(x):\n    return x  # hello\n", "<|im_start|>user\nhello<|im_end|>\n", "a<think>b</think>",
    "<|im_start|><|im_end|>",
    "zero\u200bwidth\u00a0space", "\x00\x01\x7f", "a" * 200, "{\"key\": [1, 2.5e-3, null]}", "https://example.org/a?b=c&d=12",
]


def transformers_tokenizer(file: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def assert_equal(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False), f"{text!r}: {ours.encode(text).tokens}"
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_equals_transformers(pre: str, make_gguf: MakeGguf) -> None:
    file = make_gguf(metadata={"tokenizer.ggml.pre": pre})
    # transformers gives a qwen2 GGUF no NFC, which its own tokenizer.json has
    texts = [text for text in TRICKY if pre != "qwen2" or "e\u0301" not in text]
    assert_equal(build_tokenizer(GgufFile(file)), transformers_tokenizer(file), texts)


def test_pre_tokenizers_differ(make_gguf: MakeGguf) -> None:
    """A wrong choice shows: merges meet digits, newlines and spaces differently."""
    found = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        tokenizer = build_tokenizer(GgufFile(make_gguf(metadata={"tokenizer.ggml.pre": pre})))
        found[pre] = tuple(tuple(tokenizer.encode(text).tokens) for text in ("12", " hello", "x\n\ny", "\u00e1 a\u0301"))
    assert len(set(found.values())) == 4


def test_smollm_cuts_digits_singly(make_gguf: MakeGguf) -> None:
    tokenizer = build_tokenizer(GgufFile(make_gguf()))
    assert tokenizer.encode("12 2").tokens == ["1", "2", "Ġ", "2"]
    assert build_tokenizer(GgufFile(make_gguf(metadata={"tokenizer.ggml.pre": "gpt-2"}))).encode("12").tokens == ["12"]


def test_smollm2_equals_transformers(smollm2_gguf: Path) -> None:
    ours = build_tokenizer(GgufFile(smollm2_gguf))
    assert_equal(ours, transformers_tokenizer(smollm2_gguf), [text for text in TRICKY if "١" not in text])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, gguf_writer: Callable[..., Path]) -> Tokenizer:
    return build_tokenizer(GgufFile(gguf_writer(tmp_path_factory.mktemp("words") / "model.gguf")))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_byte_level_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_special_and_user_defined_ones_are_not(make_gguf: MakeGguf) -> None:
    tokenizer = build_tokenizer(GgufFile(make_gguf()))
    ids = tokenizer.encode("<|im_start|>hello<think><|im_end|>").ids
    assert [tokenizer.id_to_token(token) for token in ids] == ["<|im_start|>", "hello", "<think>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think>"


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_come_as_the_file_says(bos: bool, eos: bool, make_gguf: MakeGguf) -> None:
    file = make_gguf(metadata={"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos})
    tokenizer = build_tokenizer(GgufFile(file))
    hello = tokenizer.token_to_id("hello")
    assert tokenizer.encode("hello").ids == [*[1] * bos, hello, *[2] * eos]
    assert tokenizer.encode("hello", add_special_tokens=False).ids == [hello]


def test_sentencepiece_equals_transformers(make_gguf: MakeGguf, sentencepiece_words: dict[str, Any]) -> None:
    file = make_gguf(vocabulary=sentencepiece_words)
    texts = [text for text in TRICKY if text and not text.startswith(" ")]
    assert_equal(build_tokenizer(GgufFile(file)), transformers_tokenizer(file), texts)


def test_sentencepiece_puts_a_space_before_each_stretch_of_text(make_gguf: MakeGguf, sentencepiece_words: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(GgufFile(make_gguf(vocabulary=sentencepiece_words)))
    assert tokenizer.encode("hello").tokens == ["<s>", "▁hello"]
    assert tokenizer.encode(" hello").tokens == ["<s>", "▁", "▁hello"]
    assert tokenizer.encode("hello</s>hello").tokens == ["<s>", "▁hello", "</s>", "▁hello"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    bare = build_tokenizer(GgufFile(make_gguf(vocabulary=sentencepiece_words, metadata={"tokenizer.ggml.add_space_prefix": False})))
    assert bare.encode("hello", add_special_tokens=False).tokens == ["hello"]


def test_merges_come_best_score_first_and_never_make_control_tokens() -> None:
    merges = merges_from_scores(["a", "b", "ab", "abb", "bb", "<s>", "<", "s>"], [0, 0, -2, -1, -3, 0, 0, 0], [1, 1, 1, 1, 1, 3, 1, 1])
    assert merges == [("ab", "b"), ("a", "bb"), ("a", "b"), ("b", "b")]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.pre": "viking"}, "'viking'.*gpt-2, smollm, llama-bpe"),
        ({"tokenizer.ggml.pre": None}, "'default'"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'.*gpt2 and llama"),
        ({"tokenizer.ggml.merges": ["h q"]}, "merge 'h q'"),
        ({"tokenizer.ggml.merges": ["hello"]}, "merge 'hello'"),
        ({"tokenizer.ggml.merges": [1, 2]}, "no list of strings"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token types"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "twice"),
        ({"tokenizer.ggml.bos_token_id": 9999, "tokenizer.ggml.add_bos_token": True}, "bos_token_id is 9999"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_stated_with_certainty_is_refused(metadata: dict[str, Any], message: str, make_gguf: MakeGguf) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build_tokenizer(GgufFile(make_gguf(metadata=metadata)))
    assert caught.value.hint
