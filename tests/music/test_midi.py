"""MIDI files in and out, and the songs of a folder (examples/music/midi.py and its neighbours)."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import songs
from songs import ACCOMPANIMENT, BAR, BRIDGE, MELODY, assert_same, corpus, make_song

midi, sources, split = map(songs.module, ("midi", "sources", "split"))
symusic = pytest.importorskip("symusic")

# a bar of one voice, a bar of chords below it: first step, steps, pitch
TUNE = [(4 * i, 4, pitch) for i, pitch in enumerate((72, 74, 76, 74))]
LOWER_TUNE = [(step, steps, pitch - 3) for step, steps, pitch in TUNE]
CHORDS = [(8 * i, 8, pitch) for i in range(2) for pitch in (48, 52, 55)]


def write(path, tracks, metres=((0, 4, 4),), ticks=480, drums=(), bpm=None):
    """Write tracks, name -> notes in sixteenths, and changes of metre, step, beats, beat value."""
    score = symusic.Score(ticks)
    for step, *metre in metres:
        score.time_signatures.append(symusic.TimeSignature(step * ticks // 4, *metre))
    if bpm is not None:
        score.tempos.append(symusic.Tempo(0, bpm))
    for name, notes in tracks.items():
        track = symusic.Track(name, 0, name in drums)
        for step, steps, pitch in notes:
            start, end = round(step * ticks / 4), round((step + steps) * ticks / 4)
            track.notes.append(symusic.Note(start, end - start, pitch, 64))
        score.tracks.append(track)
    score.dump_midi(path)
    return path


def notes(song, track):
    return song.notes[song.notes[:, 0] == track, 1:].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_read(tmp_path, seed):
    song = make_song(seed)
    # to the last step, so that the length is known, and nothing held over from before
    inside = song.notes[song.notes[:, 1] >= 0]
    song = replace(song, notes=np.concatenate((inside, [[MELODY, 4 * BAR - 1, 1, 84]])))
    names = {"Lead vocals": MELODY, "bridge": BRIDGE, "piano": ACCOMPANIMENT}
    parts = {name: song.roll(track) for name, track in names.items()}
    onsets = {name: song.onsets(track) for name, track in names.items()}
    midi.write(tmp_path / "a song.mid", parts, onsets, bpm=120)
    found = midi.read(tmp_path / "a song.mid")
    assert (found.title, found.num_bars, found.bpm, found.split) == ("a song", 4, 120, "")
    for track in names.values():
        assert np.array_equal(found.roll(track), song.roll(track))
        assert np.array_equal(found.onsets(track), song.onsets(track))
    assert (found.phrase == -1).all()
    root, chroma = songs.module("harmony").estimate_chords(song.notes, 4)
    assert np.array_equal(found.root, root)
    assert np.array_equal(found.chroma, chroma)


def test_without_onsets_notes_are_held(tmp_path):
    roll = np.zeros((BAR, 128), dtype=bool)
    roll[2:6, 60] = roll[:, 40] = True
    onset = np.zeros_like(roll)
    onset[[2, 4], 60] = True
    for onsets, wanted in (({}, [[2, 4, 60]]), ({"melody": onset}, [[2, 2, 60], [4, 2, 60]])):
        midi.write(tmp_path / "a.mid", {"melody": roll & (np.arange(128) == 60)}, onsets)
        assert notes(_alone(tmp_path / "a.mid"), MELODY) == wanted


def _alone(path):
    # shorter than a bar unless something else sounds
    score = symusic.Score(path)
    track = symusic.Track("piano", 0, False)
    track.notes.append(symusic.Note(0, 4 * score.ticks_per_quarter, 40, 64))
    score.tracks.append(track)
    score.dump_midi(path)
    return midi.read(path)


@pytest.mark.parametrize("shape", [(16, 88), (16,), (16, 128, 1)])
def test_rolls_have_128_pitches(tmp_path, shape):
    with pytest.raises(ValueError, match=r"must be \[T, 128\], got .* in melody"):
        midi.write(tmp_path / "a.mid", {"melody": np.zeros(shape)})
    with pytest.raises(ValueError, match=r"must be \[T, 128\], got .* in melody"):
        midi.write(tmp_path / "a.mid", {"melody": np.zeros((8, 128))}, {"melody": np.zeros(shape)})


@pytest.mark.parametrize("ticks", [96, 480])
def test_times_are_rounded_to_sixteenths(tmp_path, ticks):
    tune = [(0.3, 3.6, 72), (4.4, 0.2, 74), (7.6, 8.3, 76)]
    song = midi.read(write(tmp_path / "a.mid", {"melody": tune, "piano": CHORDS}, ticks=ticks))
    assert notes(song, MELODY) == [[0, 4, 72], [4, 1, 74], [8, 8, 76]]


def test_tempo_and_metre_may_be_missing(tmp_path):
    song = midi.read(write(tmp_path / "a.mid", {"melody": TUNE, "piano": CHORDS}, metres=()))
    assert (song.num_bars, song.bpm) == (1, 120)


@pytest.mark.parametrize(
    ("tracks", "melody"),
    [
        pytest.param({"piano": CHORDS, "flute": TUNE}, TUNE, id="voice"),
        pytest.param({"MELODY": CHORDS, "flute": TUNE}, CHORDS, id="named"),
        pytest.param({"Lead": LOWER_TUNE, "Vocals": TUNE}, TUNE, id="vocals-first"),
        pytest.param({"bass": [(0, 16, 36)], "a": CHORDS, "b": TUNE}, TUNE, id="highest"),
        pytest.param({"fill": TUNE[:2], "a": CHORDS, "b": LOWER_TUNE}, LOWER_TUNE, id="sparse"),
        pytest.param({"a": LOWER_TUNE, "b": TUNE, "c": CHORDS}, TUNE, id="two-voices"),
        pytest.param({"piano": TUNE + CHORDS}, TUNE, id="skyline"),
        pytest.param({"lead sheet": TUNE + CHORDS}, TUNE, id="skyline-named"),
        # players let notes overlap
        pytest.param(
            {"a": CHORDS, "b": [(0, 5.1, 72), (4, 4, 74), (8, 4, 76), (12, 4, 74)]},
            [(0, 5, 72), (4, 4, 74), (8, 4, 76), (12, 4, 74)],
            id="legato",
        ),
        pytest.param({"a": CHORDS, "b": TUNE, "kit": [(0, 1, 90)]}, TUNE, id="drums"),
    ],
)
def test_which_is_the_melody(tmp_path, tracks, melody):
    song = midi.read(write(tmp_path / "a.mid", tracks, drums=("kit",)))
    assert notes(song, MELODY) == sorted(map(list, melody))
    everything = sorted(list(n) for name, track in tracks.items() for n in track if name != "kit")
    assert len(song.notes) == len(everything)


def test_the_skyline_is_what_nothing_is_above(tmp_path):
    # the second chord is struck below a note that is held, the third above it
    track = [(0, 12, 72), (0, 4, 60), (4, 4, 64), (8, 8, 76), (8, 4, 60)]
    song = midi.read(write(tmp_path / "a.mid", {"piano": track}))
    assert notes(song, MELODY) == [[0, 12, 72], [8, 8, 76]]
    assert notes(song, ACCOMPANIMENT) == [[0, 4, 60], [4, 4, 64], [8, 4, 60]]


LOW = [(4 * i, 4, 30) for i in range(4)]
BAD = {
    "3-4": ({"melody": TUNE, "piano": CHORDS}, ((0, 3, 4),), "metre is 3/4, expected 4/4"),
    "change": (
        {"melody": TUNE, "piano": CHORDS},
        ((0, 4, 4), (8, 6, 8)),
        "metre changes to 6/8, expected 4/4",
    ),
    "no-track": ({}, (), "no notes"),
    "no-note": ({"melody": []}, (), "no notes"),
    "drums": ({"kit": TUNE}, (), "no notes besides drums"),
    "alone": ({"melody": TUNE}, (), "no accompaniment, expected notes besides the melody"),
    "flute": ({"flute": TUNE}, (), "no accompaniment, expected notes besides the melody"),
    "hands": ({"right": CHORDS, "left": CHORDS}, (), "no melody, expected one of its 2 tracks"),
    "bass": ({"piano": CHORDS, "bass": LOW}, (), "no melody, expected one of its 2 tracks"),
    "short": ({"melody": TUNE[:2], "piano": CHORDS[:3]}, (), "length is 0.5 bars, expected 1 to"),
    "long": ({"melody": TUNE, "piano": [(10**6, 4, 40)]}, (), "length is 6.25e+04 bars"),
}
BROKEN = {
    "bytes": bytes(range(256)),
    "zero": b"",
    "text": b"MThd, or so it says\n" * 20,
}


@pytest.mark.parametrize("kind", [*BAD, *BROKEN, "truncated", "no-ticks", "missing"])
def test_files_that_are_no_song(tmp_path, kind):
    path = tmp_path / "a.mid"
    if kind in BAD:
        tracks, metres, wanted = BAD[kind]
        write(path, tracks, metres, drums=("kit",))
    elif kind == "missing":
        wanted = "there is no such file"
    else:
        whole = write(path, {"melody": TUNE, "piano": CHORDS}).read_bytes()
        made = {"truncated": whole[:-9], "no-ticks": whole[:12] + bytes(2) + whole[14:]}
        path.write_bytes({**BROKEN, **made}[kind])
        wanted = "broken"
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        midi.read(path)
    assert str(error.value).startswith(f"a.mid: {wanted}")
    assert "\n" not in str(error.value)


def test_a_melody_alone_may_do(tmp_path):
    song = midi.read(write(tmp_path / "a.mid", {"flute": TUNE}), accompanied=False)
    assert notes(song, MELODY) == [list(n) for n in TUNE]
    assert len(song.notes) == len(TUNE)


def test_damaged_files_are_songs_or_refused(tmp_path):
    whole = write(tmp_path / "a.mid", {"melody": TUNE, "piano": CHORDS}).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        (tmp_path / "a.mid").write_bytes(data.tobytes())
        try:
            assert midi.read(tmp_path / "a.mid").roll().any()
        except ValueError:
            refused += 1
    assert 0 < refused < 200


# folders


def _folder(path, good, bad=()):
    (path / "below").mkdir(parents=True)
    for i in range(good):
        # the tempo is the number of the song
        name = f"below/{i:02}.MIDI" if i % 2 else f"{i:02}.mid"
        write(path / name, {"melody": TUNE, "piano": CHORDS}, bpm=60 + i)
    for kind in bad:
        write(path / f"{kind}.mid", *BAD[kind][:2], drums=("kit",))
    (path / "notes.txt").write_text("no song")
    return path


def test_a_folder_is_read_in_order(tmp_path):
    folder = _folder(tmp_path / "songs", 4, ["3-4", "drums"])
    (folder / "below" / "x.mid").write_bytes(b"")
    found, skipped = midi.read_folder(folder)
    titles = ["00.mid", "02.mid", "below/01.MIDI", "below/03.MIDI"]
    assert [song.title for song in found] == titles
    assert [round(song.bpm) for song in found] == [60, 62, 61, 63]
    lines = [line.split(" (")[0] for line in skipped]
    assert lines == [
        "3-4.mid: metre is 3/4, expected 4/4",
        "below/x.mid: broken, or not a MIDI file",
        "drums.mid: no notes besides drums",
    ]
    again, _ = midi.read_folder(folder)
    for pair in zip(found, again, strict=True):
        assert_same(*pair)


def test_songs_of_a_folder(tmp_path, capsys):
    found = sources.songs(_folder(tmp_path / "songs", 12, ["3-4", "alone"]))
    assert [song.split for song in found] == (
        ["val", *["train"] * 4, "test", *["train"] * 4, "val", "train"]
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "skipped 3-4.mid: metre is 3/4, expected 4/4",
        "skipped alone.mid: no accompaniment, expected notes besides the melody",
        "skipped 2 of 14 files",
    ]


def test_a_song_is_no_corpus(tmp_path):
    folder = _folder(tmp_path / "songs", 1)
    for path in (folder, folder / "00.mid"):
        with pytest.raises(ValueError, match=r"must hold 2 songs or more, got 1"):
            sources.songs(path)
        (song,) = sources.songs(path, at_least=1)
        assert (song.split, notes(song, MELODY)) == ("", [list(n) for n in TUNE])
    for path in (tmp_path / "none.mid", folder / "notes.txt"):
        with pytest.raises(ValueError, match=rf"must be an \.npz file, .* got .*{path.name}"):
            sources.songs(path)


def test_songs_of_a_corpus(tmp_path):
    corpus.save([make_song(0), make_song(1)], tmp_path / "songs.npz")
    for i, song in enumerate(sources.songs(tmp_path / "songs.npz")):
        assert_same(song, make_song(i))


@pytest.mark.parametrize("count", range(2, 30))
def test_splits(count):
    names = [song.split for song in split.split([make_song()] * count)]
    assert names.count("test") == max(1, (count + 4) // 10)
    assert names.count("val") == (-(-count // 10) if count > 2 else 0)
    assert names.count("train") == count - names.count("test") - names.count("val") > 0


def test_what_belongs_together_is_not_split():
    groups = list("abcadefgab")
    found = split.split([make_song(i) for i in range(10)], groups)
    together = {}
    for song, group in zip(found, groups, strict=True):
        together.setdefault(group, set()).add(song.split)
    # seven groups: the first and the sixth are held out
    train = {group: {"train"} for group in "bcdeg"}
    assert together == {**train, "a": {"val"}, "f": {"test"}}
    with pytest.raises(ValueError, match=r"two or more, .* got 1"):
        split.split(found, ["a"] * 10)


@pytest.mark.parametrize("package", ["music21", "tqdm", "symusic"])
def test_packages_that_are_missing(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    path = _folder(tmp_path / "songs", 2) if package == "symusic" else None
    with pytest.raises(ImportError, match=rf"{package} is not installed: pip install -e '\.\[mus"):
        sources.songs(path)


def test_packages_are_imported_when_needed():
    code = "import sys; sys.path.insert(0, 'examples'); import music.sources; "
    code += "assert not {'music21', 'symusic', 'tqdm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=songs.ROOT, check=True)
