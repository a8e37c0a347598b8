"""Sequences in files: the same bits after a restart, on every kind; what is damaged or another's is refused and nothing else is touched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import octavo
import pytest
from octavo.errors import CapacityError, OptionError, RequestError, SavedSequenceError
from octavo.runtime import saved as saved_module

RNG = np.random.default_rng(8)
IDS = RNG.integers(3, 300, 45).tolist()
NEXT = RNG.integers(3, 300, 6).tolist()


def grown(model, ids=IDS):
    sequence = model.begin_session().new_sequence()
    sequence.append(ids)
    return sequence


@pytest.mark.parametrize("name", ["paged", "paged_fp16", "paged_int8", "paged_hybrid", "contiguous", "stateless", "baseline"])
def test_a_restored_sequence_goes_on_with_the_same_bits(name, paths, op_library, tmp_path):
    options = octavo.RuntimeOptions(threads=1, block_size=16, prefix_cache=False)
    with octavo.load(getattr(paths, name), options=options) as model:
        sequence = grown(model)
        sequence.save(tmp_path / "a.seq")
        expected = sequence.append(NEXT, rows="all")
    with octavo.load(getattr(paths, name), options=options) as model:
        session = model.begin_session()
        restored = session.restore(tmp_path / "a.seq")
        assert restored.tokens == tuple(IDS)
        before = model.stats()["tokens"]
        np.testing.assert_array_equal(restored.append(NEXT, rows="all"), expected)
        if name.startswith("paged"):
            assert model.stats()["tokens"] - before == 45 - 32 + 6, "two blocks were there"
        again = session.restore(tmp_path / "a.seq")
        again.truncate(20)
        np.testing.assert_array_equal(again.append(IDS[20:] + NEXT, rows="all")[-6:], expected)


def test_whatever_a_window_has_let_go_a_file_can_be_restored(tools, paths, op_library, tmp_path):
    """Truncated to where the last whole block's end would see a released block: the file has the tokens alone."""
    with tools.small_paged(paths, 24, name="paged_hybrid", prefix_cache=False) as model:
        rows = model.predict(IDS + NEXT)
        for length in range(1, 49):
            sequence = grown(model, (IDS + NEXT)[:49])
            sequence.truncate(length)
            sequence.save(tmp_path / "a.seq")
            restored = model.begin_session().restore(tmp_path / "a.seq")
            assert restored.tokens == sequence.tokens
            np.testing.assert_array_equal(restored.append((IDS + NEXT)[length:]), rows[-1:])


def test_another_process_goes_on_with_the_same_bits(paths, op_library, tmp_path):
    with octavo.load(paths.paged_int8, options=octavo.RuntimeOptions(threads=1)) as model:
        sequence = grown(model)
        sequence.save(tmp_path / "a.seq")
        expected = sequence.append(NEXT)
    code = (
        "import octavo, sys, numpy as np; m = octavo.load(sys.argv[1]); s = m.begin_session().restore(sys.argv[2]);"
        f"np.save(sys.argv[3], s.append({NEXT}))"
    )
    subprocess.run([sys.executable, "-c", code, str(paths.paged_int8), str(tmp_path / "a.seq"), str(tmp_path / "out.npy")], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_another_block_size_computes_again(paths, op_library, tmp_path):
    with octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1, block_size=16)) as model:
        sequence = grown(model)
        sequence.save(tmp_path / "a.seq")
        expected = sequence.append(NEXT)
    with octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1, block_size=32)) as model:
        np.testing.assert_array_equal(model.begin_session().restore(tmp_path / "a.seq").append(NEXT), expected)
        assert model.stats()["tokens_recomputed"] == 32


def test_a_file_holds_nothing_of_others(paged, tmp_path):
    """The slots behind a sequence's end keep what was there before; a file must not."""
    session = paged.begin_session()
    session.new_sequence().append(IDS)                   # its blocks are free again
    short, alone = session.new_sequence(salt="x"), session.new_sequence(salt="y")
    short.append(IDS[:20])
    short.save(tmp_path / "a.seq")
    state = saved_module.read_sequence(tmp_path / "a.seq", paged.fingerprint)
    assert state.cache.length == 16 and all(array.shape[0] == 1 for array in state.cache.arrays)
    assert state.scope == "x"
    alone.append(IDS[:1])


def _damage(kind, data):
    if kind == "empty":
        return b""
    if kind == "truncated":
        return data[:-100]
    if kind == "one bit":
        return data[:3000] + bytes([data[3000] ^ 1]) + data[3001:]
    if kind == "other magic":
        return b"X" + data[1:]
    if kind == "longer":
        return data + b"x"
    if kind == "huge header":
        return data[:8] + (2**32 - 1).to_bytes(4, "little") + data[12:]
    header_size = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + header_size])
    header.update({"version": {"format_version": 99}, "no layout": {"layout": 3}, "too long": {"length": 4096},
                   "negative": {"arrays": [{"dtype": "float32", "shape": [-1]}]}, "object": {"arrays": [{"dtype": "object", "shape": [1]}]}}[kind])
    text = json.dumps(header).encode()
    return data[:8] + len(text).to_bytes(4, "little") + text + data[12 + header_size :]


DAMAGES = ("empty", "truncated", "one bit", "other magic", "longer", "huge header", "version", "no layout", "too long", "negative", "object")


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_and_nothing_is_lost(paged, tmp_path, kind, tools):
    sequence = grown(paged)
    sequence.save(tmp_path / "a.seq")
    (tmp_path / "a.seq").write_bytes(_damage(kind, (tmp_path / "a.seq").read_bytes()))
    before = paged.stats()
    with pytest.raises(SavedSequenceError):
        paged.begin_session().restore(tmp_path / "a.seq")
    assert paged.stats() == before
    sequence.append(NEXT)


def test_another_models_file_is_refused(paths, op_library, paged, tmp_path):
    with octavo.load(paths.paged_fp16) as other:
        grown(other).save(tmp_path / "a.seq")
    with pytest.raises(SavedSequenceError, match="another model"):
        paged.begin_session().restore(tmp_path / "a.seq")
    with pytest.raises(SavedSequenceError, match="can't be read"):
        paged.begin_session().restore(tmp_path / "none.seq")


@pytest.mark.parametrize("change", [
    lambda cache: replace(cache, length=32, arrays=tuple(array[:, :1] for array in cache.arrays)),
    *(lambda cache, length=length: replace(cache, length=length) for length in (0, 17, 31, 45)),
], ids=["other arrays", "no block", "between blocks", "one short", "more than there is"])
def test_arrays_that_are_no_cache_of_the_model(paged, tmp_path, change):
    """The checksum holds and the model is the right one: somebody wrote what its cache can't have."""
    sequence = grown(paged)
    sequence.save(tmp_path / "a.seq")
    state = saved_module.read_sequence(tmp_path / "a.seq", paged.fingerprint)
    saved_module.write_sequence(tmp_path / "b.seq", replace(state, scope=None, cache=change(state.cache)))
    before = paged.stats()
    with pytest.raises(SavedSequenceError, match="none of this model's"):
        paged.begin_session().restore(tmp_path / "b.seq")
    assert paged.stats() == before


def test_a_full_disk_leaves_the_old_file(paged, tmp_path, monkeypatch):
    sequence = grown(paged)
    sequence.save(tmp_path / "a.seq")
    old = (tmp_path / "a.seq").read_bytes()
    sequence.append(NEXT)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SavedSequenceError, match="No space left"):
        sequence.save(tmp_path / "a.seq")
    assert (tmp_path / "a.seq").read_bytes() == old and os.listdir(tmp_path) == ["a.seq"]
    sequence.append(NEXT)


def test_no_room_is_said(tools, paths, op_library, tmp_path):
    """Idle sequences make room for a restored one, running ones don't."""
    with tools.small_paged(paths, 4) as model:
        sequence = grown(model)
        sequence.save(tmp_path / "a.seq")
        expected = sequence.append(NEXT[:1])
        restored = model.begin_session().restore(tmp_path / "a.seq")
        assert model.stats()["idle_drops"] == 1
        np.testing.assert_array_equal(restored.append(NEXT[:1]), expected)
        stream = restored.stream(octavo.SamplingParams(max_tokens=5, ignore_eos=True))
        next(stream)
        with pytest.raises(CapacityError):
            model.begin_session().restore(tmp_path / "a.seq")
        assert len(list(stream)) == 4


def test_any_byte_may_be_damaged(paged, tmp_path):
    """Header, arrays, checksum: bits turned, bytes cut out or doubled, parts overwritten; and nothing is left behind in the pool."""
    rng = np.random.default_rng(1)
    sequence = grown(paged)
    sequence.save(tmp_path / "a.seq")
    data = (tmp_path / "a.seq").read_bytes()
    header = 12 + int.from_bytes(data[8:12], "little")
    before = paged.stats()
    places = [*range(12), *rng.integers(12, header, 150).tolist(), *rng.integers(header, len(data), 100).tolist(), *range(len(data) - 32, len(data))]
    for at in places:
        how = rng.integers(4)
        damaged = [data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :], data[:at], data[:at] + data[at + 1 :],
                   data[:at] + rng.bytes(4) + data[at:]][how]
        (tmp_path / "b.seq").write_bytes(damaged)
        with pytest.raises(SavedSequenceError):
            paged.begin_session().restore(tmp_path / "b.seq")
    assert paged.stats() == before
    sequence.append(NEXT)


def test_a_disk_that_fills_up_anywhere_leaves_the_old_file(paged, named, tmp_path):
    """A limit on the size of files: the operating system itself refuses, at every part of the file and of a named session."""
    resource = pytest.importorskip("resource")
    sequence = grown(paged)
    sequence.save(tmp_path / "a.seq")
    old, limits = (tmp_path / "a.seq").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with named() as model:
        session = model.begin_session(name="a")
        session.new_sequence().append(IDS)
        session.close()
        session = model.begin_session(name="a")
        session.sequences[0].append(NEXT)
        for size in (0, 5, 11, 300, 5000, len(old) - 40, len(old) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                for write in (lambda: sequence.save(tmp_path / "a.seq"), session.close):
                    with pytest.raises(SavedSequenceError):
                        write()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert (tmp_path / "a.seq").read_bytes() == old
            assert sorted(os.listdir(tmp_path)) == ["a.seq", "sessions"]
            assert len(os.listdir(tmp_path / "sessions")) == 2, "the session, and its lock"
        session.close()
        assert len(model.begin_session(name="a").sequences[0]) == len(IDS) + len(NEXT)


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_process_that_is_ended_while_it_writes_loses_nothing(named, tmp_path, at):
    """Before the n-th of the calls that make a file or a folder final: what was there, or what came after it, is there whole."""
    with named(prefix_cache=False) as model:
        session = model.begin_session(name="a")
        session.new_sequence().append(IDS)
        session.sequences[0].save(tmp_path / "a.seq")
        session.close()
    code = f"""
import os, sys, octavo
options = octavo.RuntimeOptions(threads=1, block_size=16, session_folder=sys.argv[2])
model = octavo.load(sys.argv[1], options=options)
session = model.begin_session(name="a")
session.sequences[0].append({NEXT})
calls = []
def ending(call):
    def wrapped(*given):
        calls.append(call)
        if len(calls) > {at}:
            os._exit(9)
        return call(*given)
    return wrapped
os.fsync, os.replace = ending(os.fsync), ending(os.replace)
session.sequences[0].save(sys.argv[3])
session.close()
"""
    given = [sys.executable, "-c", code, str(named.paths.paged), str(tmp_path / "sessions"), str(tmp_path / "a.seq")]
    assert subprocess.run(given, check=False).returncode == 9
    with named() as model:
        [kept] = model.begin_session(name="a").sequences
        file = model.begin_session().restore(tmp_path / "a.seq")
        assert file.tokens == tuple(IDS + NEXT if at >= 2 else IDS)
        assert kept.tokens == tuple(IDS)
        session = model.begin_session(name="b")
        session.close()


def test_what_an_ended_process_left_is_cleared(named, tmp_path):
    with named() as model:
        for _ in range(2):
            session = model.begin_session(name="a")
            session.close()
            [folder] = (tmp_path / "sessions").iterdir()
            left = folder.with_name(f".{folder.name}.00.writing")
            left.mkdir()
            (left / "name.txt").write_text("a")
        model.begin_session(name="a").close()
        assert list((tmp_path / "sessions").iterdir()) == [folder]


def test_a_path_is_a_path(paged, tmp_path):
    sequence = grown(paged)
    sequence.save(str(tmp_path / "a.seq"))
    sequence.save(Path(tmp_path / "a.seq"))
    with pytest.raises(SavedSequenceError, match="can't be written"):
        sequence.save(tmp_path / "no" / "a.seq")
    for wrong, error in (("/", SavedSequenceError), ("a\0b", SavedSequenceError), ("a" * 5000, SavedSequenceError), (5, OptionError), (None, OptionError)):
        for use in (sequence.save, paged.begin_session().restore):
            with pytest.raises(error):
                use(wrong)


# --- named sessions -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(paths, op_library, tmp_path):
    """Loads the tiny model with a place for named sessions."""
    def load(name="paged", **options):
        given = {"threads": 1, "block_size": 16, "session_folder": tmp_path / "sessions", **options}
        return octavo.load(getattr(paths, name), options=octavo.RuntimeOptions(**given))
    load.paths = paths
    return load


@pytest.mark.parametrize("name", ["paged", "contiguous"])
def test_a_named_session_is_there_again(named, name):
    with named(name) as model, model.begin_session(name="ada/ü") as session:
        first, second = session.new_sequence(), session.new_sequence()
        first.append(IDS)
        second.append(IDS[:7])
        session.new_sequence().close()
        expected = first.fork()
        logits = expected.append(NEXT)
        expected.close()
    with named(name) as model:
        session = model.begin_session(name="ada/ü")
        assert [sequence.tokens for sequence in session.sequences] == [tuple(IDS), tuple(IDS[:7])]
        np.testing.assert_array_equal(session.sequences[0].append(NEXT), logits)
        session.sequences[1].close()
        session.close()
        assert model.begin_session().sequences == () and model.begin_session(name="bob").sequences == ()
        [again] = model.begin_session(name="ada/ü").sequences
        assert again.tokens == (*IDS, *NEXT)


def test_more_than_ten_sequences_keep_their_order(named):
    with named() as model:
        with model.begin_session(name="a") as session:
            sequences = [session.new_sequence() for _ in range(12)]
            session.append_batch([(sequence, IDS[: i + 1]) for i, sequence in enumerate(sequences)])
        assert [len(sequence) for sequence in model.begin_session(name="a").sequences] == list(range(1, 13))


def test_a_name_is_one_sessions_at_a_time(named):
    with named() as model:
        session = model.begin_session(name="a")
        with pytest.raises(RequestError, match="open"):
            model.begin_session(name="a")
        session.close()
        model.begin_session(name="a")     # dropped: free again
        model.begin_session(name="a").close()


def test_a_sequence_made_while_another_thread_lists_them_is_kept(named, monkeypatch):
    with named() as model:
        session = model.begin_session(name="a")
        session.new_sequence()
        closed, made = octavo.Sequence.closed, []

        def looked_at(self):
            if not made:
                made.append(None)
                made.append(session.new_sequence())
            return closed.fget(self)

        with monkeypatch.context() as patch:
            patch.setattr(octavo.Sequence, "closed", property(looked_at))
            assert len(session.sequences) == 1
        assert session.sequences[-1] is made[1]


OTHER = """
import os, sys, octavo
model = octavo.load(sys.argv[1], options=octavo.RuntimeOptions(threads=1, block_size=16, session_folder=sys.argv[2]))
"""


def test_a_name_is_one_processes_at_a_time(named, tmp_path):
    """Or the one that closes it last would undo what the other did. A process that is ended, however, leaves no name taken."""
    def another(code):
        given = [sys.executable, "-c", OTHER + code, str(named.paths.paged), str(tmp_path / "sessions")]
        return subprocess.run(given, check=False, capture_output=True, text=True).stdout.strip()

    ask = """
try:
    print(len(model.begin_session(name="a").sequences))
except octavo.errors.RequestError as error:
    print(error.message)
"""
    with named() as model:
        session = model.begin_session(name="a")
        session.new_sequence().append(IDS)
        assert another(ask) == "the session 'a' is open"
        session.close()
        assert another(ask) == "1"
        assert another('session = model.begin_session(name="a")\nprint("open", flush=True)\nos._exit(9)') == "open"
        [kept] = model.begin_session(name="a").sequences
        assert kept.tokens == tuple(IDS)


def test_a_session_that_is_open_elsewhere_is_not_deleted(named):
    """Two stores over one folder, as two processes have."""
    with named() as model, named(session_disk="10 kB") as other:
        session = model.begin_session(name="a")
        session.new_sequence().append(IDS[:17])
        session.close()
        session = model.begin_session(name="a")
        for _ in range(2):
            fresh = other.begin_session(name="b")
            fresh.new_sequence().append(IDS[:17])
            fresh.close()
        assert len(list(other._named._folder.glob("[!.]*"))) == 2, "one is open, the other has just been written"
        session.close()
        fresh = other.begin_session(name="c")
        fresh.new_sequence().append(IDS[:17])
        fresh.close()
        assert not model.begin_session(name="a").sequences
        assert not list(other._named._folder.glob(".*")), "a lock goes with what it locked"


def test_a_stream_ends_when_its_named_session_is_closed(named):
    with named() as model:
        session = model.begin_session(name="a")
        sequence = session.new_sequence()
        sequence.append(IDS)
        stream = sequence.stream(octavo.SamplingParams(max_tokens=9, ignore_eos=True))
        next(stream)
        session.close()
        assert list(stream) == [] and len(model.begin_session(name="a").sequences[0]) == len(IDS) + 1


def test_a_name_is_given_back_in_the_middle_of_anything(named, tmp_path):
    """A finalizer may run while the same thread holds the lock."""
    with named() as model:
        store = model._named
        store.claim("x")
        with store._lock:
            store.release("x")
        store.claim("x")


def test_the_longest_unused_session_goes_first(named):
    with named(session_disk="40 kB") as model:
        for name in "abcd":
            session = model.begin_session(name=name)
            session.new_sequence().append(IDS[:17])     # one block: 8 kB, and its tokens
            session.close()
            if name == "c":
                session = model.begin_session(name="a")  # used again
                session.close()
        for _ in range(2):
            session = model.begin_session(name="e")
            session.new_sequence().append(IDS[:17])
            session.close()
        left = [name for name in "abcde" if model.begin_session(name=name).sequences]
        assert left[-1] == "e" and "b" not in left and "a" in left


def test_a_session_that_cannot_be_written_stays_open(named, monkeypatch):
    with named() as model:
        session = model.begin_session(name="a")
        sequence = session.new_sequence()
        sequence.append(IDS)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(SavedSequenceError, match="No space left"):
                session.close()
        sequence.append(NEXT)
        session.close()
        assert len(model.begin_session(name="a").sequences[0]) == len(IDS) + len(NEXT)


def test_a_damaged_session_says_so(named, tmp_path):
    with named() as model:
        session = model.begin_session(name="a")
        session.new_sequence().append(IDS)
        session.close()
        [file] = (tmp_path / "sessions").glob("*/0.seq")
        file.write_bytes(file.read_bytes()[:-1])
        for _ in range(2):      # and the name is not taken by the failure
            with pytest.raises(SavedSequenceError, match=r"0\.seq"):
                model.begin_session(name="a")


def test_names_need_a_folder(paged, named, tmp_path):
    with pytest.raises(OptionError, match="session_folder"):
        paged.begin_session(name="a")
    for name in (3, b"a", "\ud800"):
        with named() as model, pytest.raises(OptionError, match="text"):
            model.begin_session(name=name)
    for name in ("", ".", "../a", "/", "a\0b", "x" * 5000, "👩\u200d💻"):
        with named() as model:
            with model.begin_session(name=name) as session:
                session.new_sequence().append(IDS[:3])
            assert [len(sequence) for sequence in model.begin_session(name=name).sequences] == [3]
    assert {path.name for path in tmp_path.iterdir()} == {"sessions"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="can't be made"):
        named(session_folder=tmp_path / "file" / "x")
