"""Every kind computes the same decoder: logits, sessions, generation. The oracle is the plain graph in onnxruntime, all tokens at once."""

from __future__ import annotations

import gc

import numpy as np
import octavo
import onnx
import onnxruntime as ort
import pytest

RNG = np.random.default_rng(7)
IDS = RNG.integers(3, 300, 70).tolist()
# fp32 sums of 64 to 96 products in another order, over two layers: logits of about 4 differ by some 1e-6.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def oracle(source):
    session = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])

    def logits(ids):
        n = len(ids)
        empty = np.zeros((1, 2, 0, 16), np.float32)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, n), np.int64), "position_ids": np.arange(n)[None]}
        feeds |= {port.name: empty for port in session.get_inputs() if port.name.startswith("past")}
        return session.run(["logits"], feeds)[0][0]

    return logits


def test_predict_is_the_graph(model, oracle, tools):
    got = model.predict(IDS)
    assert got.shape == (len(IDS), tools.V) and got.dtype == np.float32
    np.testing.assert_allclose(got, oracle(IDS), atol=TOLERANCE)
    assert model.stats()["sequences"] == 0


def test_kind(model, kind):
    assert model.kind == kind


def test_growth_over_block_edges(model, oracle):
    """Lengths around every multiple of the block size, appended in uneven parts."""
    whole = oracle(IDS)
    sequence = model.begin_session().new_sequence()
    for start, stop in ((0, 1), (1, 15), (15, 16), (16, 17), (17, 31), (31, 33), (33, 64), (64, 70)):
        np.testing.assert_allclose(sequence.append(IDS[start:stop], rows="all"), whole[start:stop], atol=TOLERANCE)
        assert len(sequence) == stop and sequence.tokens == tuple(IDS[:stop])


def test_fork_truncate_reset_are_independent(model, oracle):
    """Operations on three relatives against the one-at-a-time oracle."""
    session = model.begin_session()
    a = session.new_sequence()
    a.append(IDS[:20])
    b = a.fork()
    a.append(IDS[20:30])
    b.append(IDS[40:45])
    c = b.fork()
    b.truncate(18)
    c.append([5])
    b.append([6, 7])
    for sequence, tokens in ((a, IDS[:30]), (b, [*IDS[:18], 6, 7]), (c, [*IDS[:20], *IDS[40:45], 5])):
        assert sequence.tokens == tuple(tokens)
        np.testing.assert_allclose(sequence.append([9]), oracle([*tokens, 9])[-1:], atol=TOLERANCE)
    a.reset()
    assert len(a) == 0
    np.testing.assert_allclose(a.append(IDS[:3], rows="all"), oracle(IDS[:3]), atol=TOLERANCE)


def test_append_batch(model, oracle):
    session = model.begin_session()
    sequences = [session.new_sequence() for _ in range(3)]
    parts = [IDS[:5], IDS[5:40], IDS[7:8]]
    for got, ids in zip(session.append_batch(list(zip(sequences, parts)), rows="all"), parts):
        np.testing.assert_allclose(got, oracle(ids), atol=TOLERANCE)
    (last,) = session.append_batch([(sequences[1], [3])])
    np.testing.assert_allclose(last, oracle([*parts[1], 3])[-1:], atol=TOLERANCE)


def greedy(oracle, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(oracle(ids)[-1].argmax()))
    return tuple(ids[-n:])


def test_greedy_generation(model, oracle):
    params = octavo.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [IDS[:4], np.array(IDS[10:27]), tuple(IDS[30:31])]
    results = model.generate(prompts, params)
    for prompt, result in zip(prompts, results):
        assert result.completions[0].token_ids == greedy(oracle, prompt, 20)
        assert result.completions[0].finish_reason == "length"
        assert result.prompt_token_ids == tuple(prompt)
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(prompt), 20)


def test_a_sequence_goes_on_after_generating(model, oracle):
    sequence = model.begin_session().new_sequence()
    sequence.append(IDS[:16])
    params = octavo.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    first = sequence.generate(params).completions[0].token_ids
    assert sequence.tokens == (*IDS[:16], *first)
    np.testing.assert_allclose(sequence.append([8, 9], rows="all"), oracle([*IDS[:16], *first, 8, 9])[-2:], atol=TOLERANCE)
    assert first == greedy(oracle, IDS[:16], 5)
    sequence.truncate(17)
    assert tuple(t for piece in sequence.stream(params) for t in piece.token_ids) == greedy(oracle, [*IDS[:16], first[0]], 5)


def test_stream_is_generate(model):
    params = octavo.SamplingParams(seed=3, max_tokens=12, n=2, logprobs=3)
    result = model.generate("the user sings", params)[0]
    pieces = list(model.stream("the user sings", params))
    for completion, index in zip(result.completions, range(2)):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == completion.text
        assert tuple(t for piece in mine for t in piece.token_ids) == completion.token_ids
        assert tuple(p for piece in mine for p in piece.logprobs) == completion.logprobs
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]


def test_prompt_logprobs(model, oracle):
    result = model.generate([IDS[:40]], octavo.SamplingParams(max_tokens=1, prompt_logprobs=2))[0]
    logits = oracle(IDS[:40]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 40
    for position, entry in enumerate(result.prompt_logprobs[1:]):
        assert entry.token_id == IDS[position + 1]
        assert abs(entry.logprob - expected[position, entry.token_id]) < 1e-4
        assert [token for token, _ in entry.top] == np.argsort(-expected[position])[:2].tolist()


def test_dropping_frees(model):
    session = model.begin_session()
    sequence = session.new_sequence()
    sequence.append(IDS)
    fork = sequence.fork()
    stream = sequence.stream(octavo.SamplingParams(max_tokens=9))
    next(stream)
    never_started = model.stream(IDS[:3])
    del sequence, stream, never_started
    gc.collect()
    assert model.stats()["sequences"] == 1
    del fork
    gc.collect()
    assert model.stats()["sequences"] == 0


def test_closing_a_session_closes_its_sequences(model):
    with model.begin_session() as session:
        sequence = session.new_sequence()
        sequence.append([4])
    assert model.stats()["sequences"] == 0
    for use in (lambda: sequence.append([4]), sequence.fork, lambda: sequence.truncate(0), sequence.generate, session.new_sequence):
        with pytest.raises(octavo.OctavoError, match="closed"):
            use()
    sequence.close()


def test_run_feeds_the_graph_where_it_is_its_own(model, kind, oracle):
    feeds = {"input_ids": np.array([IDS[:5]]), "attention_mask": np.ones((1, 5), np.int64), "position_ids": np.arange(5)[None]}
    if kind == "paged":
        with pytest.raises(octavo.OctavoError, match="contiguous"):
            model.run(feeds)
        return
    if kind != "stateless":
        feeds |= {f"past_key_values.{i}.{part}": np.zeros((1, 2, 0, 16), np.float32) for i in range(2) for part in ("key", "value")}
    np.testing.assert_allclose(model.run(feeds)["logits"][0], oracle(IDS[:5]), atol=TOLERANCE)
    with pytest.raises(octavo.OctavoError, match="missing or unknown: input_ids"):
        model.run({name: value for name, value in feeds.items() if name != "input_ids"})
    with pytest.raises(octavo.OctavoError, match="don't fit"):
        model.run({**feeds, "input_ids": np.array([IDS[:5]], np.float32)})


def test_a_graph_for_one_token_a_run_takes_prompts_too(source, oracle, tmp_path):
    """The decode half of a decoder that was exported in two."""
    graph = onnx.load(source)
    for value in graph.graph.input:
        if value.name in ("input_ids", "position_ids"):
            value.type.tensor_type.shape.dim[1].dim_value = 1
    graph.graph.ClearField("value_info")
    onnx.save(graph, tmp_path / "decode.onnx")
    with octavo.load(tmp_path / "decode.onnx") as model:
        np.testing.assert_allclose(model.predict(IDS[:20]), oracle(IDS[:20]), atol=TOLERANCE)
        sequence = model.begin_session().new_sequence()
        np.testing.assert_allclose(sequence.append(IDS[:7], rows="all"), oracle(IDS[:7]), atol=TOLERANCE)
        np.testing.assert_allclose(sequence.append(IDS[7:9])[-1], oracle(IDS[:9])[-1], atol=TOLERANCE)
