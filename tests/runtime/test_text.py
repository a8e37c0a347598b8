"""Characters come out whole, joined pieces are the text, stop strings end it, templates stay in their box."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.errors import ModelError, RequestError, UnsupportedError
from octavo.models.tiny import write_tiny_tokenizer
from octavo.runtime.chat_template import ChatTemplate
from octavo.runtime.text import Detokenizer, StopStrings, TextStream
from octavo.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.open(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")).parent)


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    """Byte → the token that is this byte alone."""
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    table = {}
    for byte in range(256):
        shown = chr(byte) if chr(byte) in alphabet else None
        table[byte] = tokenizer._tokenizer.token_to_id(shown) if shown else None
    # GPT-2's table: bytes without a printable character of their own are shown as U+0100 upwards, in order.
    for offset, byte in enumerate(byte for byte, token in table.items() if token is None):
        table[byte] = tokenizer._tokenizer.token_to_id(chr(256 + offset))
    assert len(set(table.values())) == 256 and None not in table.values()
    return table


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=20), st.text(max_size=6))
def test_pieces_of_any_text_byte_by_byte(tokenizer, byte_ids, text, before):
    context = [byte_ids[b] for b in before.encode()]
    detokenizer = Detokenizer(tokenizer, context)
    seen, data = "", text.encode()
    for i, byte in enumerate(data):
        piece = detokenizer.feed(byte_ids[byte])
        assert "\ufffd" not in piece or "\ufffd" in text
        seen += piece
        # Never behind by more than the characters that are still incomplete (or a U+FFFD, which could be one).
        assert data[: i + 1].decode(errors="ignore").rstrip("\ufffd").startswith(seen.rstrip("\ufffd")) or "\ufffd" in text
    assert seen + detokenizer.finish() == text


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40))
def test_pieces_of_any_bytes_join_to_the_decoded_whole(tokenizer, byte_ids, data):
    ids = [byte_ids[b] for b in data]
    detokenizer = Detokenizer(tokenizer, [])
    assert "".join([*map(detokenizer.feed, ids), detokenizer.finish()]) == tokenizer.decode(ids)


def test_a_character_cut_by_the_prompt_is_completed(tokenizer, byte_ids):
    first, second = (byte_ids[b] for b in "é".encode())
    detokenizer = Detokenizer(tokenizer, [byte_ids[ord("x")], first])
    assert detokenizer.feed(second) == "é"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_over_any_split(text, stops, data):
    matcher, out, at, first_hit = StopStrings(stops), "", 0, None
    while at < len(text) and not matcher.stopped:
        size = data.draw(st.integers(1, 5))
        out += matcher.feed(text[at : at + size])
        at += size
        hits = [i for stop in stops if (i := text[:at].find(stop)) >= 0]
        first_hit = min(hits) if hits else None
        assert matcher.stopped == bool(hits)
    out += matcher.finish()
    # The earliest occurrence within what had come when it was found; nothing of it is ever given out.
    assert out == (text if first_hit is None else text[:first_hit])
    assert matcher.feed("more") == "" if matcher.stopped else True


def test_what_may_become_a_stop_is_held_back():
    matcher = StopStrings(["END"])
    assert [matcher.feed(c) for c in "aEN"] == ["a", "", ""]
    assert matcher.feed("x") == "ENx"
    assert matcher.feed("E") == "" and matcher.finish() == "E"


def test_a_stop_string_over_a_split_character(tokenizer, byte_ids):
    stream = TextStream(tokenizer, [], ["né"])
    assert "".join(stream.feed(byte_ids[b]) for b in "une née".encode()) == "une " and stream.stopped


def test_forked_streams_are_independent(tokenizer, byte_ids):
    stream = TextStream(tokenizer, [], ["xy"])
    stream.feed(byte_ids[0xC3])
    twin = stream.fork()
    assert stream.feed(byte_ids[0xA9]) == "é"
    assert twin.feed(byte_ids[0xA8]) == "è"


def test_chat(tokenizer):
    messages = [{"role": "user", "content": "Hi {{ messages }} é"}]
    text = tokenizer._tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)
    assert text == "<|im_start|>user\nHi {{ messages }} é<|im_end|>\n<|im_start|>assistant\n"


def test_eos_from_every_file(tmp_path):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert Tokenizer.open(tmp_path).eos_ids == {2, 7, 8, 9}


def test_missing_and_broken_files(tmp_path, tokenizer):
    assert Tokenizer.open(tmp_path) is None
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedError, match="no chat template"):
        Tokenizer.open(tmp_path).encode_chat([{"role": "user", "content": "x"}])
    for name, text in (("tokenizer_config.json", "["), ("tokenizer_config.json", "[]"), ("tokenizer.json", "{}")):
        write_tiny_tokenizer(tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(ModelError, match=name):
            _ = Tokenizer.open(tmp_path).eos_ids
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        Tokenizer.open(tmp_path).encode_chat([{"role": "user", "content": "x"}])


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ cycler.__init__.__globals__.os }}",
    "{{ ''['__class__']|attr('__mro__') }}{{ (''|attr('__class__')).x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ self._TemplateReference__context.eval_ctx.environment }}{{ range.__self__ }}",
    "{% set _ = messages.append(1) %}",
    "{{ '{0.__class__.__base__}'.format(1) }}",
    "{{ ('%s' % 1) }}",
    "{{ lipsum(1) }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ raise_exception('no') }}",
]
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(999999999) %}{% endfor %}",
    "{% set n = [0] * 600 %}{% for a in n %}{% for b in n %}{% for c in n %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{{ 'a' * 999999999 }}", "{{ 999999999 * 'a' }}", "{{ [0] * 999999999 }}", "{{ 9 ** 9 ** 9 }}",
    "{% set n = namespace(x=9) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'a'.center(999999999) }}", "{{ 'a'|center(999999999) }}", "{{ 'a'.zfill(999999999) }}", "{{ '%999999999d'|format(1) }}",
    "{{ '{:999999999}'.format(1) }}", "{{ ('a' * 4000).replace('a', 'b' * 4000) }}", "{{ ('a' * 4000)|replace('a', 'b' * 4000) }}",
    "{{ ('b' * 4000).join(['a'] * 4000) }}", "{{ (['a'] * 4000)|join('b' * 4000) }}",
    "{{ [['a']]|tojson(indent=999999999)|length * 'a' * 99999999 }}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(40) }}",
    "{% macro f(n) %}{% if n > 0 %}{% set _ = f(n - 1) %}{% set _ = f(n - 1) %}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for a in range(1000) %}{{ 'a' * 100000 }}{% endfor %}",
]


@pytest.mark.parametrize("source", [*ESCAPES, *BOMBS])
def test_templates_stay_in_their_box(source):
    """Refused when read or when rendered, never with anything but our errors, and soon."""
    with pytest.raises((ModelError, RequestError)) as caught:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
        pytest.fail(f"rendered {text[:200]!r}")
    assert "chat template" in str(caught.value)


def test_ordinary_templates_work():
    source = (
        "{%- for m in messages if m.role != 'system' -%}{%- if loop.index0 > 5 %}{% break %}{% endif -%}"
        "{{ bos_token ~ m['role'].upper() + ': ' + m.content|trim|replace('a', 'b') ~ loop.index }}\n{%- endfor %}"
        "{% if add_generation_prompt %}{{ ['x', 'y']|join('-') }}{{ {'k': 'é<'}|tojson }}{{ 'a,b'.split(',')[1] }}{% endif %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": " aha "}]) == "<s>USER: bhb1" + 'x-y{"k": "é<"}b'
    assert template.render([{"role": "user", "content": "c"}], add_generation_prompt=False) == "<s>USER: c1"


def test_a_huge_template_is_refused():
    with pytest.raises(ModelError, match="1,048,577 characters"):
        ChatTemplate("a" * ((1 << 20) + 1), {})
