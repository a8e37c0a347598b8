"""Async streams: the tokens of the sync ones, side by side; cancelled ones free what they hold."""

from __future__ import annotations

import asyncio
import threading

import octavo
import pytest

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PROMPTS = [[5 + i, 9, 30 + i] for i in range(12)]


async def _tokens(stream):
    return [token async for piece in stream for token in piece.token_ids]


def test_tokens_are_those_of_generate(paged):
    expected = [list(r.completions[0].token_ids) for r in paged.generate(PROMPTS, GREEDY)]
    before = paged.stats()["steps"]

    async def together():
        return await asyncio.gather(*(_tokens(paged.astream(prompt, GREEDY)) for prompt in PROMPTS))

    assert asyncio.run(together()) == expected
    assert paged.stats()["steps"] - before < 3 * 20, "they share steps"


def test_the_event_loop_stays_free(paged, monkeypatch):
    """A step that takes its time doesn't keep other tasks from running."""
    gate, ticks = threading.Event(), []
    execute = paged.engine.executor.execute

    def slow(plan):
        assert gate.wait(10)
        return execute(plan)

    monkeypatch.setattr(paged.engine.executor, "execute", slow)

    async def both():
        task = asyncio.create_task(_tokens(paged.astream(PROMPTS[0], GREEDY)))
        for _ in range(5):
            await asyncio.sleep(0.001)
            ticks.append(task.done())
        gate.set()
        return await task

    assert len(asyncio.run(both())) == 20 and ticks == [False] * 5


@pytest.mark.parametrize("how", ["cancel", "aclose", "drop", "async with"])
def test_who_stops_frees_its_blocks(paged, how):
    async def main():
        stream = paged.astream(PROMPTS[0], GREEDY)
        await anext(stream)
        if how == "cancel":
            task = asyncio.create_task(_tokens(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "aclose":
            await stream.aclose()
        elif how == "async with":
            async with stream:
                await anext(stream)
        if how == "drop":
            del stream
        return await _tokens(paged.astream(PROMPTS[1], GREEDY))

    assert len(asyncio.run(main())) == 20
    stats = paged.stats()
    assert (stats["sequences"], stats["blocks_used"], stats["requests_running"]) == (0, 0, 0)


def test_errors_are_raised_where_it_is_asked(paged):
    with pytest.raises(octavo.OctavoError):
        paged.astream([], GREEDY)
