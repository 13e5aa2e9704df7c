"""MIDI files with wrong fields, byte by byte: a song with sane numbers, or one clear line."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
import songs
from hypothesis import given, settings
from hypothesis import strategies as st

midi, pictures, sources = map(songs.module, ("midi", "pictures", "sources"))
pytest.importorskip("symusic")

TEMPO, METRE, NAME, END = 0x51, 0x58, 0x03, 0x2F
LONGEST = 2**28 - 1  # the longest delta that a file can say


def _number(n):
    # seven bits a byte, the last one without the eighth
    parts = [n & 127]
    while n := n >> 7:
        parts.append(n & 127 | 128)
    return bytes(reversed(parts))


def _meta(kind, data, delta=0):
    return _number(delta) + bytes((0xFF, kind)) + _number(len(data)) + data


def _note(channel, pitch, delta=0, ticks=96):
    struck = _number(delta) + bytes((0x90 | channel, pitch, 80))
    return struck + _number(ticks) + bytes((0x80 | channel, pitch, 0))


def _track(*events):
    data = b"".join(events) + _meta(END, b"")
    return b"MTrk" + struct.pack(">I", len(data)) + data


def _file(*tracks, tempo=b"\x07\xa1\x20", head=(), name=b"melody", ticks=96, kind=1):
    """Return a file: tempo and head, two bars of melody and of a bass, and further tracks."""
    made = [
        _track(_meta(TEMPO, tempo), *head),
        _track(_meta(NAME, name), *[_note(0, 72)] * 8),
        _track(*[_note(1, 48)] * 8),
        *tracks,
    ]
    return b"MThd" + struct.pack(">IHHH", 6, kind, len(made), ticks) + b"".join(made)


def _late(*deltas):
    """Return a track whose note comes after so many ticks."""
    return _track(*(_meta(0x01, b"", delta) for delta in deltas), _note(2, 50))


def _check(song):
    songs.assert_sane(song)
    start, steps = song.notes[:, 1], song.notes[:, 2]
    assert (np.diff(start) >= 0).all()
    assert start[0] >= 0
    assert (start + steps).max() <= song.num_steps


def _outcome(path):
    """Return the song of a file or why there is none, which must be one line that names it."""
    reason = ""
    try:
        _check(song := midi.read(path))
    except ValueError as error:
        reason = str(error)
    if not reason:
        return song
    assert reason.startswith(f"{path.name}: ")
    assert reason.isprintable()
    return reason.removeprefix(f"{path.name}: ")


REFUSED = {
    "tempo-0": (_file(tempo=bytes(3)), "tempo in beats a minute must be 4 to 1000, got inf"),
    "tempo-1": (_file(tempo=b"\0\0\1"), "tempo in beats a minute must be 4 to 1000, got 6000000"),
    "tempo-most": (_file(tempo=b"\xff" * 3), "tempo in beats a minute must be 4 to 1000, got 3.57"),
    "denominator": (_file(head=[_meta(METRE, b"\x04\xff\x18\x08")]), "metre is 4/0, expected 4/4"),
    "numerator": (_file(head=[_meta(METRE, b"\x00\x02\x18\x08")]), "metre is 0/4, expected 4/4"),
    # sixteen of the longest deltas are 2^32 - 16
    "before-0": (_file(_late(*[LONGEST] * 16)), "time of a note in ticks must be 0 to"),
    "far-before-0": (_file(_late(*[LONGEST] * 9)), "time of a note in ticks must be 0 to"),
    "late": (_file(_late(LONGEST)), "length is 6.991e+05 bars, expected 1 to 5000"),
    "late-of-few-ticks": (_file(_late(LONGEST), ticks=1), "length is 6.711e+07 bars"),
    "no-ticks": (_file(ticks=0), "broken (a beat has no ticks)"),
    "smpte": (_file(ticks=0xE728), "broken, or not a MIDI file"),
    "short": (_file(ticks=0x7FFF), "length is 0.0625 bars, expected 1 to 5000"),
    "running-from-nothing": (_file(_track(b"\x00\x30\x50")), "broken, or not a MIDI file"),
    "pitch": (_file(_track(b"\x00\x92\xb0\x50")), "broken, or not a MIDI file"),
    "kind": (_file(kind=9), "broken, or not a MIDI file"),
    "cut": (_file()[:-30], "broken, or not a MIDI file"),
    "beyond": (_file(head=[b"\x00\xff\x01\xff\xff\xff\x7f"]), "broken, or not a MIDI file"),
}
READ = {
    "as-it-should-be": (_file(), 16),
    "tempo-0-later": (_file(head=[_meta(TEMPO, bytes(3), 96)]), 16),
    "name-in-latin-1": (_file(name=b"m\xe9lodie melody"), 16),
    "name-with-nul": (_file(name=b"melody\0\n"), 16),
    "text-in-latin-1": (_file(head=[_meta(0x05, b"\xff\xfe")]), 16),
    "running": (_file(_track(b"\x00\x92\x30\x50\x60\x30\x00\x00\x31\x50\x60\x31\x00")), 18),
    "drums": (_file(_track(*[_note(9, 50)] * 8)), 16),
    "empty-track": (_file(b"MTrk\0\0\0\0", _track()), 16),
    "never-ends": (_file(_track(b"\x00\x92\x30\x50")), 16),
    "no-duration": (_file(_track(*[_note(2, 50, 0, 0)] * 8)), 24),
    "few-ticks": (_file(ticks=1), 16),
    "longest": (_file(_track(_note(2, 50, 4 * 5000 - 2, 1)), ticks=1), 17),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, kind):
    content, reason = REFUSED[kind]
    (tmp_path / "a.mid").write_bytes(content)
    tracemalloc.start()
    found = _outcome(tmp_path / "a.mid")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, str)
    assert found.startswith(reason)
    assert peak < 2**24


@pytest.mark.parametrize("kind", READ)
def test_read(tmp_path, kind):
    content, count = READ[kind]
    (tmp_path / "a.mid").write_bytes(content)
    tracemalloc.start()
    found = _outcome(tmp_path / "a.mid")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.notes) == count
    # of 5,000 bars there are 80,000 rows of 128 pitches
    assert peak < 2**28


def test_many_notes(tmp_path):
    """A note a tick under one that lasts: no loop over notes, nor over what each of them covers."""
    count = 10**6
    begin, end = b"\x00\x90\x60\x50", b"\x00\x80\x60\x00"
    track = _track(begin, _note(0, 48, 0, 1) * count, end)
    (tmp_path / "a.mid").write_bytes(b"MThd" + struct.pack(">IHHH", 6, 1, 1, 96) + track)
    found = _outcome(tmp_path / "a.mid")
    assert len(found.notes) == count + 1
    # what is struck last may be rounded to after the end of the one above; a step is 24 ticks
    assert 1 <= (found.notes[:, 0] == songs.MELODY).sum() <= 24
    assert found.num_bars == -(-count // (4 * 96))


def test_what_is_refused_is_not_written(tmp_path):
    roll = {"melody": np.ones((16, 128), dtype=bool)}
    for bpm in (float("inf"), float("nan"), 0.0, -90.0, 3.0, 1e6):
        with pytest.raises(ValueError, match="bpm must be 4 to 1000, got"):
            midi.write(tmp_path / "a.mid", roll, None, bpm)
    assert not (tmp_path / "a.mid").exists()


EDIT = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 400), st.sampled_from([0, 1, 2, 4, 127, 128, 255])),
    st.tuples(st.just("set"), st.integers(0, 400), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.integers(0, 400), st.integers(1, 6)),
    st.tuples(st.just("add"), st.integers(0, 400), st.binary(min_size=1, max_size=5)),
)


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(
    kind=st.sampled_from(sorted({**REFUSED, **READ}.keys() - {"longest"})),
    edits=st.lists(EDIT, min_size=1, max_size=4),
)
def test_any_damage(tmp_path_factory, kind, edits):
    data = bytearray({**REFUSED, **READ}[kind][0])
    for what, at, value in edits:
        at %= len(data)
        if what == "set":
            data[at] = value
        elif what == "cut":
            del data[at : at + value]
        else:
            data[at:at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.mid"
    path.write_bytes(data)
    _outcome(path)


# names of files


@pytest.fixture
def odd(tmp_path):
    """Return a folder of songs with names that no terminal can show."""
    names = (b"a.mid", b"b\xe9.mid", b"c\nd.mid", b"e$x^$.mid")
    for name in names:
        try:
            with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
                file.write(_file())
        except OSError:
            pytest.skip("the file system takes UTF-8 names only")
    with open(os.path.join(os.fsencode(tmp_path), b"x\xe9\n.mid"), "wb") as file:
        file.write(_file(tempo=bytes(3)))
    return tmp_path


def test_names_of_files_are_shown_on_one_line(odd, capsys):
    found = sources.songs(odd)
    for song in found:
        _check(song)
        song.title.encode()
    assert sorted(song.title for song in found) == [
        "a.mid",
        "b\\udce9.mid",
        "c\\nd.mid",
        "e$x^$.mid",
    ]
    assert capsys.readouterr().out.splitlines() == [
        "skipped x\\udce9\\n.mid: tempo in beats a minute must be 4 to 1000, got inf",
        "skipped 1 of 5 files",
    ]


def test_titles_are_no_formulas(odd, tmp_path):
    pytest.importorskip("matplotlib")
    song = next(song for song in sources.songs(odd) if "$" in song.title)
    pictures.piano_rolls(song, {"song": song.roll()}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_nothing_readable_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.mid").write_bytes(_file(tempo=bytes(3)))
    with pytest.raises(ValueError, match=r"must hold 2 songs or more, got 0"):
        sources.songs(tmp_path)
