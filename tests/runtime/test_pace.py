"""How prompts are cut beside streams, with a machine whose times are known."""

from __future__ import annotations

import pytest
from octavo.runtime.pace import Pace


def drive(pace, decoding, prompt, *, prompts=1, alone=0.005, token=0.0002, bound=512):
    """The longest and the mean step while a prompt is computed beside streams, seconds, and the steps it took."""
    for _ in range(5):
        pace.observe(decoding, 0, alone)
    times = []
    while prompt > 0:
        allowed = pace.prompt_tokens(decoding, prompts)
        count = min(prompt, bound if allowed is None else min(allowed, bound))
        times.append(alone + token * count)
        pace.observe(decoding, count, times[-1])
        prompt -= count
    return times


@pytest.mark.parametrize(("policy", "stretch"), [("auto", 2.5), ("latency", 1.5)])
def test_gaps_stay_within_the_policy(policy, stretch):
    times = drive(Pace(policy, 512), 8, 4096)
    settled = times[2:-1]     # before that nothing is known of a prompt token's cost
    assert max(settled) <= stretch * 0.005
    share = 1 - 0.005 * len(times) / sum(times)
    assert share >= (0.57 if policy == "auto" else 0.3), "of the time is the prompt's"


def test_a_step_that_was_held_up_says_nothing_of_the_next():
    steady, disturbed = Pace("auto", 512), Pace("auto", 512)
    for step in range(12):
        for pace in (steady, disturbed):
            pace.observe(8, 0, 0.005)
            pace.observe(8, 30, 0.005 + 30 * 0.0002)
        if step % 4 == 3:
            disturbed.observe(8, 0, 0.1)
            disturbed.observe(8, 30, 0.1)
    assert disturbed.prompt_tokens(8, 1) == steady.prompt_tokens(8, 1)


def test_a_prompt_token_that_costs_more_is_known_soon():
    """As beside streams that have grown long, or after a change of what else the machine does."""
    pace = Pace("auto", 512)
    drive(pace, 8, 600, token=0.0002)
    assert max(drive(pace, 8, 600, token=0.0006)[4:]) <= 2.5 * 0.005


def test_streams_that_grow_are_not_put_down_to_the_prompt():
    """What they take alone is asked again, and the prompt keeps its share."""
    pace, alone, counts = Pace("latency", 512), 0.005, []
    pace.observe(8, 0, alone)
    for _ in range(400):
        alone *= 1.002
        allowed = pace.prompt_tokens(8, 1)
        pace.observe(8, allowed, alone + 0.0002 * allowed)
        counts.append(allowed)
    assert counts.count(0) > 5
    # Half of what a step takes alone goes to the prompt, less what has grown since it was asked.
    assert min(filter(None, counts[300:])) * 0.0002 > 0.4 * 0.0091


def test_throughput_takes_what_a_step_takes():
    pace = Pace("throughput", 512)
    assert pace.prompt_tokens(8, 1) == 512 and len(drive(pace, 8, 4096)) == 8


def test_without_streams_nothing_is_held_back():
    assert Pace("latency", 512).prompt_tokens(0, 1) == 512


def test_a_prompt_always_gets_on():
    pace = Pace("latency", 512)
    for _ in range(10):
        pace.observe(4, 0, 1e-6)
        pace.observe(4, 8, 1.0)
    assert pace.prompt_tokens(4, 1) == 4


@pytest.mark.parametrize("policy", ["auto", "latency"])
def test_prompts_that_queue_are_hurried(policy):
    """Two change nothing; of more the steps get longer, up to full ones, so that no rate of prompts outruns them that a machine could serve."""
    shares = []
    for prompts in (1, 2, 8, 64):
        times = drive(Pace(policy, 512), 8, 8192, prompts=prompts)[3:]
        shares.append(1 - 0.005 * len(times) / sum(times))
    assert shares[0] == shares[1] < shares[2] < shares[3] and shares[3] > 0.9
