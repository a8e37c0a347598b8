"""One request alone, and among 31 others that come and go: the same tokens and the same bits of every log probability.

The others share beginnings with it, fork, are cancelled, outrank it and push it out of a pool too small; prompts are cut beside streams. On a
plain decoder and on one whose second layer has a window, with every cache format and with quantized weights.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import octavo
import onnx_ir as ir
import pytest
from octavo.custom_ops import library_path
from octavo.errors import LibraryError
from octavo.models.tiny import TINY, _LlamaBuilder, tiny_weights, write_config, write_tiny_tokenizer
from octavo.runtime.memory_plan import plan_memory

WINDOW, COUNT = 24, 32


class Hybrid(_LlamaBuilder):
    """The tiny decoder, its second layer with a window."""

    def visible(self, ids, mask):
        visible = super().visible(ids, mask)
        made = {node.name: node.outputs[0] for node in self.nodes}
        first = self.op("Sub", made["mask/queries/Unsqueeze"], self.constant("window", np.int64(WINDOW)), name="mask/first")
        near = self.op("Greater", made["mask/keys"], first, name="mask/near")
        self.windowed = self.op("And", visible, near, name="mask/windowed")
        return visible

    def layer(self, i, x, positions, visible, past):
        return super().layer(i, x, positions, self.windowed if i == 1 else visible, past)


@pytest.fixture(scope="module", params=[("plain", "fp32", "int4", "int8"), ("hybrid", "fp32", "int8", "int8"), ("hybrid", "fp32", "fp32", "fp16"),
                                        ("plain", "int8", "int4", "fp32")], ids="-".join)
def artifact(request, tmp_path_factory) -> Path:
    try:
        library_path()
    except LibraryError as error:
        pytest.skip(str(error))
    shape, activations, weights, cache = request.param
    folder = tmp_path_factory.mktemp("model")
    config = TINY["llama"]
    builder = Hybrid if shape == "hybrid" else _LlamaBuilder
    ir.save(builder(config, tiny_weights(config, 3)).build(), folder / "model.onnx", external_data="model.onnx.data")
    write_config(folder, config)
    write_tiny_tokenizer(folder)
    options = octavo.CompileOptions(weights=weights, activations=activations, kv_cache=cache, group_size=32, strict=True)
    report = octavo.compile(folder / "model.onnx", folder / "artifact", options=options)
    assert report.kind == "paged"
    return folder / "artifact"


@pytest.fixture(scope="module")
def work():
    """Prompts, parameters and priorities; half of the prompts begin alike."""
    rng, shared = random.Random(31), None
    requests = []
    for i in range(COUNT):
        ids = [rng.randrange(3, 300) for _ in range(rng.choice((1, 7, 16, 33, 60)))]
        shared = shared or [rng.randrange(3, 300) for _ in range(50)]
        prompt = shared[: rng.randint(10, 50)] + ids[:9] if i % 2 else ids
        params = octavo.SamplingParams(
            max_tokens=rng.randint(6, 30), seed=i, temperature=rng.choice((0, 0.7, 1.3)), top_p=rng.choice((1.0, 0.9)), n=rng.choice((1, 1, 1, 2)),
            repetition_penalty=rng.choice((1.0, 1.2)), logprobs=3, prompt_logprobs=rng.choice((None, None, 2)), ignore_eos=True,
        )
        requests.append((prompt, params, rng.choice((0, 0, 0, 1, -1))))
    return requests


@pytest.fixture(scope="module")
def alone(artifact, work):
    """Each request by itself in a pool with room, in one piece, nothing cached of others."""
    options = octavo.RuntimeOptions(threads=1, batching=False, prefix_cache=False, max_step_tokens=4096)
    with octavo.load(artifact, options=options) as model:
        yield [model.generate([prompt], params)[0] for prompt, params, _ in work]


def crowded(artifact, blocks=13, **options):
    """A pool for about three of them, small steps, few places."""
    plan = plan_memory(artifact, memory=None, block_size=16)
    memory = plan.model_bytes + blocks * 16 * plan.token_bytes
    given = {"threads": 2, "block_size": 16, "memory": memory, "max_sequences": 6, "max_step_tokens": 32, "policy": "latency", **options}
    return octavo.load(artifact, options=octavo.RuntimeOptions(**given))


@pytest.mark.parametrize("swap", [None, "4 MiB"])
def test_alone_and_among_thirty_one_others(artifact, work, alone, swap):
    rng = random.Random(7)
    with crowded(artifact, swap_memory=swap) as model:
        order = rng.sample(range(COUNT), COUNT)
        streams, pieces, cancelled = {}, {i: [] for i in order}, 0
        while order or streams:
            if order and (not streams or rng.random() < 0.3):
                at = order.pop()
                prompt, params, priority = work[at]
                streams[at] = model.stream(prompt, params, priority=priority)
                if rng.random() < 0.3:      # one more, that will be dropped halfway
                    next(model.stream(prompt, params, priority=priority), None)
                    cancelled += 1
            at = rng.choice(list(streams))
            piece = next(streams[at], None)
            if piece is None:
                del streams[at]
            else:
                pieces[at].append(piece)
            with model.engine.turn:
                model.engine.check()
        stats = model.stats()
        for at, expected in enumerate(alone):
            for index, completion in enumerate(expected.completions):
                mine = [piece for piece in pieces[at] if piece.index == index]
                assert tuple(token for piece in mine for token in piece.token_ids) == completion.token_ids, at
                assert tuple(logprob for piece in mine for logprob in piece.logprobs) == completion.logprobs, at
                assert "".join(piece.text for piece in mine) == completion.text
        assert cancelled and stats["preemptions"] and stats["prefix_hits"] and stats["forks"]
        assert (stats["swaps_in"] > 0) == (swap is not None)
        assert stats["blocks_used"] == stats["sequences"] == 0


def test_in_any_batch_and_from_any_thread(artifact, work, alone):
    with crowded(artifact, blocks=20) as model:
        together = model.generate([prompt for prompt, _, _ in work[:8]], work[0][1])
        assert together[0] == alone[0]
        found, failures = {}, []

        def run(mine):
            try:
                for at in mine:
                    prompt, params, priority = work[at]
                    [found[at]] = model.generate([prompt], params, priority=priority)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(range(i, COUNT, 8),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures and [found[at] for at in range(COUNT)] == alone


def test_through_save_and_restore(artifact, work, tmp_path):
    prompt, params, _ = work[3]
    params = octavo.SamplingParams(max_tokens=12, seed=9, temperature=0.8, logprobs=2, ignore_eos=True)
    with octavo.load(artifact, options=octavo.RuntimeOptions(threads=1, block_size=16)) as model:
        sequence = model.begin_session().new_sequence()
        sequence.append(prompt)
        first = sequence.generate(params)
        sequence.save(tmp_path / "a.seq")
        second = sequence.generate(params)
    with crowded(artifact) as model:
        restored = model.begin_session().restore(tmp_path / "a.seq")
        assert restored.tokens == (*prompt, *first.completions[0].token_ids)
        model.generate([prompt for prompt, _, _ in work[:6]], work[0][1])
        assert restored.generate(params).completions == second.completions
