"""The workloads: the same ids everywhere, and files that are none."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from octavo.errors import OptionError
from octavo.runtime.workloads import WARM_UP, WORKLOADS, Workload, read_workloads

PEERS = Path(__file__).parent.parent / "perf" / "peers"


def test_the_runners_of_other_engines_do_the_same_work():
    assert read_workloads(PEERS / "workloads.json") == WORKLOADS
    spec = importlib.util.spec_from_file_location("peer", PEERS / "peer.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    assert asdict(WARM_UP) == peer.WARM_UP
    for load in (WARM_UP, *WORKLOADS):
        assert np.array_equal(load.prompts(49_152), peer.prompts_of(asdict(load)))


def test_no_prompt_begins_like_another_workloads():
    first = [tuple(load.prompts(49_152)[0, :8]) for load in (WARM_UP, *WORKLOADS)]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("vocab_size", [1, 7, 100, 101, 320, 39_999])
def test_ids_are_in_a_small_vocabulary_too(vocab_size):
    ids = Workload("x", prompt=64, generate=1, sequences=3).prompts(vocab_size)
    assert ids.shape == (3, 64) and ids.min() >= 0 and ids.max() < vocab_size


@pytest.mark.parametrize("data", [
    None, {}, [], [1], [{"name": "x"}], [{"name": "x", "prompt": 1, "generate": 1, "sequences": 1, "more": 1}],
    [{"name": "x", "prompt": 0, "generate": 1, "sequences": 1}], [{"name": "x", "prompt": 1.5, "generate": 1, "sequences": 1}],
    [{"name": "x", "prompt": True, "generate": 1, "sequences": 1}], [{"name": 3, "prompt": 1, "generate": 1, "sequences": 1}],
    [{"name": "x", "prompt": 1, "generate": 1, "sequences": 1}] * 2,
])
def test_a_file_that_holds_no_workloads(tmp_path, data):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(data))
    with pytest.raises(OptionError):
        read_workloads(path)


def test_a_file_that_is_not_there_or_no_json(tmp_path):
    with pytest.raises(OptionError, match="no file of workloads"):
        read_workloads(tmp_path / "nothing.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(OptionError, match="no file of workloads"):
        read_workloads(tmp_path / "x.json")
